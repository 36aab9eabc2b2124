"""Every flag of the two scripts does what its help says, as the user's command shows it: here, or in the test named."""

import re
from types import SimpleNamespace

import pytest
import torch
from script import ROOT, checkpoint_of, load_main, metrics_of, runner

from sparselearning.compact import expanded
from sparselearning.sparse import available

main = load_main()
SHORT = ["--data", "digits", "--epochs", "1", "--device", "cpu", "--max-threads", "1", "--lr", "0.05"]
OFTEN = ["--prune-every-k-steps", "3"]


def masks(run):
    return {name: expanded(layer["mask"]) for name, layer in run.saved["mask"]["layers"].items()}


def active(run):
    return sum(int(mask.sum()) for mask in masks(run).values())


def group(run):
    return run.saved["optimizer"]["param_groups"][0]


def weights(run):
    return torch.cat([tensor.flatten() for tensor in run.saved["model"].values()])


def moved(run, other):
    """How many mask entries differ between two runs."""
    return sum(int((mask != masks(other)[name]).sum()) for name, mask in masks(run).items())


def grown_are_zero(run):
    """Whether some active weights are zero, as they are right after an update."""
    return any((run.saved["model"][name][mask] == 0).any() for name, mask in masks(run).items())


ADAM = ["--optimizer", "adam", "--lr", "0.002"]
LAST_UPDATE = ["--prune-every-k-steps", "13"]  # of the 13 steps of a run
# {flag: (arguments with it, arguments without it, whether two runs (with, without) show its effect)}
EFFECTS = {
    "--batch-size": (["-b", "50"], [], lambda a, b: (a.saved["mask"]["steps"], b.saved["mask"]["steps"]) == (26, 13)),
    "--epochs": (["--epochs", "2"], [], lambda a, b: (len(a.metrics), len(b.metrics)) == (3, 2)),
    "--optimizer": (
        ["--optimizer", "adam"],
        [],
        lambda a, b: "exp_avg" in a.saved["optimizer"]["state"][0] and not moved(a, a) and moved(a, b) == 0,
    ),
    "--lr": (["--lr", "0.01"], [], lambda a, b: (group(a)["lr"], group(b)["lr"]) == (0.01, 0.05)),
    "--momentum": (["--momentum", "0.5"], [], lambda a, b: (group(a)["momentum"], group(b)["momentum"]) == (0.5, 0.9)),
    "--l2": (["--l2", "0.1"], [], lambda a, b: weights(a).norm() < 0.95 * weights(b).norm()),
    "--start-epoch": (["--start-epoch", "5", "--epochs", "5"], [], lambda a, b: a.metrics[0]["epoch"] == 5),
    "--seed": (["--seed", "3"], [], lambda a, b: moved(a, b) > 0 and "-3-" in a.folder.name),
    "--density": (["--density", "0.2"], [], lambda a, b: (active(a), active(b)) == (53_240, 13_310)),
    "--dense-layers": (
        ["--dense-layers", "fc3", "first"],
        [],
        lambda a, b: [*masks(a)] == ["fc2.weight"] and len(masks(b)) == 3,
    ),
    "--prune-rate": (OFTEN, [*OFTEN, "--prune-rate", "0.05"], lambda a, b: explored(a) > explored(b) + 0.02),
    "--prune-every-k-steps": (OFTEN, [], lambda a, b: moved(a, b) > 0 and explored(b) <= 0.051),
    "--start-fraction": (
        [*OFTEN, "--start-fraction", "0.9"],
        OFTEN,
        lambda a, b: explored(a) < explored(b),
    ),
    "--stop-fraction": ([*OFTEN, "--stop-fraction", "0.3"], OFTEN, lambda a, b: explored(a) < explored(b)),
    "--density-schedule": (
        [*OFTEN, "--density-schedule", "cubic", "--start-density", "0.5", "--stop-fraction", "0.3"],
        OFTEN,
        lambda a, b: active(a) == active(b) == 13_310 and explored(a) >= 0.5 > explored(b),
    ),
    "--start-density": (
        ["--density-schedule", "cubic", "--start-density", "0.5"],
        ["--density-schedule", "cubic", "--start-density", "0.3"],
        lambda a, b: (active(a), active(b)) == (133_100, 79_860),
    ),
    "--regrown": (
        [*LAST_UPDATE, "--regrown", "random"],
        LAST_UPDATE,
        lambda a, b: grown_are_zero(b) and not grown_are_zero(a),
    ),
    "--rescale": (
        ["--rescale", "--density", "0.01", "--lr", "0"],
        ["--density", "0.01", "--lr", "0"],
        lambda a, b: weights(a).norm() > 5 * weights(b).norm(),
    ),
    "--pull": (["--pull", "0.1"], [], lambda a, b: weights(a).abs().sum() < 0.9 * weights(b).abs().sum()),
    "--inactive": (
        ["--inactive", "kept"],
        [],
        lambda a, b: "dense" in first_memory(a) and "dense" not in first_memory(b),
    ),
    "--dense": (["--dense"], [], lambda a, b: "mask" not in a.saved and weights(a).count_nonzero() > 266_000),
    "--sparse": (["--sparse"], [], lambda a, b: moved(a, b) == 0),
    "--verbose": ([*OFTEN, "--verbose"], OFTEN, lambda a, b: any("fc3.weight: " in line for line in a.log)),
    "--layer-density": (
        ["--layer-density", "fc1=0.02"],
        [],
        lambda a, b: (int(masks(a)["fc1.weight"].sum()), int(masks(b)["fc1.weight"].sum())) == (4704, 11_760),
    ),
    "--sparse-init": (["--sparse-init", "linear"], [], lambda a, b: moved(a, b) > 0 and active(a) == active(b)),
    "--score-batches": (
        ["--sparse-init", "snip", "--score-batches", "3"],
        ["--sparse-init", "snip"],
        lambda a, b: moved(a, b) > 0 and active(a) == active(b),
    ),
    "--pattern": (
        ["--pattern", "2:4"],
        [],
        lambda a, b: (masks(a)["fc2.weight"].reshape(-1, 4).sum(1) <= 2).all(),
    ),
    "--prune": ([*OFTEN, "--prune", "SET"], OFTEN, lambda a, b: moved(a, b) > 0),
    "--growth": ([*OFTEN, "--growth", "random"], OFTEN, lambda a, b: moved(a, b) > 0),
    "--redistribution": (
        [*OFTEN, "--redistribution", "none"],
        OFTEN,
        lambda a, b: int(masks(a)["fc3.weight"].sum()) == 50 != int(masks(b)["fc3.weight"].sum()),
    ),
    "--decay-schedule": ([*OFTEN, "--decay-schedule", "constant"], OFTEN, lambda a, b: explored(a) > explored(b)),
    "--sparse-backend": (
        ["--sparse-backend", "cpu"],
        [],
        lambda a, b: "layers: 3 sparse kernels" in a.log and moved(a, b) == 0,
    ),
    "--keep": (
        ["--epochs", "3", "--keep", "3"],
        ["--epochs", "3", "--keep", "1"],
        lambda a, b: (len([*a.folder.glob("checkpoint*.pt")]), len([*b.folder.glob("checkpoint*.pt")])) == (3, 1),
    ),
    "--reset-state": (
        [*LAST_UPDATE, "--reset-state"],
        LAST_UPDATE,
        lambda a, b: momentum_of_zeros(a) == 0 < momentum_of_zeros(b),
    ),
    "--state-of-regrown": (
        [*LAST_UPDATE, "--optimizer", "adam", "--state-of-regrown", "mean"],
        [*LAST_UPDATE, "--optimizer", "adam", "--reset-state"],
        lambda a, b: second_moments_of_grown(a) == 1 and second_moments_of_grown(b) == 0,
    ),
    "--regrown-warm-up": (
        [*OFTEN, *ADAM, "--regrown-warm-up", "1000"],
        [*OFTEN, *ADAM],
        lambda a, b: smallest_of_active(a) < 0.1 * smallest_of_active(b),
    ),
    "--lr-by-density": (
        [*ADAM, "--lr-by-density"],
        ADAM,
        lambda a, b: moved(a, b) == 0 and weights(a).norm() > 1.05 * weights(b).norm(),
    ),
}


