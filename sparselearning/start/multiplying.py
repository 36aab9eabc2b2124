"""Which layers multiply their input with a weight, and how they store it."""

from fnmatch import fnmatchcase

from torch import nn

from sparselearning.orientation import PLAIN, Orientation

# The weights of torch's layers, by the names of parameters. A parametrization, and torch's older spectral_norm and
# weight_norm, store them under other names.
WEIGHTS = {
    nn.Linear: "weight",
    nn.modules.conv._ConvNd: "weight",
    nn.Bilinear: "weight",
    nn.MultiheadAttention: "*proj_weight",
    nn.RNNBase: "weight_*",
    nn.RNNCellBase: "weight_*",
}
STORED = ("", "_orig", "_v")  # appended to a weight's name
TRANSPOSED = nn.modules.conv._ConvTransposeNd


def orientation_of(module: nn.Module, name: str, parameter: nn.Parameter) -> Orientation | None:
    """Return the orientation of a parameter with which `module` multiplies its input, or None if it is none.

    >>> orientation_of(nn.ConvTranspose1d(4, 6, 3), "weight", nn.ConvTranspose1d(4, 6, 3).weight)
    Orientation(copies=1, stacked=False, inputs_first=True)
    """
    if parameter.dim() < 2:
        return None
    if is_experts(module, parameter):
        return Orientation(parameter.shape[0], stacked=True, inputs_first=_inputs_come_first(module, name, parameter))
    if _is_transformers_conv1d(module) and name == "weight":
        return Orientation(inputs_first=True)
    patterns = [pattern for kind, pattern in WEIGHTS.items() if isinstance(module, kind)]
    if not any(fnmatchcase(name, pattern + stored) for pattern in patterns for stored in STORED):
        return None
    return Orientation(module.groups, inputs_first=True) if isinstance(module, TRANSPOSED) else PLAIN


def is_experts(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether a parameter holds the weights of several experts, (experts, ., .)."""
    return parameter.dim() == 3 and "Expert" in type(module).__name__


def _inputs_come_first(module, name, parameter):
    """Return whether experts are stored as (experts, inputs, outputs). Transformers marks some that are."""
    if (marked := getattr(module, "is_transposed", None)) is not None:
        return bool(marked)
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    from_hidden = "down" not in name  # gates and up-projections read the hidden state, down-projections return to it
    return (
        hidden is not None
        and parameter.shape[1 if from_hidden else 2] == hidden != parameter.shape[2 if from_hidden else 1]
    )


def _is_transformers_conv1d(module):
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers") for kind in type(module).__mro__
    )
