"""Weights that another training left: files of many programs, fitted to the names of a model.

Read are checkpoints and state_dicts of this library and of release 1.0, of torchvision's and PyTorch's reference
scripts, of timm, models in DistributedDataParallel or compiled, and .safetensors.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning import checkpoint
from sparselearning.checkpoint import CheckpointError
from sparselearning.compact import expanded, is_compact
from sparselearning.differences import describe_differences, differences
from sparselearning.models.resnet import RESNETS

WITH_WEIGHTS = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "params")
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of torch.compile, FSDP, checkpointing
PREFIXES = ("module", "model", "net", "network")  # of DistributedDataParallel, averages and trainers
AUXILIARY = {"aux1", "aux2", "AuxLogits"}  # classifiers of torchvision's Inceptions that only train
WORDS = {"1x1": "first 1x1 convolution of a bottleneck (v1)", "3x3": "3x3 convolution of a bottleneck (v1.5)"}

logger = logging.getLogger(__name__)


def load_pretrained(path: str | Path, model: nn.Module, new_head: bool = False, hint: str = "") -> None:
    """Load the weights of the model from a file; if something does not fit, the model stays as it was.

    Args:
        new_head: leave the classifier as it is, freshly drawn, whatever the file holds of it.
        hint: what to do if only the classifier differs.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it holds no weights, or those of another model; it names what differs.
    """
    content = read(path)
    own = model.state_dict()
    state = rename(weights_in(path, content), own)
    heads = heads_of(model)

    def of_head(name):
        return name.rpartition(".")[0] in heads

    if new_head:
        state = {name: value for name, value in state.items() if not of_head(name)}
        state |= {name: value for name, value in own.items() if of_head(name)}
    if differing := differences(state, own):
        what = describe_differences(differing, state, own)
        if all(map(of_head, differing)):
            raise CheckpointError(f"{path} has another classifier: {what}. {hint}".strip())
        raise CheckpointError(f"{path} is of another model: {what}.")
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in own.items()}
    try:
        model.load_state_dict(state)
    except Exception as error:  # a module may raise any type for what it cannot take
        model.load_state_dict(before)
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be loaded: {reason}") from error
    logger.info("weights from %s%s", path, f"; drawn anew: {', '.join(heads)}" if new_head else "")
    there, here = stride_of_file(content), stride_of(model)
    if there and here and there != here:
        logger.warning(
            "WARNING: %s is of a network that halves the image in the %s, and this one halves it in the %s. The shapes "
            "are the same, the networks are not: add --stride-in %s.",
            *(path, WORDS[there], WORDS[here], there),
        )


def read(path: str | Path) -> dict[str, Any]:
    """Return what a file holds, without executing code in it.

    Raises:
        FileNotFoundError, CheckpointError: if there is no such file, or it is damaged or no dict.
    """
    if Path(path).suffix == ".safetensors":
        content = _read_safetensors(path)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision and timm save their arguments
            content = checkpoint.read_archive(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not weights by name: save its state_dict().")
    return dict(content)


def _read_safetensors(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        from safetensors.torch import load_file  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise CheckpointError(f"{path} needs safetensors: pip install safetensors.") from None
    try:
        return load_file(path)
    except Exception as error:  # safetensors has a type of its own
        raise CheckpointError(f"{path} is damaged or not a file of safetensors: {error}.") from error


def weights_in(path: str | Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state_dict in what a file holds: all of it, or an entry such as 'model' or 'state_dict'.

    Raises:
        CheckpointError: if there is none.
    """
    state = content
    while inner := [state[name] for name in WITH_WEIGHTS if isinstance(state.get(name), Mapping)]:
        state = inner[0]
    if not state or not all(isinstance(name, str) for name in state) or not _holds_tensors(state):
        there = ", ".join(str(name)[:80] for name in [*content][:10]) or "nothing"
        expected = ", ".join(WITH_WEIGHTS)
        raise CheckpointError(f"{path} holds {there}, and no weights. Expected a state_dict, or one under {expected}.")
    return expanded(dict(state))


def _holds_tensors(state):
    return any(isinstance(value, Tensor) or is_compact(value) for value in state.values())


def rename(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a file under the names that the model has for them.

    Left out are names that wrappers put in front or in between, what they count, and classifiers that only train. What
    files from before torch 0.4.1 lack of a BatchNorm is the model's own.

    >>> rename({"module._orig_mod.fc.weight": 1, "n_averaged": 2}, {"fc.weight": 0})
    {'fc.weight': 1}
    """
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): state[name] for name in state}
    plain = {name: value for name, value in plain.items() if name != "n_averaged" or name in own}
    while own.keys().isdisjoint(plain) and len(firsts := {name.partition(".")[0] for name in plain}) == 1:
        if not firsts <= {*PREFIXES}:
            break
        plain = {name.partition(".")[2]: value for name, value in plain.items()}
    unused = AUXILIARY - {name.partition(".")[0] for name in own}
    plain = {name: value for name, value in plain.items() if name.partition(".")[0] not in unused}
    counts = [name for name in own if name.endswith(".num_batches_tracked") and name not in plain]
    return plain | {name: own[name] for name in counts}


def heads_of(model: nn.Module) -> list[str]:
    """Return the names of the modules that give the classes: timm's own answer, or the last layer that multiplies."""
    names = {module: name for name, module in model.named_modules()}
    if callable(getattr(model, "get_classifier", None)):
        found = model.get_classifier()  # pyright: ignore[reportCallIssue]
        return [names[head] for head in (found if isinstance(found, tuple | list) else [found]) if head in names]
    multiply = [name for module, name in names.items() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    return multiply[-1:]


def stride_of(model: nn.Module) -> str | None:
    """Return which convolution of a ResNet's bottleneck halves the image, '1x1' or '3x3'; None for other networks."""
    block = dict(model.named_modules()).get("layer2.0")
    first, second = getattr(block, "conv1", None), getattr(block, "conv2", None)
    if not hasattr(block, "conv3") or not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Conv2d):
        return None
    return {(2, 1): "1x1", (1, 2): "3x3"}.get((first.stride[0], second.stride[0]))


def stride_of_file(content: Mapping[str, Any]) -> str | None:
    """Return the same of the network whose checkpoint this is; None if the checkpoint does not tell.

    Ours say it. Those that name the network and not its stride are of torchvision or timm, which have one stride.
    """
    args = content.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, Mapping) else {}
    network = args.get("model", content.get("arch", args.get("arch")))
    if not isinstance(network, str):
        return None
    return args.get("stride_in") if network in RESNETS and args.get("stride_in") in WORDS else "3x3"
