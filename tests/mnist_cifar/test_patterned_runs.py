"""Runs of main.py with --pattern keep the pattern, also when they are resumed."""

import pytest
import torch
from patterned import PATTERNS
from script import load_main, metrics_of

from sparselearning.patterns import of_fan_in, pattern_for


@pytest.mark.parametrize("pattern", [*PATTERNS[:2], "block:10x4", *PATTERNS[3:]])
def test_a_run_keeps_its_pattern(pattern, tmp_path):
    main = load_main()
    density = {"2:4": 0.5, "1:4": 0.25}.get(pattern, 0.1)
    given = f"--data digits --epochs 3 --max-threads 1 --device cpu --density {density} --pattern {pattern}"
    argv = [*given.split(), "--redistribution", "none", "--run-dir", str(tmp_path)]
    folder = main.run(main.parse_arguments(argv))
    layers = torch.load(folder.checkpoint)["mask"]["layers"]
    for layer in layers.values():
        shape, count = layer["mask"].shape, int(layer["mask"].sum())
        assert of_fan_in(pattern_for(pattern, shape), shape, count).holds(layer["mask"])
    counts = [record["active_weights"] for record in metrics_of(folder.path)[:3]]
    assert counts[0] == pytest.approx(density * 266_200, rel=0.05)
    assert pattern == "fan-in:0.3" or counts == [counts[0]] * 3


@pytest.mark.long
def test_a_run_from_scores_goes_on_with_its_fan_in(tmp_path):
    main = load_main()
    given = f"--data digits --max-threads 1 --device cpu --density 0.05 --run-dir {tmp_path} --method snip"
    whole = main.run(main.parse_arguments([*given.split(), "--pattern", "fan-in", "--epochs", "2"]))
    resumed = main.run(main.parse_arguments(["--resume", str(whole.path), "--epochs", "3"]))
    counts = [record["density_per_layer"] for record in metrics_of(resumed.path)[:3]]
    assert counts[2] == counts[1]


def test_patterns_by_name_go_through_the_command_line(tmp_path):
    main = load_main()
    given = f"--data digits --epochs 1 --max-threads 1 --device cpu --density 0.1 --run-dir {tmp_path}"
    args = main.parse_arguments([*given.split(), "--method", "srigl", "--pattern", "fc3=2:4,*=fan-in:0.9"])
    assert args.pattern == {"fc3": "2:4", "*": "fan-in:0.9"}
    layers = torch.load(main.run(args).checkpoint)["mask"]["layers"]
    masks = {name: layer["mask"] for name, layer in layers.items()}
    assert (masks["fc3.weight"].reshape(-1, 4).sum(1) <= 2).all()
    assert all(len(set(masks[name].sum(1).tolist()) - {0}) == 1 for name in ("fc1.weight", "fc2.weight"))
