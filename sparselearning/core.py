"""Masking: sparse training in any PyTorch loop.

One update (sparse momentum, Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840), as truncate_weights reads:

    k_i = ceil(p_i * nnz_i)                      how many to remove in layer i
    r_i = mean(|M_i| over active) / sum_j        importance of layer i
    m_i <- drop_lowest(|W_i|, m_i, k_i)          prune
    g_i = min(room_i, r_i * sum_j k_j + excess)  redistribute
    m_i <- add_highest(|M_i|, m_i, g_i)          grow
    W_i <- W_i * m_i                             apply
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning import budget, functions, invariants, reports, schedules
from sparselearning.flags import add_sparse_args
from sparselearning.methods import Method, arguments_of, find_function, hold
from sparselearning.processes import agreement
from sparselearning.processes.group import together
from sparselearning.processes.sharded import reshard
from sparselearning.release_1_0 import OldNames
from sparselearning.schedules import CosineDecay, LinearDecay, Schedule, Updates
from sparselearning.start.fit import check_fit
from sparselearning.start.layers import Batches, Density, SparseInit, choose, new_layers, set_budgets
from sparselearning.start.masks import first_dense
from sparselearning.weights import clipping, copies, destroyed
from sparselearning.weights.borrowed import all_momenta
from sparselearning.weights.frozen import training_alone
from sparselearning.weights.optimizer import master_weights
from sparselearning.weights.regrowth import keep_norms
from sparselearning.weights.steps import Steps
from sparselearning.weights.together import optimizer_of
from sparselearning.weights.zeros import Zeros

logger = logging.getLogger(__name__)

__all__ = ["CosineDecay", "LinearDecay", "Masking", "add_sparse_args"]


class Masking(Steps, OldNames):
    """Holds binary masks on the weights of a model and moves them.

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masking = Masking(optimizer, CosineDecay(0.5, epochs * len(loader)))
        masking.add_module(model, density=0.05)
        for epoch in range(1, epochs + 1):
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                masking.step()  # or optimizer.step(): the masks hold either way
            if epoch < epochs:  # weights that grow after the last epoch would stay untrained
                masking.at_end_of_epoch()

    Args:
        optimizer: any torch optimizer, or what wraps one under any attribute, such as SAM or Lookahead; or a list of
            those that step one network, such as [muon, adamw]; the masks move when all have stepped.
        prune_rate_decay: function from the number of optimizer steps to the fraction of active weights that an update
            moves, in [0, 1]; None keeps `prune_rate`.
        prune_rate: that fraction if `prune_rate_decay` is None; not read otherwise.
        prune_mode, growth_mode, redistribution_mode: a key of the tables in prune.py, grow.py and redistribute.py, or
            a function (see functions.py).
        prune_every_k_steps: move the masks after every k optimizer steps; 0: in `at_end_of_epoch`.
        verbose: log the active weights of every layer after an update.
        fp16: require a wrapper that keeps fp32 master weights (Apex's FP16_Optimizer); it is found without asking, too.
        updates: when the masks move, and to which density, in place of `prune_every_k_steps`.
        weights: how weights are held: 'zero'; 'kept' or 'soft', which train inactive weights beside the network
            (weights/dense_copy.py); 'sparse', which trains active weights on sparse kernels (sparse/training.py); or an
            object with settings, such as `Zeros(reset_state=True)` of weights/zeros.py.

    Raises:
        ValueError, TypeError: for an unknown mode, a function or schedule that is none, settings that exclude others.
        RuntimeError: if a function reads a momentum and the optimizer keeps none.

    Weights are changed in place; their storage stays. start/maskable.py says which parameters stay dense.
    """

    def __init__(
        self,
        optimizer: Any,
        prune_rate_decay: Schedule | None,
        prune_rate: float = 0.5,
        prune_mode: str | Callable[..., Any] = "magnitude",
        growth_mode: str | Callable[..., Any] = "momentum",
        redistribution_mode: str | Callable[..., Any] = "momentum",
        prune_every_k_steps: int = 0,
        verbose: bool = False,
        fp16: bool = False,
        updates: Updates | None = None,
        weights: str | Zeros = "zero",
    ):
        super().__init__()
        if updates is not None and prune_every_k_steps:
            raise ValueError("Say updates=Updates(every=k), or prune_every_k_steps=k without updates; not both.")
        self.optimizer, self.stepper = optimizer_of(optimizer)
        self.prune_rate_decay = schedules.decay_of(prune_rate_decay, prune_rate)
        self.updates = updates or Updates(every=prune_every_k_steps or 0)
        self.prune_mode, self.growth_mode, self.redistribution_mode = prune_mode, growth_mode, redistribution_mode
        self.prune = find_function("prune_mode", prune_mode)
        self.grow = find_function("growth_mode", growth_mode)
        self.measure = find_function("redistribution_mode", redistribution_mode)
        self.verbose, self.steps, self.steps_of_last_epoch = verbose, 0, 0
        self._masters = master_weights(optimizer, required=fp16)
        self._gradients_read: list[tuple[Tensor, Tensor]] | None = None  # (weight, gradient) during an update
        self.held = hold(weights, self.optimizer, self.prune, self.grow, self.measure)
        self._watch_steps()

    @classmethod
    def from_method(
        cls,
        method: str | Method,
        module: nn.Module,
        optimizer: Any,
        total_steps: int,
        density: Density = 0.05,
        **parts: Any,
    ) -> "Masking":
        """Return the masks of a published method on `module`, ready to train for `total_steps` optimizer steps.

            masking = Masking.from_method("rigl", model, optimizer, total_steps=epochs * len(loader), density=0.05)

        `density` is that of the end. `parts` replace parts of the method, such as `prune_rate=0.2`, or are arguments of
        Masking and `add_module`, such as `verbose`, `dense` and `batches`; see `methods.arguments_of`.
        """
        of_masking, of_module = arguments_of(method, density, total_steps, parts)
        masking = cls(optimizer, **of_masking)
        masking.add_module(module, **of_module)
        return masking

    # Which weights are sparse

    @together
    def add_module(
        self,
        module: nn.Module,
        density: Density | None = None,
        sparse_init: SparseInit = "constant",
        remove_param_names: Iterable[str] = (),
        sparse_embeddings: bool = False,
        dense: Iterable[str] = (),
        pattern: str | Mapping[str, str] | None = None,
        batches: Batches | None = None,
        rescale: bool = False,
        sparse: Iterable[str] = (),
        state: dict[str, Any] | None = None,
        process_group: Any = None,
    ) -> None:
        """Make the weights of `module` that the optimizer steps sparse; round(density * their number) stay active.

        Another Masking that masks one of them lets go of it. The log warns if a trained network loses many weights.

        Args:
            density: fraction of the maskable weights that stays active, in (0, 1]; or {pattern of names: density}: the
                first that matches a name counts, and weights move among the layers of a pattern (start/names.py).
            sparse_init: 'constant' (one density), 'uniform' (the same, the first layer dense), 'linear' (Erdos-Renyi),
                'erdos_renyi_kernel' or a function from shape to share; 'magnitude', 'magnitude:linear'...: each layer's
                largest; 'receptive_field'; scores by name, or 'snip', 'grasp', 'synflow'; masks by name, or 'resume'.
            remove_param_names: weights whose name contains one of these stay dense; a whole name means that one alone.
            sparse_embeddings: mask embeddings and output layers over their vocabulary too.
            dense: weights that stay dense, as patterns of names; 'first', 'last', 'depthwise' mean those of the module.
            pattern: '2:4', 'block:16x16', 'fan-in', 'neuron': which weights may be active together; or {name: one}.
            batches: (inputs, labels) pairs to score the weights on.
            rescale: enlarge each layer's weights until the active ones have the norm that all had (1% learns then).
            sparse: patterns of names to mask beside the weights of layers that multiply (start/maskable.py).
            state: what `state_dict` returned: its masks are taken in place of new ones, which would set loaded weights
                to zero; density is not read, nor sparse_init but 'uniform'. The rest is loaded with its last layer.
            process_group: who shares the masks, a group or DeviceMesh; None: DDP's group, or all (docs/processes.md).

        Raises:
            ValueError: for a density, names, scores, masks or a pattern that do not fit, or nothing to mask.
            RuntimeError: if this Masking has been released, the state is of another model, or processes differ.
        """
        self._begin(module, process_group, rescale)
        dense, sparse_init = first_dense(dense, sparse_init)
        new, kept_dense = new_layers(self, module, remove_param_names, sparse_embeddings, dense, pattern, sparse)
        layers = self.held.make_real(module, new)
        set_budgets(self, new, density, state)
        check_fit(self, [*self.layers, *layers])
        agreement.check_network(self, layers)
        choose(new, module, density, sparse_init, batches, state)
        invariants.replace_others(self, layers)
        self.held.check(module, layers)
        self._take(module, layers, kept_dense)
        if rescale and state is None:
            keep_norms(layers)
        destroyed.warn_of_masks(self, module, layers, sparse_init, state)
        self.layers[-len(layers) :] = self.held.add(module, layers, self.updates.ahead(self.steps))
        self.apply_mask()
        if state is not None and state["layers"].keys() == self.densities.keys():
            self.load_state_dict(state)
        if self.verbose:
            reports.log_counts(self)

    # Training

    def _after_step(self):
        self.held.after_step(self.layers)
        # A fused optimizer under GradScaler skips an overflowed step inside its kernel, and calls its hooks.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        if self.held.corrects_steps:
            self.held.correct_step(self.layers)
        self.apply_mask()
        if getattr(self.optimizer, "behind", None):  # one of several optimizers has stepped, and others have not
            return
        self.steps += 1
        if self.steps == 1:
            functions.check_momenta(self)
        self.held.stepped(self.updates.ahead(self.steps))
        if self.updates.after_step(self.steps):
            self._update()

    def at_end_of_epoch(self) -> None:
        """Move the masks once, unless steps trigger their updates (`prune_every_k_steps`, `Updates.every`).

        Do not call it after the last epoch: the weights that it grows start at zero, and nothing would train them. The
        log warns if the optimizer has made no step since the last call.
        """
        reports.tell_of_epoch(self)
        self.looks_left = destroyed.LOOKS
        if self.updates.after_epoch(self.steps):
            self._update()

    def _update(self):
        self.truncate_weights()
        if self.verbose:
            reports.log_counts(self)

    def apply_mask(self) -> None:
        """Set all inactive weights to zero, in place; also where they are infinite or NaN."""
        self._follow_weights()
        self.held.apply(self.layers)
        destroyed.remember(self.layers)

    # One update of the masks

    @torch.no_grad()
    @together
    def truncate_weights(self) -> None:
        """Move the masks once: prune, redistribute, grow. The number of active weights stays, or is the schedule's.

        Layers that do not train keep their masks (weights/frozen.py). If a function fails, all masks stay as they were.

        Raises:
            NonFiniteError: if a weight, its momentum, or a gradient that a function reads is NaN or infinite.
            InvariantError: if the module or the optimizer no longer holds a weight, or something trains it unmasked.
        """
        self._refuse_released()
        if not self.layers:
            return
        reshard(self.modules)
        with all_momenta(self, invariants.refuse_update(self)), training_alone(self) as layers:
            functions.check_momenta(self)
            if not layers:
                return
            with invariants.all_or_nothing(self) as before:
                budget.change_density(self.updates.density_at(self.steps), layers)
                for part in self.budgets:
                    with self.only(part):
                        functions.measure(self)
                        self._set_prune_rates()
                        functions.prune(self)
                        if functions.is_marked(self.measure, "after_pruning"):
                            functions.measure(self)
                        functions.grow(self, self._redistribute())
            invariants.keep_last_weights(self, before)
            self.held.moved(layers, before)
        self.apply_mask()
        self.held.updated(self.updates.ahead(self.steps))

    def _set_prune_rates(self):
        rate = budget.rate_at(self.prune_rate_decay, self.steps)
        after_pruning = functions.is_marked(self.measure, "after_pruning")
        for layer, own in zip(self.layers, budget.prune_rates(rate, self.layers, after_pruning), strict=True):
            layer.prune_rate = own

    def _redistribute(self):
        """Return how many weights each layer grows, together as many as their budget lacks."""
        # A user's function may have grown more, or pruned less, than it was asked to.
        lacking = max(self.baseline_nonzero - self.total_nonzero, 0)
        if functions.is_marked(self.measure, "gives_back"):
            return budget.give_back(lacking, self.layers)
        return budget.redistribute(lacking, self.layers, functions.is_marked(self.measure, "in_proportion"))

    def check(self) -> None:
        """Raise an InvariantError unless masks, weights and optimizer belong together; see `invariants.check`.

        A warning says if the density schedule has not arrived.
        """
        invariants.check(self)
        if unfinished := reports.density_to_come(self):
            logger.warning("%s", unfinished)

    # What functions read

    def master_of(self, weight: Tensor) -> Tensor:
        """Return what the optimizer steps for a weight: its fp32 copy in mixed precision, or itself."""
        return self._masters.get(weight, weight)

    def get_momentum_for_weight(self, weight: Tensor) -> Tensor:
        """Return the momentum of a weight, a tensor of its shape; see `weights.optimizer.momentum_of`."""
        return self.held.momentum_of(self.master_of(weight))

    def get_gradient_for_weight(self, weight: Tensor) -> Tensor:
        """Return the gradient of the last step, a tensor of the weight's shape; inactive weights have one, too.

        With weights='sparse' it is the mean of the observed dense gradients. A RuntimeError says why there is none.
        """
        gradient = self.held.gradient_of(self.master_of(weight))
        if self._gradients_read is not None:
            self._gradients_read.append((weight, gradient))
        return gradient

    @property
    def prune_rate(self) -> float:
        """The fraction of active weights that an update would move now."""
        return self.prune_rate_decay(self.steps)

    apply_to, clip_grad_norm_ = copies.apply_to, clipping.clip_grad_norm_
    summary, metrics = reports.summary, reports.metrics

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return masks, counts and steps; plain numbers, strings and copies of tensors."""
        own = {"steps": self.steps, "prune_threshold": self.prune_threshold, "sparse_training": self.held.state_dict()}
        return super().state_dict() | own

    @together
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned, and apply the masks; call `add_module` with the same model before.

        Raises:
            RuntimeError: if the masked weights differ in name or shape; nothing is changed then.
        """
        reshard(self.modules)
        super().load_state_dict(state)
        self.steps = state["steps"]
        self.steps_of_last_epoch = -1  # unknown
        self.held.load_state_dict(state.get("sparse_training", {}), self.layers)
        self.apply_mask()
