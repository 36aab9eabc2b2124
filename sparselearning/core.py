"""Masking: sparse training in any PyTorch loop.

One update of the masks (sparse momentum, Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840):

    k_i = ceil(p_i * nnz_i)                      how many to remove in layer i
    r_i = mean(|M_i| over active) / sum_j        importance of layer i
    m_i <- drop_lowest(|W_i|, m_i, k_i)          prune
    g   = apportion(sum_i k_i, r, room)          redistribute
    m_i <- add_highest(|M_i|, m_i, g_i)          grow
    W_i <- W_i * m_i                             apply

`Masking.truncate_weights` reads in this order.

Where the density changes over time (`density_schedule`), n = round(density(step) * size) weights are to be active
after an update, and each layer's share of the change is c_i = +-apportion(|n - sum nnz|, nnz, room). What the density
falls by is pruned first, k_i = -c_i + ceil(p_i * (nnz_i + c_i)); after pruning, the network grows as many weights as
it then lacks: what was pruned, less what the density fell by, or more where it rose.
"""

import gc
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from sparselearning import invariants
from sparselearning.flags import add_sparse_args
from sparselearning.functions import FunctionError, is_network_wide, measures_after_pruning, resolve
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.layers import SparseLayer
from sparselearning.methods import Method, find_method, masking_arguments
from sparselearning.native.zero import zero_inactive
from sparselearning.patterns import UNSTRUCTURED, patterns_for, with_most, with_pattern
from sparselearning.processes import distributed
from sparselearning.processes.sharded import add_up, count_active, is_sharded, reshard, shard_of
from sparselearning.prune import PRUNE_FUNCTIONS, count_of
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS, no_redistribution
from sparselearning.schedules import Constant, CosineDecay, LinearDecay
from sparselearning.selection import apportion, drop_lowest_jointly
from sparselearning.sparse.training import SparseTraining
from sparselearning.start.distributions import none_empty
from sparselearning.start.maskable import canonical_name, maskable_parameters
from sparselearning.start.masks import Density, SparseInit, initial_masks
from sparselearning.start.names import named
from sparselearning.start.scores import SCORES, Batches, scores_of
from sparselearning.weights.dense_copy import INACTIVE
from sparselearning.weights.optimizer import gradient_of, keeps_momentum, master_weights, momentum_of, torch_optimizer
from sparselearning.weights.regrowth import START_VALUES, keep_norms, pull_to_zero, start_regrown

__all__ = ["CosineDecay", "LinearDecay", "Masking", "add_sparse_args"]

logger = logging.getLogger(__name__)

Schedule = Callable[[int], float]
MASKINGS: weakref.WeakSet["Masking"] = weakref.WeakSet()  # all there are, so that no two mask one weight


