"""Checkpoints of named parts, written atomically, loaded without executing code.

save("checkpoint.pt", model=model, optimizer=optimizer, mask=mask, epoch=3)
rest = load("checkpoint.pt", model=model, optimizer=optimizer, mask=mask)
rest["epoch"]
"""

import copy
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = 1
OURS = ("format", "kinds", "random")  # what `save` adds to the parts


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


def save(path: str | Path, **parts: Any) -> None:
    """Write parts and the state of the random-number generators to `path`.

    A part is anything with a `state_dict`, or plain data (numbers, strings, tensors, lists, dicts).

    Raises:
        OSError: if it cannot be written; the file that was there before is untouched then.
    """
    stateful = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
    state = parts | {name: part.state_dict() for name, part in stateful.items()}
    kinds = {name: _kind(part) for name, part in stateful.items()}
    state |= {"format": FORMAT, "kinds": kinds, "random": random_state()}
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: str | Path, device: torch.device | str = "cpu", **parts: Any) -> dict[str, Any]:
    """Load the state of each part from `path`, the random-number generators' too; return the plain data.

    If one of them does not fit, all are left as they were.

    Raises:
        FileNotFoundError: if there is no file.
        CheckpointError: if it is damaged, not a checkpoint, lacks a part, or is of another model or optimizer.
    """
    state = read(path, device)
    _check_fit(path, state, parts)
    generators = SimpleNamespace(state_dict=random_state, load_state_dict=set_random_state)
    changing = {**parts, "random": generators}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in changing.items()}
    for name, part in changing.items():
        try:
            part.load_state_dict(state[name])
        except Exception as error:  # a part raises what it likes for a state that is not its own
            for other, changed in changing.items():
                changed.load_state_dict(before[other])
            raise CheckpointError(f"The {name} of checkpoint {path} does not fit: {error}") from error
    return {name: value for name, value in state.items() if name not in (*parts, *OURS)}


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Load the weights of the model alone; also from a checkpoint of release 1.0, or a saved `state_dict`.

    Raises:
        FileNotFoundError, CheckpointError: as `load`.
    """
    state = read(path)
    _check_fit(path, state, {"model": model})
    model.load_state_dict(state["model"])


def read(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint: part -> state.

    Raises:
        FileNotFoundError: if there is no file.
        CheckpointError: if it is damaged or not a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles that it then refuses
            state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:  # torch's message tells how to execute what is in the file
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint: it is no archive of tensors and plain data."
        ) from None
    except Exception as error:  # torch, zipfile and pickle raise many types for a damaged file
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {first_line or type(error).__name__}.") from None
    if isinstance(state, dict) and "state_dict" in state:  # release 1.0
        return {"model": state["state_dict"], **state}
    if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
        return {"model": state}
    if not isinstance(state, dict) or state.get("format") != FORMAT or "kinds" not in state:
        raise CheckpointError(f"{path} is not a checkpoint of sparselearning (format {FORMAT}).")
    return state


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a scratch file beside `path`, then put it in its place.

    Raises:
        OSError: if that fails; what was at `path` is untouched then, and no scratch file stays.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except RuntimeError as error:
        # torch.save puts its own complaint over the file's.
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
        raise
    finally:
        scratch.unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """Return the state of the generators of torch (CPU and GPUs), numpy and Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what `random_state` returned; GPUs only where their number is the same."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _check_sums(path):
    """Raise if a file in the archive differs from its checksum; torch does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} in it differs from its checksum")


def _check_fit(path, state, parts):
    missing = [name for name in parts if name not in state]
    if missing:
        hint = "" if "format" in state else " To take its weights alone use load_weights, or --sparse-init resume."
        raise CheckpointError(f"Checkpoint {path} holds no {', '.join(missing)}, but {', '.join(state)}.{hint}")
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            _check_same_model(path, state[name], part.state_dict())
        elif state["kinds"].get(name) != _kind(part):
            # Optimizers take each other's state, and fail at the next step.
            kinds = f"{state['kinds'].get(name)} in the file and {_kind(part)} here"
            raise CheckpointError(f"The {name} of checkpoint {path} does not fit: it is {kinds}.")


def _kind(part):
    return getattr(part, "kind", type(part).__name__)


def _check_same_model(path, saved, here):
    if not isinstance(saved, dict):
        raise CheckpointError(f"Checkpoint {path} holds no weights of a model, but a {type(saved).__name__}.")
    shapes = [{name: tuple(getattr(x, "shape", ())) for name, x in state.items()} for state in (saved, here)]
    if shapes[0] == shapes[1]:
        return
    names = [name for name in {**shapes[1], **shapes[0]} if shapes[0].get(name) != shapes[1].get(name)]
    some = "; ".join(
        f"{name} is {shapes[0].get(name, 'absent')} in the file and {shapes[1].get(name, 'absent')} here"
        for name in names[:3]
    )
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    raise CheckpointError(f"Checkpoint {path} is of another model: {some}{more}.")
