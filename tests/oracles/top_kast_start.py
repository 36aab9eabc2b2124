"""The first masks of Top-KAST, from the paper: the k entries of largest magnitude in each layer."""


def largest(weight, k):
    """Return the positions, in the flat weight, of its k largest magnitudes."""
    values = [abs(x) for x in weight.detach().flatten().tolist()]
    return set(sorted(range(len(values)), key=values.__getitem__, reverse=True)[:k])