class Masking:
    """Holds binary masks on the weights of a model and moves them.

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        mask = Masking(optimizer, CosineDecay(0.5, epochs * len(loader)))
        mask.add_module(model, density=0.05)
        for epoch in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                mask.step()  # or optimizer.step(): the masks hold either way
            mask.at_end_of_epoch()

    Args:
        optimizer: any torch optimizer (or a wrapper that holds one as `.optimizer`).
        prune_rate_decay: function from the number of optimizer steps to the fraction of active weights
            that an update moves, in [0, 1]; None keeps `prune_rate`.
        prune_rate: the constant rate where there is no `prune_rate_decay`.
        prune_mode, growth_mode, redistribution_mode: a key of the tables in prune.py, grow.py and
            redistribute.py, or a function (see functions.py).
        prune_every_k_steps: move the masks after every k optimizer steps, and not at the end of an epoch; 0 leaves
            it to `at_end_of_epoch`.
        verbose: log the active weights of every layer after an update.
        fp16: the model is in half precision and the optimizer wrapper keeps fp32 master weights
            (Apex's FP16_Optimizer); found without asking where the wrapper shows them.
        sparse_backend: 'cpu' trains linear and convolution layers on the sparse kernels, in time that follows
            their active weights; sparse/training.py says how its momentum differs from the paper's.
        density_schedule: function from the number of optimizer steps to the density that an update leaves, in
            (0, 1]; None keeps the density of `add_module`.
        first_update, last_update: optimizer steps before and after which the masks stay. At the step `last_update`
            itself there is always an update, so that a density schedule arrives.
        reset_state: set the optimizer's state of a weight to zero when it becomes active.
        regrown: what a weight is when it becomes active: 'zero', or 'random', as torch initialises layers.
        rescale: enlarge the weights of every layer at the start, so that its norm is what it was without masks. A
            network of a few percent may not learn otherwise: its signal fades from layer to layer.
        pull: how strongly active weights are pulled to zero, added to their gradients before every step.
        inactive: what becomes of a weight that leaves: 'zero' forgets its value; 'kept' and 'soft' keep and train it
            beside the network, which does not see it (see dense_copy.py).

    Raises:
        ValueError: for an unknown mode, or settings that do not go together.
        TypeError: for a function of the wrong shape, a schedule or an optimizer that is none.
        RuntimeError: if a mode needs a momentum and the optimizer keeps none.

    Weights are changed in place, their storage never. Biases, normalisation parameters, every other 1-d
    parameter, embeddings and frozen weights stay dense.
    """

    def __init__(
        self,
        optimizer: Any,
        prune_rate_decay: Schedule | None,
        prune_rate: float = 0.5,
        prune_mode: str | Callable = "magnitude",
        growth_mode: str | Callable = "momentum",
        redistribution_mode: str | Callable = "momentum",
        prune_every_k_steps: int = 0,
        verbose: bool = False,
        fp16: bool = False,
        sparse_backend: str | None = None,
        density_schedule: Schedule | None = None,
        first_update: int = 0,
        last_update: int | None = None,
        reset_state: bool = False,
        regrown: str = "zero",
        rescale: bool = False,
        pull: float = 0.0,
        inactive: str = "zero",
    ):
        if prune_rate_decay is not None and not callable(prune_rate_decay):
            raise TypeError(
                "Expected prune_rate_decay to be a function of the step, such as CosineDecay(0.5, T_max=1000), "
                f"got {prune_rate_decay!r}. A constant rate is prune_rate_decay=None and prune_rate=0.5."
            )
        if not 0 <= pull < math.inf:
            raise ValueError(f"Expected a pull of at least 0, got {pull}.")
        if regrown not in START_VALUES:
            raise ValueError(f"Unknown regrown {regrown!r}. Choose one of {', '.join(map(repr, START_VALUES))}.")
        if inactive not in INACTIVE:
            raise ValueError(f"Unknown inactive {inactive!r}. Choose one of {', '.join(map(repr, INACTIVE))}.")
        if inactive != "zero" and sparse_backend is not None:
            raise ValueError(f"inactive={inactive!r} trains inactive weights; leave out sparse_backend.")
        if rescale and inactive != "zero":
            raise ValueError(
                f"With inactive={inactive!r} weights are active for their magnitude, and need no rescale; leave it out."
            )
        self.optimizer = torch_optimizer(optimizer)
        self.stepper = optimizer
        self.prune_rate_decay = Constant(prune_rate) if prune_rate_decay is None else prune_rate_decay
        self.prune_mode, self.prune = prune_mode, resolve("prune_mode", prune_mode, PRUNE_FUNCTIONS)
        self.growth_mode, self.grow = growth_mode, resolve("growth_mode", growth_mode, GROWTH_FUNCTIONS)
        self.redistribution_mode = redistribution_mode
        self.measure = resolve("redistribution_mode", redistribution_mode, REDISTRIBUTION_FUNCTIONS)
        self.prune_every_k_steps = prune_every_k_steps
        self.density_schedule = density_schedule
        self.first_update, self.last_update = first_update, last_update
        self.reset_state, self.regrown, self.rescale = reset_state, regrown, rescale
        self.pull, self.inactive, self.dense_copy = pull, inactive, INACTIVE[inactive]
        self.verbose = verbose
        self.modules: list[nn.Module] = []
        self.layers: list[SparseLayer] = []
        self.steps = 0
        self.baseline_nonzero = 0  # active weights the network keeps
        self.prune_threshold = 0.001  # of prune_mode="threshold"
        self.tolerance = 0.02
        # By the functions of an update, by the layer's name, while there is one.
        self._gradients_read: list[tuple[str, Tensor]] | None = None
        self._masters = master_weights(optimizer, required=fp16)
        modes = (growth_mode, redistribution_mode)
        if any("momentum" in mode for mode in modes if isinstance(mode, str)):
            keeps_momentum(self.optimizer, required=True)
        self.sparse_training = SparseTraining(self.optimizer, sparse_backend, reset_state)
        self._watch_steps()
        MASKINGS.add(self)

    @classmethod
    def from_method(
        cls,
        method: str | Method,
        module: nn.Module,
        optimizer: Any,
        total_steps: int,
        density: Density = 0.05,
        remove_param_names: Iterable[str] = (),
        sparse_embeddings: bool = False,
        dense: Iterable[str] = (),
        batches: Batches | None = None,
        verbose: bool = False,
        fp16: bool = False,
        sparse_backend: str | None = None,
        **parts: Any,
    ) -> "Masking":
        """Return the masks of a published method on `module`, ready to train for `total_steps` optimizer steps.

            mask = Masking.from_method("rigl", model, optimizer, total_steps=epochs * len(loader), density=0.05)

        Args:
            method: a key of `methods.METHODS`, or a `Method`.
            density: of the masks, at the end where the method changes it.
            batches: (inputs, labels) pairs, for the methods that score weights before training: 'snip', 'grasp' and
                'synflow'.
            remove_param_names, sparse_embeddings, dense: as `add_module` takes them; the others as `Masking` does.
            parts: parts of the method to take otherwise: `prune_rate=0.2`, `growth="random"`; see `Method`.

        Raises:
            ValueError: for an unknown method, no batches where it needs some, or densities of single layers where the
                method changes the density.
            TypeError: for an unknown part.
        """
        chosen = find_method(method, **parts)
        settings = masking_arguments(chosen, density, total_steps)
        masking = cls(optimizer, **settings, verbose=verbose, fp16=fp16, sparse_backend=sparse_backend)
        start = chosen.density_at_start(density)
        layers = (remove_param_names, sparse_embeddings, dense)
        masking.add_module(module, start, chosen.sparse_init, *layers, chosen.pattern, batches)
        return masking

    def _watch_steps(self):
        if self.dense_copy or self.pull:
            self.optimizer.register_step_pre_hook(lambda _, *given: self._before_step(*given))
        self.optimizer.register_step_post_hook(lambda *_: self._after_step())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy (deepcopy, pickle): an optimizer's copy has lost its hooks, and would train unmasked."""
        self.__dict__.update(state)
        self._watch_steps()
        MASKINGS.add(self)

    # Which weights are sparse

    def add_module(
        self,
        module: nn.Module,
        density: Density,
        sparse_init: SparseInit = "constant",
        remove_param_names: Iterable[str] = (),
        sparse_embeddings: bool = False,
        dense: Iterable[str] = (),
        pattern: str | None = None,
        batches: Batches | None = None,
    ) -> None:
        """Make the weights of `module` sparse: round(density * their number) stay active, drawn at random.

        Weights that the optimizer does not step stay dense.

        Args:
            density: fraction of the maskable weights that stays active, in (0, 1]; or one for each pattern of names,
                such as {"fc*": 0.02, "*": 0.1}, where the first that matches counts (see names.py).
            sparse_init: how they are divided among layers: 'constant' (the same density), 'linear'
                (Erdos-Renyi), 'erdos_renyi_kernel', a function from a weight's shape to its share; scores by
                name, of which the highest stay, or 'snip', 'grasp' or 'synflow', which score the weights on `batches`
                (see before_training.py); masks (bool) by name, or 'resume', which takes the nonzero weights as they
                are, and both ignore `density`.
            remove_param_names: weights whose name contains one of these (or this string) stay dense; the whole name
                of a weight means that one alone.
            sparse_embeddings: mask embeddings too.
            dense: weights that stay dense, as patterns of names; 'first' and 'last' are those of the module.
            pattern: which weights may be active together: 'N:M' such as '2:4', 'block:RxC', 'fan-in', 'fan-in:G',
                'neuron' (see patterns.py); None or 'unstructured' for any.
            batches: (inputs, labels) pairs to score the weights on.

        Raises:
            ValueError: for a density outside (0, 1] or so small that no weight stays, an unknown `sparse_init`,
                scores or masks that do not fit, a name that matches no weight, a pattern that does not fit a weight or
                the functions, or nothing to mask.
            RuntimeError: if another Masking masks one of the weights.
        """
        reshard([module])
        skip = (remove_param_names,) if isinstance(remove_param_names, str) else tuple(remove_param_names)
        new = self._new_layers(module, skip, sparse_embeddings, dense)
        self._refuse_second_masks(new.values())
        if not new:
            raise ValueError(
                f"{type(self.optimizer).__name__} steps no weight of {type(module).__name__} that could be masked "
                "and is not yet. Build the optimizer from the module's parameters, and add the module once."
            )
        for name, kind in patterns_for(pattern, {name: layer.mask.shape for name, layer in new.items()}).items():
            with_pattern(new[name].mask, kind)
        self._check_patterns_fit(new.values())
        if sparse_init == "resume":
            sparse_init = {name: layer.master != 0 for name, layer in new.items()}
        elif isinstance(sparse_init, str) and sparse_init in SCORES:
            others = [name for name, _ in maskable_parameters(module) if name not in new]
            sparse_init = scores_of(sparse_init, module, batches, density, others)
        if isinstance(sparse_init, Mapping) and distributed.in_process_group():
            sparse_init = {name: _from_first_process(tensor) for name, tensor in sparse_init.items()}
        masks = initial_masks({name: layer.mask for name, layer in new.items()}, density, sparse_init)
        for name, layer in new.items():
            layer.mask.copy_(masks[name])
        self.modules.append(module)
        self.layers += new.values()
        self._agree_and_count()
        self._check_agreement()
        self.baseline_nonzero = self.total_nonzero + sum(layer.left_over for layer in self.layers)
        if self.rescale:
            keep_norms(new.values())
        if self.dense_copy:
            self.dense_copy.add(self, list(new.values()))
        self.sparse_training.add(module, list(new.values()), *self._update_ahead())
        self.apply_mask()
        if self.verbose:
            self.print_nonzero_counts()

    def _check_patterns_fit(self, new):
        layers = [*self.layers, *new]
        patterned = [layer for layer in layers if layer.pattern != UNSTRUCTURED]
        if not patterned:
            return
        name = patterned[0].pattern.name
        if any(is_sharded(layer.mask) for layer in layers):
            raise ValueError(
                f"The pattern {name!r} needs whole weights, got sharded ones. Use DistributedDataParallel."
            )
        sizes = sorted({layer.pattern.size for layer in layers})
        in_prune, in_grow = (getattr(function, "single_weights", False) for function in (self.prune, self.grow))
        if in_grow or (in_prune and sizes[-1] > 1):
            mode = f"growth_mode={self.growth_mode!r}" if in_grow else f"prune_mode={self.prune_mode!r}"
            raise ValueError(f"{mode} moves single weights, and the pattern {name!r} does not let it. Choose another.")
        if self.density_schedule is not None and (len(sizes) > 1 or patterned[0].pattern.even):
            raise ValueError(f"The pattern {name!r} keeps the density of each layer; leave out the density_schedule.")
        across = self.measure is not no_redistribution or is_network_wide(self.prune) or is_network_wide(self.grow)
        if len(sizes) > 1 and across:
            raise ValueError(
                f"The units of pattern {name!r} have {', '.join(map(str, sizes))} weights in different layers, so none "
                "can move from one layer to another. Use redistribution_mode='none', and prune and grow layer by layer."
            )

    def _refuse_second_masks(self, new):
        weights = {id(layer.weight) for layer in new}

        def masked_elsewhere():
            layers = (layer for other in MASKINGS if other is not self for layer in other.layers)
            return [layer.name for layer in layers if id(layer.weight) in weights]

        if masked_elsewhere():
            gc.collect()  # an optimizer and a Masking that nobody holds any more hold each other
        if names := masked_elsewhere():
            raise RuntimeError(
                f"Another Masking masks {', '.join(names)}; two would undo each other's masks. Use that one, or call "
                "its remove_weight_partial_name('') first."
            )

    def _new_layers(self, module, skip, sparse_embeddings, dense):
        """Return the layers to be masked, by the name that a weight has in its module."""
        known = {id(layer.weight) for layer in self.layers}
        stepped = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        taken = set(self.masks)
        layers = {}
        weights = dict(maskable_parameters(module, sparse_embeddings=sparse_embeddings))
        parts = [part for part in skip if part not in weights]
        kept_dense = {*skip, *named(list(weights), dense)}
        for own_name, weight in weights.items():
            name, master = own_name, self._masters.get(weight, weight)
            if id(weight) in known or id(master) not in stepped:
                continue
            if own_name in kept_dense or any(part in own_name for part in parts):
                continue
            while name in taken:  # a second module may use the names of the first
                name = f"{len(self.modules)}.{name}"
            taken.add(name)
            mask = torch.zeros_like(weight, dtype=torch.bool)
            layers[own_name] = SparseLayer(name, weight, master, mask, mask.clone())
        return layers

    def remove_weight(self, name: str) -> None:
        """Train the weight (or the layer) of this exact name densely from now on; its pruned entries start at zero.

        To keep a layer's initial values, name it in `add_module(remove_param_names=...)` instead.

        Raises:
            KeyError: if no masked weight has this name.
        """
        names = {canonical_name(name), f"{canonical_name(name)}.weight"}
        if names.isdisjoint(self.masks):
            raise KeyError(f"No masked weight is called {name!r}. There are {', '.join(self.masks)}.")
        self._remove(lambda layer: layer.name in names)

    def remove_weight_partial_name(self, partial_name: str) -> None:
        """Train the weights whose name contains `partial_name` densely from now on."""
        self._remove(lambda layer: partial_name in layer.name)

    def remove_type(self, nn_type: type[nn.Module] | tuple[type[nn.Module], ...]) -> None:
        """Train the weights held directly by modules of this type densely from now on."""
        owned = {
            id(parameter)
            for root in self.modules
            for module in root.modules()
            if isinstance(module, nn_type)
            for parameter in module.parameters(recurse=False)
        }
        self._remove(lambda layer: id(layer.weight) in owned)

    def _remove(self, unwanted):
        removed = [layer for layer in self.layers if unwanted(layer)]
        self.layers = [layer for layer in self.layers if not unwanted(layer)]
        self.baseline_nonzero -= sum(layer.nonzeros + layer.left_over for layer in removed)
        self.sparse_training.release(removed)
        for layer in removed:
            logger.info("%s stays dense: %d weights.", layer.name, layer.mask.numel())

    # Training

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's, so that GradScaler.step(mask) takes a Masking. LR schedulers take the optimizer."""
        return self.stepper.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the optimizer does."""
        # Apex's FP16_Optimizer names the argument otherwise, or has none.
        self.stepper.zero_grad(*(() if set_to_none else (False,)))

    def step(self, closure: Callable | None = None) -> Any:
        """Step the optimizer; the masks are applied right after, as after any step of the optimizer."""
        return self.stepper.step() if closure is None else self.stepper.step(closure)

    @torch.no_grad()
    def _before_step(self, args, kwargs):
        self._follow_devices()
        if self.pull:
            pull_to_zero([self.sparse_training.stepped_for(layer) for layer in self.layers], self.pull, self.optimizer)
        if self.dense_copy:
            self.dense_copy.before_step(self, closure=args[1] if len(args) > 1 else kwargs.get("closure"))

    def _after_step(self):
        if self.dense_copy:
            self.dense_copy.after_step(self)
        # A fused optimizer under GradScaler skips an overflowed step inside its kernel, and calls its hooks.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        self.steps += 1
        self.apply_mask()
        self.sparse_training.stepped(*self._update_ahead())
        every_k = self.prune_every_k_steps and self.steps % self.prune_every_k_steps == 0
        if self.steps == self.last_update or (every_k and self._masks_may_move()):
            self._update()

    def at_end_of_epoch(self) -> None:
        """Move the masks once, unless `prune_every_k_steps` says when they move."""
        if not self.prune_every_k_steps and self._masks_may_move():
            self._update()

    def _masks_may_move(self):
        return self.first_update <= self.steps and (self.last_update is None or self.steps < self.last_update)

    def _update_ahead(self):
        """Return in how many steps the next update is due to them (or infinity), and whether all updates are."""
        left = [math.inf]
        if self.prune_every_k_steps:
            left.append(self.prune_every_k_steps - self.steps % self.prune_every_k_steps)
        if self.last_update is not None:
            left.append(self.last_update - self.steps if self.steps < self.last_update else math.inf)
        return min(left), self.prune_every_k_steps > 0

    def _update(self):
        self.truncate_weights()
        if self.verbose:
            self.print_nonzero_counts()

    def apply_mask(self) -> None:
        """Set all inactive weights to zero, in place; also where they are infinite or NaN."""
        self._follow_devices()
        masked = self.sparse_training.apply(self.layers)
        halves = [layer for layer in masked if layer.weight is not layer.master]
        tensors = [layer.master for layer in masked] + [layer.weight for layer in halves]
        zero_inactive(tensors, [layer.mask for layer in [*masked, *halves]])

    def _follow_devices(self):
        for layer in self.layers:
            if layer.mask.device != layer.weight.device:  # the model was moved
                layer.mask = with_pattern(layer.mask.to(layer.weight.device), layer.pattern)
                layer.ever_active = layer.ever_active.to(layer.weight.device)
                layer.memory = {key: value.to(layer.weight.device) for key, value in layer.memory.items()}

    # One update of the masks

    @torch.no_grad()
    def truncate_weights(self) -> None:
        """Move the masks once: prune, redistribute, grow. The number of active weights stays, or is the schedule's.

        If a function fails, the masks are as before.

        Raises:
            NonFiniteError: if a weight, its momentum, or a gradient that a function reads is NaN or infinite.
            InvariantError: if the module or the optimizer no longer holds a weight, or something trains it unmasked.
        """
        if not self.layers:
            return
        reshard(self.modules)
        invariants.refuse_strangers(self)
        invariants.refuse_bad_values(self)
        self._check_agreement()
        before = [layer.mask.clone() for layer in self.layers]
        self._gradients_read = []
        try:
            change = self._change_density()
            self._measure_importance()
            self._set_prune_rates(change)
            self._prune_weights()
            if measures_after_pruning(self.measure):
                self._measure_importance()
            self._grow_weights(self._redistribute(change))
            invariants.refuse_bad_gradients(self._gradients_read)
        except BaseException:
            for layer, mask in zip(self.layers, before, strict=True):
                layer.mask.copy_(mask)
            self._count()
            raise
        finally:
            self._gradients_read = None
        self._agree_and_count()
        start_regrown(self, before)
        if self.dense_copy:
            self.dense_copy.follow(self.layers)
        self.apply_mask()
        self.sparse_training.updated(*self._update_ahead())

    def _change_density(self):
        """Set how many weights are to be active; return how many more (or, negative, fewer) in each layer."""
        if self.density_schedule is None:
            return [0] * len(self.layers)
        density = self.density_schedule(self.steps)
        if not 0 < density <= 1:
            raise ValueError(f"Expected a density in (0, 1] at step {self.steps}, got {density} of density_schedule.")
        unit = self._unit()
        units = round(density * (self.total_nonzero + self.total_zero) / unit)
        self.baseline_nonzero = units * unit
        active = [layer.nonzeros // unit for layer in self.layers]
        room = [layer.room // unit for layer in self.layers]
        rise = units - sum(active)
        if rise > sum(room):
            raise ValueError(f"density_schedule asks for a density of {density}, which is more than the pattern holds.")
        change = [-fall for fall in apportion(-rise, active, active)] if rise < 0 else apportion(rise, active, room)
        return [more * unit for more in change]

    def _unit(self):
        """Return how many weights move together; 1 where layers differ, and exchange none."""
        sizes = {layer.pattern.size for layer in self.layers}
        return sizes.pop() if len(sizes) == 1 else 1

    def _measure_importance(self):
        measured = [self._measure(layer) for layer in self.layers]
        # NaN (a layer without active weights) and negative importance count as none.
        importance = [max(value, 0.0) if value == value else 0.0 for value in _to_numbers(measured)]
        total = sum(importance)
        if total == math.inf:
            name = self.layers[importance.index(max(importance))].name
            raise ValueError(f"{name} has importance inf; expected a finite number. Training has probably diverged.")
        for layer, value in zip(self.layers, importance, strict=True):
            layer.importance = value / total if total else 1 / len(self.layers)

    def _measure(self, layer):
        value = self.measure(self, layer.name, layer.master, layer.mask)
        if isinstance(value, SupportsFloat) and (not isinstance(value, Tensor) or value.numel() == 1):
            return value
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise FunctionError(f"Expected the importance of {layer.name}, a number or a 0-d tensor, got {came}.")

    def _set_prune_rates(self, change):
        rate = self.prune_rate
        if not 0 <= rate <= 1:
            raise ValueError(f"Expected a prune rate in [0, 1] at step {self.steps}, got {rate} of prune_rate_decay.")
        for layer, more in zip(self.layers, change, strict=True):
            layer.prune_rate = rate
            sparsity = 1 - layer.density
            # A nearly dense layer that is still growing would only prune what it regrows.
            if sparsity < 0.2 and layer.importance > 1 / len(self.layers):
                layer.prune_rate = min(rate, sparsity)
            if more < 0:
                kept = layer.nonzeros + more
                layer.prune_rate = (count_of(layer.prune_rate, kept) - more) / layer.nonzeros

    def _prune_weights(self):
        if is_network_wide(self.prune):
            self._replace_masks(self.prune(self))
        else:
            for layer in self.layers:
                self._replace(layer, self.prune(self, layer.mask, layer.master, layer.name))
        self._check_patterns("prune_mode", self.prune_mode, lambda layer: layer.pattern.whole(layer.mask))
        nonzeros = [layer.nonzeros for layer in self.layers]
        self._count()
        if self.density_schedule is not None and self.total_nonzero > self.baseline_nonzero:
            self._prune_excess()
        for layer, count in zip(self.layers, nonzeros, strict=True):
            layer.removed = count - layer.nonzeros

    def _prune_excess(self):
        """Drop the smallest weights that a function, which has its own mind, left beyond the schedule's density."""
        scores, masks = [layer.master.abs() for layer in self.layers], [layer.mask for layer in self.layers]
        excess = self.total_nonzero - self.baseline_nonzero
        for layer, mask in zip(self.layers, drop_lowest_jointly(scores, masks, excess), strict=True):
            layer.mask.copy_(mask)
        self._count()

    def _redistribute(self, change):
        """Return how many weights each layer grows, together as many as the network lacks."""
        # A user's function may have grown more, or pruned less, than it was asked to.
        unit = self._unit()
        lacking = max(self.baseline_nonzero - self.total_nonzero, 0) // unit
        if self.measure is no_redistribution:
            shares = [
                layer.room if layer.pattern.ablation else max(layer.removed + more, 0)
                for layer, more in zip(self.layers, change, strict=True)
            ]
            room = [layer.room // unit for layer in self.layers]
            return [count * unit for count in apportion(min(lacking, sum(room)), shares, room)]
        room = [int(0.99 * layer.room) // unit for layer in self.layers]
        if sum(room) < lacking:
            room = [layer.room // unit for layer in self.layers]
        counts = apportion(min(lacking, sum(room)), [layer.importance for layer in self.layers], room)
        # A layer that lost its last weight would have no importance, and stay empty for ever.
        emptied = [int(layer.removed > 0 and layer.nonzeros == 0 and layer.room >= unit) for layer in self.layers]
        held = [layer.nonzeros for layer in self.layers]
        return [count * unit for count in none_empty(counts, emptied, held)]

    def _grow_weights(self, regrowth):
        if is_network_wide(self.grow):
            self._replace_masks(self.grow(self, sum(regrowth)))
        else:
            for layer, count in zip(self.layers, regrowth, strict=True):
                self._replace(layer, self.grow(self, layer.name, layer.mask, count, layer.master))
        self._check_patterns("growth_mode", self.growth_mode, lambda layer: layer.pattern.holds(layer.mask))

    def _check_patterns(self, argument, mode, holds):
        layers = [layer for layer in self.layers if layer.pattern != UNSTRUCTURED]
        broken = [
            layer for layer, ok in zip(layers, _to_numbers([holds(layer) for layer in layers]), strict=True) if not ok
        ]
        if broken:
            mode = getattr(mode, "__name__", mode)
            raise FunctionError(
                f"{argument}={mode!r} does not keep the pattern {broken[0].pattern.name!r} of {broken[0].name}. Hand "
                "the mask that the function is given to drop_lowest and add_highest, or use no pattern."
            )

    def _replace_masks(self, masks):
        if not isinstance(masks, Mapping) or not masks.keys() >= self.masks.keys():
            raise FunctionError(
                f"Expected a dict from the name of every layer to its mask, got {masks!r}. "
                "A network_wide function returns {layer.name: mask for layer in masking.layers}."
            )
        for layer in self.layers:
            self._replace(layer, masks[layer.name])

    def _replace(self, layer, mask):
        if not isinstance(mask, Tensor) or mask.shape != layer.mask.shape:
            came = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise FunctionError(
                f"Expected a mask of shape {tuple(layer.mask.shape)} for {layer.name}, got {came}. "
                "Prune and grow functions return the mask they were given, or a new one of its shape."
            )
        layer.mask.copy_(mask)

    def _agree_and_count(self):
        if distributed.in_process_group():
            distributed.broadcast_masks([layer.mask for layer in self.layers])
        self._count()
        for layer in self.layers:
            layer.ever_active.logical_or_(layer.mask)

    def _check_agreement(self):
        if distributed.in_process_group():
            distributed.check_agreement([layer.mask for layer in self.layers])

    def _count(self):
        counts = _to_numbers([count_active(layer.mask) for layer in self.layers])
        for layer, count in zip(self.layers, counts, strict=True):
            layer.nonzeros = int(count)

    def check(self) -> None:
        """Verify that masks, weights and optimizer belong together; see `invariants.check`.

        Raises:
            InvariantError: with one line for each thing that is wrong, and what to do.
        """
        reshard(self.modules)
        invariants.check(self)

    # What functions read

    def get_momentum_for_weight(self, weight: Tensor) -> Tensor:
        """Return the momentum of a weight, a tensor of its shape; see `momentum.momentum_of`."""
        trained_sparsely = self.sparse_training.momentum_of(weight)
        if trained_sparsely is not None:
            return trained_sparsely
        return momentum_of(self.optimizer, self._masters.get(weight, weight))

    def get_gradient_for_weight(self, weight: Tensor) -> Tensor:
        """Return the gradient of the last step, a tensor of the weight's shape; inactive weights have one, too.

        With sparse_backend='cpu' it is the mean of the gradients observed before an update.

        Raises:
            RuntimeError: if there is none: no backward pass yet, or cleared since.
        """
        gradient = self.sparse_training.gradient_of(weight)
        if gradient is None:
            gradient = gradient_of(self._masters.get(weight, weight))
        if self._gradients_read is not None:
            names = [layer.name for layer in self.layers if layer.weight is weight or layer.master is weight]
            self._gradients_read += [(name, gradient) for name in names]
        return gradient

    @property
    def prune_rate(self) -> float:
        """The fraction of active weights that an update would move now."""
        return self.prune_rate_decay(self.steps)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> mask."""
        return {layer.name: layer.mask for layer in self.layers}

    @property
    def memory(self) -> dict[str, dict[str, Tensor]]:
        """Name -> tensors by key that functions keep from update to update; saved with the masks."""
        return {layer.name: layer.memory for layer in self.layers}

    @property
    def name2nonzeros(self) -> dict[str, int]:
        """Name -> active weights."""
        return {layer.name: layer.nonzeros for layer in self.layers}

    @property
    def name2zeros(self) -> dict[str, int]:
        """Name -> inactive weights."""
        return {layer.name: layer.zeros for layer in self.layers}

    @property
    def name2removed(self) -> dict[str, int]:
        """Name -> weights pruned in the last update."""
        return {layer.name: layer.removed for layer in self.layers}

    @property
    def name2variance(self) -> dict[str, float]:
        """Name -> importance in the last update, normalised over layers."""
        return {layer.name: layer.importance for layer in self.layers}

    @property
    def name2prune_rate(self) -> dict[str, float]:
        """Name -> prune rate of the last update."""
        return {layer.name: layer.prune_rate for layer in self.layers}

    @property
    def total_nonzero(self) -> int:
        """Active weights of the network."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def total_zero(self) -> int:
        """Inactive weights of the network."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def total_removed(self) -> int:
        """Weights pruned in the last update."""
        return sum(layer.removed for layer in self.layers)

    @property
    def density(self) -> float:
        """Fraction of the masked weights that are active."""
        return self.total_nonzero / max(self.total_nonzero + self.total_zero, 1)

    @property
    def ever_active(self) -> dict[str, Tensor]:
        """Name -> which weights have been active at any time, bool."""
        return {layer.name: layer.ever_active for layer in self.layers}

    @property
    def exploration_rate(self) -> float:
        """Fraction of the masked weights that have been active at any time.

        R_s of Liu et al. 2021, Do We Actually Need Dense Over-Parameterization?, https://arxiv.org/abs/2102.02887.
        """
        explored = sum(_to_numbers([count_active(layer.ever_active) for layer in self.layers]))
        return explored / max(self.total_nonzero + self.total_zero, 1)

    def print_nonzero_counts(self) -> None:
        """Log the active weights of every layer and of the network."""
        for layer in self.layers:
            size = layer.mask.numel()
            logger.info("%s: %d of %d active, density %.4f", layer.name, layer.nonzeros, size, layer.density)
        logger.info("Prune rate: %.4f. Active weights: %d.", self.prune_rate, self.total_nonzero)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return masks, counts and steps; plain numbers, strings and tensors."""
        layers = {
            layer.name: {
                "mask": layer.mask.detach(),  # without its pattern
                "removed": layer.removed,
                "importance": layer.importance,
                "prune_rate": layer.prune_rate,
                "ever_active": layer.ever_active,
                "memory": layer.memory,
                "most": layer.pattern.most,
            }
            for layer in self.layers
        }
        return {
            "steps": self.steps,
            "baseline_nonzero": self.baseline_nonzero,
            "prune_threshold": self.prune_threshold,
            "layers": layers,
            "sparse_training": self.sparse_training.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take masks, counts and steps from `state`, and apply the masks.

        Call `add_module` first, with the same model; the masks drawn there are overwritten.

        Raises:
            RuntimeError: if the masked weights differ in name or shape; nothing is changed then.
        """
        reshard(self.modules)
        saved = state["layers"]
        _check_same_layers({name: entry["mask"].shape for name, entry in saved.items()}, self.layers)
        patterns = {layer.name: with_most(layer.pattern, saved[layer.name].get("most")) for layer in self.layers}
        for layer in self.layers:
            if layer.pattern != UNSTRUCTURED and not patterns[layer.name].holds(saved[layer.name]["mask"]):
                raise RuntimeError(
                    f"The mask of {layer.name} in the state is not of the pattern {layer.pattern.name!r}. Call "
                    "add_module with the pattern and the density that were saved."
                )
        for layer in self.layers:
            entry = saved[layer.name]
            with_pattern(layer.mask, patterns[layer.name])
            layer.mask.copy_(_placed_like(layer.mask, entry["mask"]))
            layer.ever_active.copy_(_placed_like(layer.mask, entry.get("ever_active", entry["mask"])))
            layer.removed, layer.importance = entry["removed"], entry["importance"]
            layer.prune_rate = entry["prune_rate"]
            layer.memory = {key: _placed_like(layer.mask, value) for key, value in entry.get("memory", {}).items()}
        self.steps = state["steps"]
        self.baseline_nonzero = state["baseline_nonzero"]
        self.prune_threshold = state["prune_threshold"]
        self._count()
        self._check_agreement()
        self.sparse_training.load_state_dict(state.get("sparse_training", {}))
        if self.dense_copy:
            self.dense_copy.show(self.layers)
        self.apply_mask()


def _from_first_process(scores: Tensor) -> Tensor:
    """Return the scores that the first process has: each computed them on data of its own. Masks are sent later."""
    if scores.dtype == torch.bool or is_sharded(scores):
        return scores
    return distributed.send_to_all(scores.detach().clone(memory_format=torch.contiguous_format))


def _placed_like(mask: Tensor, value: Tensor) -> Tensor:
    """Return a copy of a saved tensor where the mask is: on its device, sharded as it is."""
    if is_sharded(mask) and value.shape == mask.shape:
        return shard_of(value, mask)
    return value.to(mask.device, copy=True)


def _to_numbers(values: list) -> list[float]:
    """Return Python numbers for numbers and 0-d tensors, fetched in one synchronisation per device."""
    values = add_up(values)
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    device = tensors[0].device
    fetched = iter(torch.stack([tensor.reshape(()).to(device) for tensor in tensors]).tolist())
    return [next(fetched) if isinstance(value, Tensor) else float(value) for value in values]


def _check_same_layers(saved: dict[str, torch.Size], layers: list[SparseLayer]) -> None:
    here = {layer.name: layer.mask.shape for layer in layers}
    if saved == here:
        return
    differences = [
        f"{name}: {_shape(saved, name)} in the state, {_shape(here, name)} here"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]
    raise RuntimeError(
        "The masks are of another model. " + "; ".join(differences) + ". Call add_module with the model that was saved."
    )


def _shape(shapes, name):
    return str(tuple(shapes[name])) if name in shapes else "absent"
