"""The methods of the field: which parts each one is made of.

    mask = Masking.from_method("rigl", model, optimizer, total_steps=epochs * len(loader), density=0.05)
    python main.py --method rigl --density 0.05

A method is a row of the table `METHODS`. Its parts are functions and schedules that stay free to combine: every one
can be taken otherwise, `Masking.from_method("rigl", ..., growth="random")` or `--method rigl --growth random`.
docs/methods.md says where a row differs from its paper.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparselearning.functions import check_readable, is_marked, may_read, resolve
from sparselearning.grow import GROWTH_FUNCTIONS, momentum_growth
from sparselearning.method import DECAYS, DENSITY_SCHEDULES, WEIGHTS, Method
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.schedules import SoftDensity, Updates
from sparselearning.sparse.observing import WINDOW
from sparselearning.start.masks import Density
from sparselearning.weights.start_states import refuse_unfit_optimizer
from sparselearning.weights.together import members_of
from sparselearning.weights.zeros import Zeros

FUNCTIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "prune_mode": PRUNE_FUNCTIONS,
    "redistribution_mode": REDISTRIBUTION_FUNCTIONS,
    "growth_mode": GROWTH_FUNCTIONS,
}

SNFS = "Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840"
SET = "Mocanu et al. 2018, https://arxiv.org/abs/1707.04780"
DSR = "Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967"
RIGL = "Evci et al. 2020, https://arxiv.org/abs/1911.11134"
GMP = "Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878"
DEEPR = "Bellec et al. 2018, https://arxiv.org/abs/1711.05136"
TOP_KAST = "Jayakumar et al. 2020, https://arxiv.org/abs/2106.03517"
MEST = "Yuan et al. 2021, https://arxiv.org/abs/2110.14032"
GRANET = "Liu et al. 2021, https://arxiv.org/abs/2106.10404"
SMET = "Xiao et al. 2026, https://arxiv.org/abs/2606.00888"
GSE = "Heddes et al. 2024, https://arxiv.org/abs/2401.06898"
CHT = "Zhang et al. 2024, https://openreview.net/forum?id=iayEcORsGd"
CHTS = "Zhang et al. 2025, https://arxiv.org/abs/2501.19107"
ST3 = "Vanderschueren & De Vleeschouwer 2023, https://arxiv.org/abs/2212.01076"
SRIGL = "Lasby et al. 2024, https://arxiv.org/abs/2305.02299"
SNIP = "Lee et al. 2019, https://arxiv.org/abs/1810.02340"
GRASP = "Wang et al. 2020, https://arxiv.org/abs/2002.07376"
SYNFLOW = "Tanaka et al. 2020, https://arxiv.org/abs/2006.05467"
ONE_SHOT = "Han et al. 2015, https://arxiv.org/abs/1506.02626"
ERK = "erdos_renyi_kernel"
LARGEST = f"magnitude:{ERK}"
STATIC: dict[str, Any] = dict(prune_rate=0.0, decay_schedule="constant", stop_fraction=0.0)

# fmt: off
METHODS: dict[str, Method] = {
    "sparse_momentum": Method("Sparse momentum", SNFS, "magnitude", "momentum", "momentum"),
    "set": Method("SET", SET, "SET", "none", "random", "linear", prune_rate=0.3),
    "dsr": Method("DSR", DSR, "adaptive_threshold", "remaining", "random",
                  prune_rate=0.2, prune_every_k_steps=100),
    "rigl": Method("RigL", RIGL, "magnitude", "none", "gradient", ERK,
                   prune_rate=0.3, decay_schedule="cosine_to_zero", prune_every_k_steps=100, stop_fraction=0.75,
                   reset_state=True),
    "srigl": Method("SRigL", SRIGL, "magnitude", "none", "gradient", ERK,
                    prune_rate=0.3, decay_schedule="cosine_to_zero", prune_every_k_steps=100, stop_fraction=0.75,
                    reset_state=True, pattern="fan-in:0.3"),
    "guided": Method("GSE", GSE, "magnitude", "none", "guided", "linear",
                     prune_rate=0.2, decay_schedule="cosine_to_zero", prune_every_k_steps=1000, stop_fraction=0.6,
                     reset_state=True),
    "deep_rewiring": Method("Deep Rewiring", DEEPR, "sign_flip", "none", "rewiring", "linear",
                            prune_rate=0.0, decay_schedule="constant", prune_every_k_steps=10, pull=1e-4),
    "top_kast": Method("Top-KAST", TOP_KAST, "dense_magnitude", "none", "dense_magnitude", LARGEST,
                       prune_rate=0.0, decay_schedule="constant", prune_every_k_steps=100, weights="kept"),
    "mest": Method("MEST", MEST, "magnitude_gradient", "none", "random", ERK,
                   prune_rate=0.3, decay_schedule="cosine_to_zero", prune_every_k_steps=1000, stop_fraction=0.75,
                   density_schedule="soft"),
    "granet": Method("GraNet", GRANET, "gradual_magnitude", "none", "gradient", ERK,
                     prune_rate=0.5, prune_every_k_steps=1000, density_schedule="early_cubic", start_density=0.5,
                     reset_state=True),
    "cht": Method("CHT", CHT, "magnitude", "none", "cannistraci_hebb", "linear", prune_rate=0.3),
    "cht_soft": Method("CHTs", CHTS, "soft_magnitude", "none", "cannistraci_hebb_soft", "receptive_field",
                       prune_rate=0.1, decay_schedule="cosine_to_zero", prune_every_k_steps=100, stop_fraction=0.75,
                       reset_state=True),
    "smet": Method("SMET", SMET, "magnitude", "none", "random",
                   prune_rate=0.2, prune_every_k_steps=100, reset_state="restart", regrown_warm_up=100,
                   lr_by_density=True),
    "static": Method("Static random", RIGL, sparse_init=ERK, **STATIC),
    "snip": Method("SNIP", SNIP, sparse_init="snip", **STATIC),
    "grasp": Method("GraSP", GRASP, sparse_init="grasp", **STATIC),
    "synflow": Method("SynFlow", SYNFLOW, sparse_init="synflow", **STATIC),
    "gmp": Method("Gradual magnitude pruning", GMP, "global_magnitude",
                  prune_rate=0.0, decay_schedule="constant", prune_every_k_steps=100, stop_fraction=0.75,
                  density_schedule="cubic", start_density=1.0),
    "soft_threshold": Method("Soft threshold (ST-3)", ST3, "global_dense_magnitude", "none", "global_dense_magnitude",
                             prune_rate=0.0, decay_schedule="constant", prune_every_k_steps=100, stop_fraction=0.75,
                             density_schedule="cubic", start_density=1.0, weights="soft"),
    "one_shot": Method("One-shot magnitude pruning", ONE_SHOT, "global_magnitude",
                       prune_rate=0.0, decay_schedule="constant", start_fraction=0.5, stop_fraction=0.5,
                       density_schedule="step", start_density=1.0),
}
# fmt: on


def find_method(method: str | Method, **parts: Any) -> Method:
    """Return the method of this name, with `parts` of it taken otherwise.

    Raises:
        ValueError: if there is none of this name, or a part has no such value.
        TypeError: if a method has no such part.
    """
    if not isinstance(method, Method):
        if method not in METHODS:
            raise ValueError(f"Unknown method {method!r}. Choose one of {', '.join(map(repr, METHODS))}.")
        method = METHODS[method]
    if unknown := parts.keys() - set(PARTS):
        raise TypeError(f"A method has no part {', '.join(sorted(unknown))}. There are {', '.join(PARTS)}.")
    return dataclasses.replace(method, **parts)


PARTS = [field.name for field in dataclasses.fields(Method) if field.name not in ("name", "paper")]


def find_function(argument: str, mode: str | Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that `prune_mode`, `growth_mode` or `redistribution_mode` means.

    Raises:
        ValueError, FunctionError: as `functions.resolve`.
    """
    return resolve(argument, mode, FUNCTIONS[argument])