def explored(run):
    """The share of maskable weights that have ever been active."""
    return run.metrics[0]["exploration_rate"]


def first_memory(run):
    return next(iter(run.saved["mask"]["layers"].values())).get("memory", {})


def momentum_of_zeros(run):
    """The momentum of active weights that are zero: they grew in the last update."""
    weight, mask = run.saved["model"]["fc1.weight"], masks(run)["fc1.weight"]
    momentum = run.saved["optimizer"]["state"][0]["momentum_buffer"]
    return momentum[mask & (weight == 0)].abs().sum()


def second_moments_of_grown(run):
    """Adam's second moments of weights that grew in the last update, over the mean of those of older weights.

    The former must be equal, and are the weights that are zero.
    """
    weight, mask = run.saved["model"]["fc1.weight"], masks(run)["fc1.weight"]
    moments, grown = run.saved["optimizer"]["state"][0]["exp_avg_sq"], mask & (weight == 0)
    assert len(moments[grown].unique()) == 1
    return pytest.approx(moments[grown].mean().item() / moments[mask & ~grown].mean().item(), rel=1e-5)


def smallest_of_active(run):
    """The magnitude below which a tenth of the active weights of the first layer lies: among those that have grown."""
    return run.saved["model"]["fc1.weight"][masks(run)["fc1.weight"]].abs().quantile(0.1)


