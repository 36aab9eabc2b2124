"""What a run costs in FLOPs, relative to the dense network."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparselearning.core import Masking
from sparselearning.flops import Flops, dense_gradients


def relative_flops(flops: Flops, mask: Masking | None, steps_per_epoch: int) -> dict[str, float]:
    """Return the FLOPs of inference and of training at the densities of now, relative to the dense network's."""
    if mask is None:
        return dict(inference_flops=1.0, training_flops=1.0)
    of_growth = dense_gradients(mask.grow, mask.prune_every_k_steps or steps_per_epoch)
    trained = {layer.name: mask.held.trained_density(layer) for layer in mask.layers}
    return dict(
        inference_flops=flops.inference(mask.densities),
        training_flops=flops.training(mask.densities, of_growth, trained),
    )


def flops_of_run(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the FLOPs of inference at the end and of training over all epochs, relative to the dense network's."""
    epochs = [record for record in metrics if "training_flops" in record]
    return dict(
        inference_flops=epochs[-1]["inference_flops"],
        training_flops=sum(record["training_flops"] for record in epochs) / len(epochs),
    )


def describe(flops: Flops, relative: dict[str, float]) -> str:
    """Return the line that a run begins and ends with."""
    return (
        f"FLOPs of an image: inference {relative['inference_flops']:.3f}x of {flops.dense:.4g}, training "
        f"{relative['training_flops']:.3f}x of {3 * flops.dense:.4g}"
    )
