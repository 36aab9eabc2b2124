"""The reference: what is public, by page. mkdocstrings takes signatures and texts from the docstrings."""

from collections.abc import Sequence

PUBLIC: dict[str, tuple[str, str, dict[str, Sequence[str] | None]]] = {
    # page -> title, what it is for, {name: the members that are shown; None: all}
    "masking": (
        "Masking",
        "`from sparselearning import Masking, describe`. `summary`, `metrics`, `apply_to`, `clip_grad_norm_` below are "
        "methods of a Masking. [Your own function](../../How_to_add_your_own_algorithms.md#what-a-function-reads) "
        "lists its counts by name.",
        {
            "sparselearning.core.Masking": None,
            "sparselearning.reports.summary": None,
            "sparselearning.reports.metrics": None,
            "sparselearning.weights.copies.apply_to": None,
            "sparselearning.weights.clipping.clip_grad_norm_": None,
            "sparselearning.reports.describe": None,
            "sparselearning.layer.SparseLayer": ["pattern", "shape", "size", "room", "zeros", "density"],
            "sparselearning.budgets.Budget": [],
            "sparselearning.weights.finite.InvariantError": [],
            "sparselearning.weights.finite.NonFiniteError": [],
            "sparselearning.processes.group.ProcessError": [],
        },
    ),
    "schedules": (
        "Schedules",
        "When masks move, and functions from the step to a prune rate or a density. `Updates`, `CosineDecay` and "
        "`LinearDecay` are names of `sparselearning`, too.",
        {
            f"sparselearning.schedules.{name}": None
            for name in (
                "Updates",
                "CosineDecay",
                "LinearDecay",
                "Constant",
                "CubicDensity",
                "SigmoidDensity",
                "StepDensity",
                "SoftDensity",
            )
        },
    ),
    "methods": (
        "Methods and flags",
        "A row of the table `METHODS`, how it becomes a Masking, and flags for a command line of your own.",
        {
            "sparselearning.method.Method": None,
            "sparselearning.methods.find_method": None,
            "sparselearning.methods.arguments_of": None,
            "sparselearning.flags.add_sparse_args": None,
            "sparselearning.flags.chosen_method": None,
            "sparselearning.flags.flags_of": None,
        },
    ),
    "functions": (
        "Functions of an update",
        "The two verbs and the divider that every method is made of, the built-in functions, and the marks of your own "
        "functions. `reads`, `network_wide` and `count_to_remove` are names of `sparselearning`, too.",
        {
            "sparselearning.selection": None,
            "sparselearning.prune": None,
            "sparselearning.redistribute": None,
            "sparselearning.grow": None,
            **{
                f"sparselearning.functions.{name}": None
                for name in (
                    "reads",
                    "network_wide",
                    "entrywise",
                    "single_weights",
                    "after_pruning",
                    "in_proportion",
                    "gives_back",
                    "FunctionError",
                )
            },
        },
    ),
    "start": (
        "The start of training",
        "Which parameters are masked, how many weights each layer keeps, and which. A distribution is a function from "
        "a shape to a share.",
        {
            "sparselearning.start.maskable.maskable_parameters": None,
            "sparselearning.start.distributions.uniform": None,
            "sparselearning.start.distributions.erdos_renyi": None,
            "sparselearning.start.distributions.erdos_renyi_kernel": None,
            "sparselearning.start.scores": None,
            "sparselearning.patterns": [],
        },
    ),
    "weights": (
        "How weights are held",
        "What `Masking(weights=...)` takes, and where a process keeps freed memory.",
        {
            "sparselearning.weights.zeros.Zeros": [],
            "sparselearning.weights.dense_copy.DenseCopy": [],
            "sparselearning.sparse.training.SparseTraining": [],
            "sparselearning.native.allocator.keep_freed_memory": None,
            "sparselearning.native.allocator.lay_large_blocks_apart": None,
            "sparselearning.native.allocator.give_freed_memory": None,
            "sparselearning.native.allocator.freed_memory": None,
        },
    ),
    "saving": (
        "Checkpoints and FLOPs",
        "Files that are written whole or not at all, and what a network costs.",
        {"sparselearning.checkpoint": None, "sparselearning.archive.CheckpointError": [], "sparselearning.flops": None},
    ),
    "sparse": (
        "Sparse execution",
        "All of these are names of `sparselearning.sparse`.",
        {
            "sparselearning.sparse.conversion.convert": None,
            "sparselearning.sparse.shrink.remove_dead_units": None,
            "sparselearning.sparse.serving.save": None,
            "sparselearning.sparse.serving.load": None,
            "sparselearning.sparse.files.save_compressed": None,
            "sparselearning.sparse.files.load_compressed": None,
            "sparselearning.sparse.files.export_onnx": None,
            "sparselearning.sparse.files.to_dense": None,
            "sparselearning.sparse.interface.available": None,
            "sparselearning.sparse.modules.SparseLinear": ["from_dense", "to_dense"],
            "sparselearning.sparse.modules.SparseConv2d": ["from_dense", "to_dense"],
            "sparselearning.sparse.report.Report": None,
            "sparselearning.sparse.report.LayerReport": None,
            "sparselearning.sparse.report.Removed": None,
        },
    ),
    "trainers": (
        "Trainers and models",
        "Callbacks for trainers, each imported when used, and the networks of the experiments.",
        {
            "sparselearning.integrations.transformers.SparseCallback": [],
            "sparselearning.integrations.lightning.SparseCallback": [],
            "sparselearning.integrations.accelerate.prepare": None,
            "sparselearning.integrations.shared.figures": None,
            "sparselearning.models.build": None,
        },
    ),
}
PAGES = {f"docs/reference/{name}.md": entry for name, entry in PUBLIC.items()}


def page(path: str) -> str:
    """Return the text of a page, whose `:::` blocks mkdocstrings replaces."""
    title, purpose, names = PAGES[path]
    blocks = []
    for name, members in names.items():
        shown = "" if members is None else f"\n    options:\n      members: [{', '.join(members)}]"
        if members == []:
            shown = "\n    options:\n      members: false\n      inherited_members: false"
        blocks.append(f"::: {name}{shown}")
    return "\n\n".join([f"# {title}", purpose, *blocks]) + "\n"
