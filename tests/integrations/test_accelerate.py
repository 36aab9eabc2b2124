"""Accelerate's loops: masks in `save_state` and `load_state`; a loop that goes on is the uninterrupted one."""

import pytest
import torch
from helpers import assert_masks_hold, mlp, same, snapshot
from launch import run, set_torchrun_variables
from torch import nn

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.utils import DataLoaderConfiguration  # noqa: E402

from sparselearning.flops import forward_flops  # noqa: E402
from sparselearning.integrations.accelerate import figures, prepare  # noqa: E402

EPOCHS, BATCH, EXAMPLES = 3, 8, 40  # 5 steps an epoch


def fit(folder, method="set", resumed=None, accumulate=1, tracker=None, **parts):
    """Train as docs/accelerate.md does; save every epoch, or go on from the epoch `resumed`."""
    torch.manual_seed(7 if resumed else 0)
    inputs = torch.randn(EXAMPLES, 16, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    model = nn.Sequential(mlp(16, 32, 32), nn.Dropout(0.1), mlp(32, 2))
    flops = forward_flops(model, inputs[:1])
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
        log_with=tracker,
    )
    accelerator.init_trackers("run")
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        torch.utils.data.DataLoader(data, BATCH // accelerator.num_processes, shuffle=True),
    )
    masking = prepare(accelerator, model, optimizer, method, 0.2, total_steps=EPOCHS * len(loader), **parts)
    if resumed:
        accelerator.load_state(folder / f"epoch-{resumed}")
    losses = []
    for epoch in range(resumed or 0, EPOCHS):
        if epoch:
            masking.at_end_of_epoch()
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.log(figures(masking, flops, len(loader)), masking.steps)
        if not resumed:
            accelerator.save_state(folder / f"epoch-{epoch + 1}")
    assert_masks_hold(masking)
    masking.check()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return dict(losses=losses, masks=snapshot(masking), steps=masking.steps, weights=weights)


def equal(one, other):
    alike = all(map(torch.equal, one["weights"], other["weights"]))
    return alike and same(one["masks"], other["masks"]) and one["steps"] == other["steps"]


@pytest.mark.parametrize(
    ("method", "parts"),
    [("sparse_momentum", {}), ("set", {}), ("rigl", dict(prune_every_k_steps=2)), ("gmp", dict(prune_every_k_steps=2))],
)
def test_a_loop_that_goes_on_is_the_uninterrupted_one(method, parts, tmp_path):
    expected = fit(tmp_path, method, **parts)
    for epoch in (1, 2):
        found = fit(tmp_path, method, resumed=epoch, **parts)
        assert found["losses"] == expected["losses"][5 * epoch :]
        assert equal(found, expected)


def test_accumulated_gradients_count_as_one_step(tmp_path):
    assert fit(tmp_path, accumulate=5)["steps"] == EPOCHS


class Notes(accelerate.tracking.GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory, tracker = "notes", False, None
    main_process_only = True

    def __init__(self):
        super().__init__()
        self.records = []

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.records.append(values)


def test_the_trackers_get_density_and_flops(tmp_path, capsys):
    notes = Notes()
    fit(tmp_path, tracker=notes)
    assert len(notes.records) == EPOCHS
    assert all(value == pytest.approx(0.2, abs=2e-3) for record in notes.records for value in record.values())
    assert notes.records[0].keys() == {"density", "inference_flops", "training_flops"}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_divided_weights_are_refused(kind):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.distributed_type = accelerate.DistributedType(kind)
    model = mlp(4, 4)
    try:
        with pytest.raises(RuntimeError, match=f"Expected whole weights in every process.*Got {kind}"):
            prepare(accelerator, model, torch.optim.SGD(model.parameters()), total_steps=1)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def train_replica(folder):
    set_torchrun_variables()
    return fit(folder), fit(folder, resumed=1)


def test_two_replicas_agree_and_go_on(tmp_path):
    (whole, resumed), (other, other_resumed) = run(train_replica, 2, tmp_path)
    assert equal(whole, other)
    assert equal(whole, resumed)
    for one, later in ((whole, resumed), (other, other_resumed)):
        assert later["losses"] == one["losses"][5:]
    assert whole["losses"] != other["losses"]