def hold(
    weights: str | Zeros,
    optimizer: torch.optim.Optimizer,
    prune: Callable[..., Any],
    grow: Callable[..., Any],
    measure: Callable[..., Any],
) -> Zeros:
    """Return what holds the weights of one Masking, told which dense gradients the functions read.

    Sparse training observes as many dense gradients as a momentum averages if a function may read the momentum of
    inactive weights, that of the last step if one may read the gradient, and none otherwise.

    Raises:
        ValueError: for an unknown name, an object that holds the weights of another Masking, several optimizers whose
            weights cannot be held so, or an optimizer without the state that `reset_state` takes a mean of.
        TypeError: for anything else.
        RuntimeError, FunctionError: if a function reads what is not there; see `functions.check_readable`.
    """
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            raise ValueError(f"Unknown weights {weights!r}. Choose one of {', '.join(map(repr, WEIGHTS))}.")
        held = WEIGHTS[weights]()
    elif isinstance(weights, Zeros):
        held = weights
    else:
        raise TypeError(
            f"Expected weights to be one of {', '.join(map(repr, WEIGHTS))}, or an object such as Zeros(reset_state="
            f"True), got {weights!r}."
        )
    if hasattr(held, "optimizer"):
        raise ValueError(f"This {type(held).__name__} holds the weights of another Masking. Make one for each.")
    if len(members_of(optimizer)) > 1 and (held.kind != "zero" or held.pull or held.own_steps):
        also = " with a pull" if held.pull else " with steps of single weights" if held.own_steps else ""
        kind = f"weights={held.kind!r}{also}"
        raise ValueError(f"{kind} needs one optimizer, got several. Make a Masking for each of them.")
    for member in members_of(optimizer):
        refuse_unfit_optimizer(held.start_state, member)
        held.own_steps.fit(member)
    functions = (prune, grow, measure)
    check_readable(functions, optimizer, held.keeps_inactive)
    held.optimizer = optimizer
    averages = any(may_read(x, "momentum") and not is_marked(x, "entrywise") for x in functions)
    held.window = WINDOW if averages else int(any(may_read(function, "gradient") for function in functions))
    held.sparingly = grow is momentum_growth and all(is_marked(function, "entrywise") for function in (prune, measure))
    return held