# What other tests show, by running the script: {flag: test}
SHOWN = {
    "--data": "test_cifar_files_train_a_convolutional_network",
    "--model": "test_cifar_files_train_a_convolutional_network",
    "--l1": "test_l1_shrinks_the_weights",
    "--decay_frequency": "test_decay_frequency_counts_steps",
    "--valid_split": "test_valid_split_of_zero_leaves_no_validation",
    "--iters": "test_iters_are_runs_of_their_own_with_further_seeds",
    "--data-dir": "test_mnist_files_train",
    "--max-threads": "test_threads_are_limited_by_the_flag_the_environment_and_the_cores",
    "--amp": "test_mixed_precision_trains",
    "--fp16": "test_fp16_without_apex_says_what_it_does",
    "--compile": "test_a_compiled_run_trains",
    "--run-dir": "test_a_second_run_keeps_the_first",
    "--resume": "test_a_run_resumed_by_its_folder_alone_is_bitwise_the_uninterrupted_one",
    "--checkpoint-every": "test_a_run_goes_on_from_any_kept_checkpoint_to_the_bit",
    "--tensorboard": "test_tensorboard_shows_what_the_metrics_say",
    "--save-model": "test_features_bench_and_model_are_kept",
    "--save-features": "test_features_bench_and_model_are_kept",
    "--bench": "test_features_bench_and_model_are_kept",
    "--method": "test_the_script_runs_it",
    "--list-methods": "test_methods_are_listed_with_paper_and_flags",
    "--sparse-layers": "test_parameters_are_masked_that_sparse_layers_names",
    "--log-interval": "test_a_bar_is_shown_on_a_terminal",
    "--test-batch-size": "test_images_are_evaluated_in_batches_of_the_size_asked_for",
    "--device": "test_the_device_is_the_one_asked_for",
    "--no-cuda": "test_the_device_is_the_one_asked_for",
}
OF_IMAGENET = {
    "--data": "test_a_run_leaves_its_files_and_keeps_its_density",
    "--recipe": "test_recipes_are_those_of_the_papers",
    "--arch": "test_networks_of_torchvision_and_timm_are_built",
    "--model-config": "test_flags_override_the_recipe_and_a_short_run_keeps_its_shape",
    "--stride-in": "test_flags_override_the_recipe_and_a_short_run_keeps_its_shape",
    "--image-size": "test_a_run_leaves_its_files_and_keeps_its_density",
    "--workers": "test_a_run_that_goes_on_elsewhere_is_the_uninterrupted_one_to_the_bit",
    "--accumulate": "test_accumulated_gradients_make_the_same_number_of_steps",
    "--warmup": "test_the_learning_rate_warms_up_and_falls",
    "--decay-epochs": "test_the_learning_rate_warms_up_and_falls",
    "--label-smoothing": "test_flags_override_the_recipe_and_a_short_run_keeps_its_shape",
    "--wd": "test_flags_override_the_recipe_and_a_short_run_keeps_its_shape",
    "--bn-weight-decay": "test_flags_override_the_recipe_and_a_short_run_keeps_its_shape",
    "--print-freq": "test_a_run_leaves_its_files_and_keeps_its_density",
    "--evaluate": "test_evaluation_alone_gives_the_accuracy_of_the_run",
    "--pretrained-weights": "test_evaluation_alone_gives_the_accuracy_of_the_run",
    "--new-head": "test_another_classifier_is_drawn_anew_where_asked_for",
    "--static-loss-scale": "test_a_static_loss_scale_stays_with_apex_and_without",
    "--dynamic-loss-scale": "test_a_static_loss_scale_stays_with_apex_and_without",
    "--fsdp": "test_processes_move_masks_after_an_evaluation",
    "--prof": "test_benchmarks_and_the_profile_end_without_training",
    "--benchmark-training": "test_benchmarks_and_the_profile_end_without_training",
    "--benchmark-inference": "test_benchmarks_and_the_profile_end_without_training",
    "--bench-iterations": "test_benchmarks_and_the_profile_end_without_training",
    "--bench-warmup": "test_benchmarks_and_the_profile_end_without_training",
    "--gather-checkpoints": "test_a_run_leaves_its_files_and_keeps_its_density",
    "--skip-bad-images": "test_a_run_skips_bad_images_and_names_each_once",
    "--verify": "test_verify_lists_all_that_is_bad_with_status_1",
    "--density-of": "test_a_density_of_the_network_counts_what_stays_dense",
}


