# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""Sparse training in `lightning.Trainer`; whole examples: docs/lightning.md."""

from typing import Any

from lightning.pytorch import Callback

from sparselearning.core import Masking
from sparselearning.generators import random_state, set_random_state
from sparselearning.integrations import shared
from sparselearning.methods import Method
from sparselearning.processes import distributed
from sparselearning.start.layers import Density


class SparseCallback(Callback):
    """Trains a LightningModule with the masks of a method; optimization may be automatic or manual.

    The masks move by the method's own steps, or when an epoch begins. They are saved in the Trainer's checkpoints with
    the random numbers of every process, which Lightning does not save; a run that goes on from the end of an epoch, on
    as many processes, equals the uninterrupted one bit by bit. `masking` is the Masking, once training has begun.

    Args:
        method: a key of `methods.METHODS`, or a `Method`.
        density: fraction of the masked weights that is active at the end, in (0, 1].
        optimizer: which of the module's optimizers steps the weights; each takes a callback of its own.
        total_steps: steps of the optimizer; None takes the Trainer's estimate, one for each batch or accumulation.
        parts: parts of the method, and arguments of Masking and `add_module`; see `methods.arguments_of`.

    At the end of every epoch `density` is logged, and `inference_flops` and `training_flops` relative to the dense
    network if the module has an `example_input_array`. Names of a second optimizer end with `_1`.

    Raises:
        RuntimeError: when training begins, if the checkpoint has no masks, or processes divide the weights (FSDP).
        ValueError: if the optimizer or the number of steps is not known.
    """

    masking: Masking
    loaded: Any = None  # from the checkpoint that training goes on from

    def __init__(
        self,
        method: str | Method = "sparse_momentum",
        density: Density = 0.05,
        *,
        optimizer: int | None = None,
        total_steps: int | None = None,
        **parts: Any,
    ):
        self.method, self.density, self.parts = method, density, parts
        self.optimizer, self.total_steps = optimizer, total_steps
        self.suffix = f"_{optimizer}" if optimizer else ""
        self.key = f"sparselearning{self.suffix}"

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if hasattr(self, "masking"):
            checkpoint[self.key] = {"masking": self.masking.state_dict(), "random": distributed.gather(random_state())}

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.loaded = checkpoint.get(self.key)
        # Now, because a loader draws its first ones as soon as someone asks for the number of steps.
        if self.loaded and trainer.training and len(self.loaded["random"]) == trainer.world_size:
            set_random_state(self.loaded["random"][trainer.global_rank])

    def on_train_start(self, trainer, pl_module):
        divided = trainer.strategy.restore_checkpoint_after_setup
        shared.refuse_shards(pl_module, type(trainer.strategy).__name__ if divided else "")
        saved = self._earlier(trainer, pl_module)
        if trainer.ckpt_path:
            saved = shared.masks_in(self.loaded, "call fit() without ckpt_path")
        steps = shared.known_steps(self.total_steps or trainer.estimated_stepping_batches)
        chosen = _chosen(trainer.optimizers, self.optimizer)
        self.flops = shared.count_flops(pl_module, pl_module.example_input_array)
        self.masking = shared.start(self.method, pl_module, chosen, steps, self.density, self.parts, saved)
        self.steps_per_epoch = steps // max(trainer.max_epochs or 1, 1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 and self.masking.steps:
            self.masking.at_end_of_epoch()

    def on_train_epoch_end(self, trainer, pl_module):
        new = shared.figures(self.masking, self.flops, self.steps_per_epoch)
        pl_module.log_dict({f"{name}{self.suffix}": value for name, value in new.items()}, sync_dist=True)

    def _earlier(self, trainer, module):
        """Return the masks of an earlier `fit` of this module; at step 0 if the Trainer is a new one."""
        if not hasattr(self, "masking") or self.masking.modules != [module]:
            return None
        return shared.release(self.masking) | ({} if trainer.global_step else {"steps": 0})


def _chosen(optimizers, index):
    index = 0 if index is None and len(optimizers) == 1 else index
    if index not in range(len(optimizers)):
        numbers = ", ".join(map(str, range(len(optimizers))))
        raise ValueError(f"Expected optimizer to be one of {numbers}, got {index}. Each takes a callback of its own.")
    return optimizers[index]
