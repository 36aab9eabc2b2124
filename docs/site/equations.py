"""What each part of a method does in one update, in the letters of the papers; the gallery puts the parts together.

Of layer i: W_i weights, m_i mask, n_i active weights, N_i all weights, M_i momentum, G_i = dL/dW_i the gradient of the
last step. Without an index a letter stands for all layers together. T is the length of the training in steps, t the
step of the update. k_i weights leave and g_i come.
"""

COUNT = "k_i  = ceil(p n_i)"
COUNTS = "k    = sum_i ceil(p n_i)"

PRUNE = {
    "magnitude": [COUNT, "m_i <- drop_lowest(|W_i|, m_i, k_i)"],
    "SET": [
        f"{COUNT}, divided between the signs as the active weights are",
        "m_i <- drop the smallest positive and the largest negative W_i",
    ],
    "threshold": [
        COUNTS,
        "m_i <- m_i and |W_i| > c",
        "c   <- the k-th smallest |W| before, if that drops 2% more or less than k",
    ],
    "adaptive_threshold": [
        COUNTS,
        "m_i <- m_i and |W_i| >= c",
        "c   <- 2 c if fewer than 0.9 k were dropped, c / 2 if more than 1.1 k",
    ],
    "global_magnitude": [COUNTS, "m   <- drop_lowest(|W|, m, k)"],
    "gradual_magnitude": [
        "m   <- drop_lowest(|W|, m, n - D(t) N)",
        f"{COUNT}, with the n_i that are left",
        "m_i <- drop_lowest(|W_i|, m_i, k_i)",
    ],
    "magnitude_gradient": [COUNT, "m_i <- drop_lowest(|W_i| + 0.01 |G_i|, m_i, k_i)"],
    "sign_flip": ["m_i <- m_i and sign(W_i) = s_i, with a sign s_i that each place keeps"],
    "dense_magnitude": ["m_i <- m_i and |W_i| among the n_i largest of the layer, inactive ones included"],
    "global_dense_magnitude": [
        "n    = D(t) N",
        "m   <- m and |W| among the n largest of the network, inactive ones included",
    ],
}
REDISTRIBUTION = {
    "momentum": [
        "r_i  = mean(|M_i| over active) / sum_j mean(|M_j| over active)    before pruning",
        "g_i  = min(room_i, r_i sum_j k_j + excess)",
    ],
    "magnitude": [
        "r_i  = mean(|W_i| over active) / sum_j mean(|W_j| over active)    before pruning",
        "g_i  = min(room_i, r_i sum_j k_j + excess)",
    ],
    "nonzeros": ["r_i  = n_i / sum_j n_j    before pruning", "g_i  = min(room_i, r_i sum_j k_j + excess)"],
    "remaining": ["r_i  = n_i / sum_j n_j    after pruning", "g_i  = min(room_i, r_i sum_j k_j), the rest likewise"],
    "none": ["g_i  = k_i"],
}
GROWTH = {
    "momentum": ["m_i <- add_highest(|M_i|, m_i, g_i)"],
    "gradient": ["m_i <- add_highest(|G_i|, m_i, g_i)"],
    "random": ["m_i <- add g_i at random"],
    "guided": [
        "C_i  = n_i draws of (output, input), in proportion to the sums of |G_i| over its row and its column",
        "m_i <- add_highest(|G_i| in C_i, m_i, g_i)",
    ],
    "momentum_neuron": [
        "g_ij = apportion(g_i, mean(|M_ij|)) for the neurons j",
        "m_ij <- add_highest(|M_ij|, m_ij, g_ij)",
    ],
    "global_momentum": ["m   <- add_highest(|M|, m, sum_i g_i)"],
    "rewiring": ["m_i <- add g_i at random; each has the sign s_i of its place"],
    "cannistraci_hebb": [
        "S_uv = sum over paths u - z1 - z2 - v of 1 / sqrt((1 + e(z1)) (1 + e(z2)))    linear layers",
        "m_i <- add_highest(S, m_i, g_i)    other layers: at random",
    ],
    "dense_magnitude": ["m_i <- add_highest(|W_i|, m_i, g_i), with the values of inactive weights"],
    "global_dense_magnitude": ["m   <- add_highest(|W|, m, what n lacks), with the values of inactive weights"],
}
START = {
    "constant": "the same density D in every layer, at random",
    "uniform": "the first layer dense, the same density in all others, at random",
    "linear": "density (inputs + outputs) / (inputs * outputs) times a constant, at random: Erdos-Renyi",
    "erdos_renyi_kernel": "density sum(shape) / prod(shape) times a constant, at random: Erdos-Renyi-kernel",
    "magnitude": "the largest |W_i| of each layer, the same density in every layer",
    "magnitude:constant": "the same as magnitude",
    "magnitude:uniform": "the largest |W_i| of each layer, the first layer dense",
    "magnitude:linear": "the largest |W_i| of each layer, with the densities of linear",
    "magnitude:erdos_renyi_kernel": "the largest |W_i| of each layer, with the densities of erdos_renyi_kernel",
    "snip": "the largest |w dL/dw| of the network, on one batch or several",
    "grasp": "the largest w (H g) of the network, on one batch or several",
    "synflow": "the largest |w dR/dw| of the network in 100 rounds, without data",
    "resume": "the weights that are not zero",
}
RATE = {  # of p, from p0 at the start to the step that {end} names
    "cosine": "p    = 0.005 + ({p0} - 0.005) (1 + cos(pi t / {end})) / 2",
    "cosine_to_zero": "p    = {p0} (1 + cos(pi t / {end})) / 2",
    "linear": "p    = {p0} (1 - t / {end})",
    "constant": "p    = {p0}",
}
DENSITY = {  # from D0 to D
    "constant": "",
    "cubic": "D(t) = D + ({D0} - D) (1 - t / {end})^3",
    "early_cubic": "D(t) = D + ({D0} - D) (1 - t / (0.75 {end}))^3, then D",
    "step": "D(t) = D",
    "soft": "D(t) = D / (1 - p)    after the update; D after the last one",
}
WEIGHTS = {
    "zero": "Inactive weights are zero.",
    "kept": "Inactive weights keep their values in a dense copy, and as many of them train as are active.",
    "soft": "Inactive weights keep their values in a dense copy and train; the largest of them is subtracted from the "
    "magnitudes of active ones.",
    "sparse": "Active weights alone exist; sparse kernels train them.",
}
