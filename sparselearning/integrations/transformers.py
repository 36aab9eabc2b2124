# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""Sparse training in `transformers.Trainer`.

    Trainer(model, args, train_dataset=data, callbacks=[SparseCallback("rigl", density=0.1)]).train()

Whole examples: docs/trainer.md.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparselearning.core import Masking
from sparselearning.generators import random_state, set_random_state
from sparselearning.integrations import shared
from sparselearning.methods import Method
from sparselearning.start.layers import Density
from sparselearning.weights.optimizer import torch_optimizer

KEY = "sparselearning"  # of the masks, in the first group of the optimizer's saved state


class SparseCallback(TrainerCallback):
    """Trains the Trainer's model with the masks of a method; the number of steps is the Trainer's.

    The masks move by the method's own steps, or when an epoch begins. They are saved in `optimizer.pt` of the Trainer's
    checkpoints; a run that goes on from one equals the uninterrupted run bit by bit, as far as the Trainer's own does.
    `masking` is the Masking, once training has begun. A second `train()` goes on with the masks of the first.

    Args:
        method: a key of `methods.METHODS`, or a `Method`.
        density: fraction of the masked weights that is active at the end, in (0, 1].
        example: inputs of the model by name, to count FLOPs on; None takes the first example of the training data, and
            counts none of data without indices (an IterableDataset).
        parts: parts of the method, and arguments of Masking and `add_module`; see `methods.arguments_of`.

    The training records of the Trainer's log have `density`, `inference_flops` and `training_flops`, the last two
    relative to the dense network.

    Raises:
        RuntimeError: when training begins, if the checkpoint has no masks, or processes divide the weights (FSDP).
    """

    masking: Masking

    def __init__(
        self, method: str | Method = "sparse_momentum", density: Density = 0.05, *, example: Any = None, **parts: Any
    ):
        self.method, self.density, self.example, self.parts = method, density, example, parts

    def on_train_begin(self, args, state, control, model: Any = None, optimizer=None, train_dataloader=None, **_):
        shared.refuse_shards(model, "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else "")
        inner = torch_optimizer(optimizer)
        self.resumed, self.state = inner.param_groups[0].pop(KEY, None), state
        if self.resumed and self.resumed["step"] != state.global_step:
            self.resumed = None  # a dense run took them along, and changed the weights
        saved = self._earlier(model)
        if state.global_step:
            saved = shared.masks_in(self.resumed, "call train() without resume_from_checkpoint")
        self.flops = shared.count_flops(model, self.example or shared.first_example(train_dataloader))
        self.masking = shared.start(self.method, model, inner, state.max_steps, self.density, self.parts, saved)
        self.saving = inner.register_state_dict_post_hook(self._save)

    def on_epoch_begin(self, args, state, control, **_):
        # The Trainer calls this in the middle of an epoch, too, if it goes on there, and sets the random numbers later.
        resumed, self.resumed = self.resumed, None
        if not state.global_step or (resumed and not float(state.epoch).is_integer()):
            return
        with shared.same_random_numbers():
            if resumed:
                set_random_state(resumed["random"])
            self.masking.at_end_of_epoch()

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            logs |= shared.figures(self.masking, self.flops, state.max_steps // max(state.num_train_epochs, 1))
            state.log_history[-1] |= logs

    def on_train_end(self, args, state, control, **_):
        path = Path(state.best_model_checkpoint or "", "optimizer.pt")
        if args.load_best_model_at_end and path.exists():
            groups = torch.load(path, map_location="cpu", weights_only=True)["param_groups"]
            self.masking.load_state_dict(groups[0][KEY]["masking"])

    def _save(self, optimizer, state):
        saved = {"masking": self.masking.state_dict(), "random": random_state(), "step": self.state.global_step}
        state["param_groups"][0][KEY] = saved

    def _earlier(self, model):
        """Return the masks of an earlier `train()` of this model, at step 0; None if there are none."""
        if not hasattr(self, "masking") or self.masking.modules != [model]:
            return None
        self.saving.remove()
        return shared.release(self.masking) | {"steps": 0}