OF_WEIGHTS = ("regrown", "reset_state", "pull", "regrown_warm_up", "lr_by_density")
OF_MASKING = ("verbose", "fp16")
OF_MODULE = ("remove_param_names", "sparse_embeddings", "dense", "batches", "sparse", "state", "process_group")


def arguments_of(
    method: str | Method, density: Density, total_steps: int, parts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `Masking` and of `add_module` for a method that ends with `density`.

    Args:
        method: a key of METHODS, or a `Method`.
        total_steps: optimizer steps of the training.
        parts: parts of the method to replace; `verbose` and `fp16` of Masking; `remove_param_names`,
            `sparse_embeddings`, `dense`, `batches`, `sparse`, `state` and `process_group` of `add_module`.

    Raises:
        ValueError: for an unknown method, or `total_steps` below 1.
        TypeError: for an unknown part.
    """
    of_masking = {name: parts[name] for name in OF_MASKING if name in parts}
    of_module = {name: parts[name] for name in OF_MODULE if name in parts}
    chosen = find_method(method, **{name: parts[name] for name in parts if name not in (*OF_MASKING, *OF_MODULE)})
    if total_steps < 1:
        raise ValueError(f"Expected total_steps of at least 1, got {total_steps}.")
    first, last = round(chosen.start_fraction * total_steps), round(chosen.stop_fraction * total_steps)
    decay = DECAYS[chosen.decay_schedule](chosen.prune_rate, max(last, 1))
    of_masking |= dict(
        prune_rate_decay=decay,
        prune_mode=chosen.prune,
        growth_mode=chosen.growth,
        redistribution_mode=chosen.redistribution,
        updates=Updates(
            every=chosen.prune_every_k_steps,
            first=first,
            last=last if chosen.stop_fraction < 1 else None,
            density=_density_schedule(chosen, chosen.density_at_start(density), density, first, last, decay),
        ),
        weights=WEIGHTS[chosen.weights](**{part: getattr(chosen, part) for part in OF_WEIGHTS}),
    )
    of_module |= dict(
        density=chosen.density_at_start(density),
        sparse_init=chosen.sparse_init,
        pattern=chosen.pattern,
        rescale=chosen.rescale,
    )
    return of_masking, of_module


def _density_schedule(method, start, end, first, last, decay) -> Any:
    if method.density_schedule == "constant":
        return None
    if isinstance(end, Mapping):
        return {name: _density_schedule(method, start[name], end[name], first, last, decay) for name in end}
    if method.density_schedule == "soft":
        return SoftDensity(end, decay, last)
    return DENSITY_SCHEDULES[method.density_schedule](start, end, first, last)
