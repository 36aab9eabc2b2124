"""What a run costs in FLOPs, relative to the dense network."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparselearning.flops import Flops


def flops_of_run(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the FLOPs of inference at the end and of training over all epochs, relative to the dense network's."""
    epochs = [record for record in metrics if "training_flops" in record]
    return dict(
        inference_flops=epochs[-1]["inference_flops"],
        training_flops=sum(record["training_flops"] for record in epochs) / len(epochs),
    )


def describe(flops: Flops, relative: dict[str, float], example: str = "an image") -> str:
    """Return the line that a run begins and ends with; `example` is what the FLOPs are those of."""
    return (
        f"FLOPs of {example}: inference {relative['inference_flops']:.3f}x of {flops.dense:.4g}, training "
        f"{relative['training_flops']:.3f}x of {3 * flops.dense:.4g}"
    )
