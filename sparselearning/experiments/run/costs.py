"""What a run costs in FLOPs, relative to the dense network."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparselearning.core import Masking
from sparselearning.flops import Flops, dense_gradients


def relative_flops(flops: Flops, masking: Masking | None, steps_per_epoch: int) -> dict[str, float]:
    """Return the FLOPs of inference and of training at the present densities, relative to the dense network's."""
    if masking is None:
        return dict(inference_flops=1.0, training_flops=1.0)
    of_growth = dense_gradients(masking.grow, masking.prune_every_k_steps or steps_per_epoch)
    trained = {layer.name: masking.held.trained_density(layer) for layer in masking.layers}
    return dict(
        inference_flops=flops.inference(masking.densities),
        training_flops=flops.training(masking.densities, of_growth, trained),
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