@pytest.fixture
def make(tmp_path, monkeypatch, caplog):
    """Make a run on the digits, and return what it left."""
    run = runner(main, tmp_path, monkeypatch, caplog, *SHORT)

    def left(arguments, place):
        folder = run(*arguments, place=place)
        log = (folder / "log.txt").read_text().splitlines()
        return SimpleNamespace(folder=folder, saved=checkpoint_of(folder), metrics=metrics_of(folder), log=log)

    return left


@pytest.mark.parametrize("flag", EFFECTS)
def test_a_flag_has_its_effect(flag, make):
    if flag == "--sparse-backend" and not available():
        pytest.skip("built without sparse kernels")
    with_it, without, shows = EFFECTS[flag]
    assert shows(make(with_it, "with"), make(without, "without"))


def test_images_are_evaluated_in_batches_of_the_size_asked_for(make, monkeypatch):
    sizes, forward = [], torch.nn.Flatten.forward

    def counted(self, input):
        if not torch.is_grad_enabled():
            sizes.append(len(input))
        return forward(self, input)

    monkeypatch.setattr(torch.nn.Flatten, "forward", counted)
    make(["--test-batch-size", "7"], "runs")
    assert max(sizes) == 7


def test_the_device_is_the_one_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))  # this machine may have no such device
    for argv, device in (([], "cuda"), (["--no-cuda"], "cpu"), (["--device", "cuda:1"], "cuda:1")):
        assert main.build_parser().parse_args(argv).device == device


def flags_of(script):
    """Return the long name of every flag, the first where there are several."""
    actions = load_main(script).build_parser()._actions
    names = [[name for name in action.option_strings if name.startswith("--")] for action in actions]
    return [long[0] for long in names if long and long[0] != "--help"]


@pytest.mark.parametrize(("script", "of_its_own"), [("mnist_cifar", {}), ("imagenet", OF_IMAGENET)])
def test_every_flag_has_a_test(script, of_its_own):
    tests = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    shown = {flag: test for flag, test in {**SHOWN, **of_its_own}.items() if test in tests}
    assert [flag for flag in flags_of(script) if flag not in {**EFFECTS, **shown}] == []
