"""lightning.Trainer with SparseCallback: automatic and manual optimization; resumed runs are the same run."""

import logging
import os
import warnings

import pytest
import torch
from helpers import assert_masks_hold, mlp, same, snapshot
from launch import run, set_torchrun_variables
from torch import nn

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from sparselearning.integrations.lightning import SparseCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of newer torch, few workers, and much else
STEPS = 5  # an epoch


class Automatic(lightning.LightningModule):
    """A small network with dropout, so that a run that goes on needs the random numbers of the other."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(mlp(16, 32, 32), nn.Dropout(0.1), mlp(32, 2))
        self.example_input_array = torch.zeros(1, 16)
        self.losses = []

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Planned(Automatic):
    """The same with a schedule that asks for the number of steps."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Manual(Automatic):
    """The same, which steps the optimizer itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8 * STEPS, 16, generator=generator)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=8, shuffle=True
    )


def trainer(folder, *callbacks, **settings):
    """Return a quiet Trainer of three epochs that keeps a checkpoint of each."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    return lightning.Trainer(**{"max_epochs": 3, "callbacks": [*callbacks, keep], **quiet, **settings})


def fit(module_type, folder, callback, ckpt_path=None, seed=0, **settings):
    """Return what a run ends with."""
    torch.manual_seed(seed)
    module = module_type()
    made = trainer(folder, callback, **settings)
    made.fit(module, loader(), loader() if settings.get("limit_val_batches") != 0 else None, ckpt_path=ckpt_path)
    return made, module


def assert_same_run(one, other, callback, other_callback):
    assert callback.masking.steps == other_callback.masking.steps
    assert same(snapshot(callback.masking), snapshot(other_callback.masking))
    assert all(map(torch.equal, one.parameters(), other.parameters()))


METHODS = {
    "sparse_momentum": {},
    "set": {},
    "rigl": dict(prune_every_k_steps=2),
    "gmp": dict(prune_every_k_steps=2),
}


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize(
    ("method", "module_type"), [*((method, Automatic) for method in METHODS), ("set", Planned), ("set", Manual)]
)
def test_a_run_that_goes_on_is_the_uninterrupted_one(method, module_type, validated, tmp_path):
    parts = METHODS[method] | ({} if validated else {"density": 0.1})
    settings = {} if validated else {"limit_val_batches": 0}
    whole, resumed = SparseCallback(method, **parts), SparseCallback(method, **parts)
    _, expected = fit(module_type, tmp_path / "whole", whole, **settings)
    for epoch in (0, 1):
        path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        _, found = fit(module_type, tmp_path / "resumed", resumed, path, seed=7, **settings)
        assert found.losses == expected.losses[STEPS * (epoch + 1) :]
        assert_same_run(expected, found, whole, resumed)
        assert_masks_hold(resumed.masking)
        resumed.masking.check()


def test_a_run_on_sparse_kernels_that_goes_on_is_the_uninterrupted_one(tmp_path):
    whole, resumed = (SparseCallback("sparse_momentum", density=0.2, weights="sparse") for _ in range(2))
    _, expected = fit(Automatic, tmp_path, whole)
    _, found = fit(Automatic, tmp_path / "resumed", resumed, tmp_path / "epoch=0.ckpt", seed=7)
    assert_same_run(expected, found, whole, resumed)


class Watching(SparseCallback):
    """Notes after how many batches the masks had moved."""

    moved, batches, before = (), 0, None

    def on_train_batch_end(self, *_):
        if self.before is not None and not same(self.before, snapshot(self.masking)):
            self.moved = (*self.moved, self.batches)
        self.before, self.batches = snapshot(self.masking), self.batches + 1


@pytest.mark.parametrize("module_type", [Automatic, Manual])
def test_masks_move_when_an_epoch_begins_and_not_after_the_last(module_type, tmp_path):
    callback = Watching("set")
    fit(module_type, tmp_path, callback)
    assert callback.moved == (5, 10)
    assert callback.masking.steps == 15
    assert callback.masking.prune_rate_decay.T_max == 15
    assert_masks_hold(callback.masking)


def test_accumulated_gradients_count_as_one_step(tmp_path):
    callback = Watching("set")
    fit(Automatic, tmp_path, callback, accumulate_grad_batches=2)
    assert callback.moved == (5, 10)
    assert callback.masking.steps == callback.masking.prune_rate_decay.T_max == 9


def test_the_method_takes_the_steps_of_the_trainer(tmp_path):
    callback = SparseCallback("rigl")
    fit(Automatic, tmp_path, callback, max_steps=8)
    assert callback.masking.updates.last == 6  # 0.75 of them


class Notes(lightning.pytorch.loggers.Logger):
    """A logger that keeps what it is given."""

    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.records = []

    def log_metrics(self, metrics, step=None):
        self.records.append(metrics)

    def log_hyperparams(self, *_):
        pass


def test_the_log_has_density_and_flops(tmp_path, capsys):
    notes, callback = Notes(), SparseCallback("set", density=0.2)
    made, _ = fit(Automatic, tmp_path, callback, logger=notes)
    records = [record for record in notes.records if "density" in record]
    assert len(records) == 3
    assert records[0]["density"] == pytest.approx(0.2, abs=1e-3)
    assert records[0]["inference_flops"] == pytest.approx(0.2, abs=1e-3)
    assert records[0]["training_flops"] == pytest.approx(0.2, abs=1e-3)
    assert made.callback_metrics["density"] == pytest.approx(0.2, abs=1e-3)
    assert capsys.readouterr().out == ""


def test_flops_of_weights_on_sparse_kernels_are_those_of_masked_ones(tmp_path):
    figures = []
    for weights in ("zero", "sparse"):
        made, _ = fit(Automatic, tmp_path, SparseCallback("sparse_momentum", density=0.2, weights=weights))
        figures.append({name: made.callback_metrics[name] for name in ("density", "inference_flops")})
    assert figures[0] == figures[1]


def test_without_an_example_no_flops_are_counted(tmp_path):
    module, callback = Automatic(), SparseCallback("set")
    module.example_input_array = None
    made = trainer(tmp_path, callback)
    made.fit(module, loader())
    assert "density" in made.callback_metrics
    assert "inference_flops" not in made.callback_metrics


class Two(Manual):
    """Two networks, each with an optimizer, as in adversarial training."""

    def __init__(self):
        super().__init__()
        self.other = mlp(16, 32, 2)

    def training_step(self, batch, batch_idx):
        for optimizer, part in zip(self.optimizers(), (self.net, self.other), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(part(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters()) for part in (self.net, self.other)]


def test_two_optimizers_take_two_callbacks(tmp_path):
    def callbacks():
        return [SparseCallback("set", 0.2, optimizer=0), SparseCallback("set", 0.5, optimizer=1)]

    ends = []
    for path, pair in ((None, callbacks()), (tmp_path / "epoch=0.ckpt", callbacks())):
        module, made = Two(), trainer(tmp_path, *pair)
        made.fit(module, loader(), ckpt_path=path)
        ends.append((module, pair))
        assert [callback.masking.steps for callback in pair] == [15, 15]
        assert made.callback_metrics["density"] == pytest.approx(0.2, abs=1e-3)
        assert made.callback_metrics["density_1"] == pytest.approx(0.5, abs=1e-3)
    (whole, pair), (resumed, other_pair) = ends
    for callback, other in zip(pair, other_pair, strict=True):
        assert_same_run(whole, resumed, callback, other)
    with pytest.raises(ValueError, match=r"Expected optimizer to be one of 0, 1, got None"):
        trainer(tmp_path, SparseCallback("set")).fit(Two(), loader())


def test_a_dense_checkpoint_is_refused_to_go_on_from(tmp_path):
    trainer(tmp_path, max_epochs=1).fit(Automatic(), loader())
    with pytest.raises(RuntimeError, match=r"Expected a checkpoint with masks.*without ckpt_path"):
        fit(Automatic, tmp_path, SparseCallback("set"), tmp_path / "epoch=0.ckpt")


def test_a_training_of_unknown_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"known number of steps.*total_steps"):
        trainer(tmp_path, SparseCallback("set"), max_epochs=-1).fit(Automatic(), loader())


def test_a_second_fit_goes_on_with_the_masks(tmp_path):
    callback = SparseCallback("set")
    made, module = fit(Automatic, tmp_path, callback)
    first, masks = callback.masking, snapshot(callback.masking)
    another = trainer(tmp_path, callback, max_epochs=1)
    another.fit(module, loader())
    assert not first.layers
    assert same(snapshot(callback.masking), masks)
    assert callback.masking.steps == 5
    made.fit_loop.max_epochs = 4
    made.fit(module, loader())
    callback.masking.check()


def test_the_search_for_a_learning_rate_leaves_a_run_that_can_be_masked(tmp_path):
    callback, module = SparseCallback("set"), Automatic()
    module.lr = 0.1
    made = trainer(tmp_path, callback)
    lightning.pytorch.tuner.Tuner(made).lr_find(module, loader(), num_training=10)
    made.fit(module, loader())
    assert callback.masking.steps == 15
    assert_masks_hold(callback.masking)
    callback.masking.check()


def test_validation_takes_any_checkpoint(tmp_path):
    fit(Automatic, tmp_path, SparseCallback("set"))
    trainer(tmp_path, max_epochs=1).fit(Automatic(), loader())
    for path in ("epoch=0.ckpt", "epoch=2.ckpt"):
        made = trainer(tmp_path, SparseCallback("set"))
        made.validate(Automatic(), loader(), ckpt_path=str(tmp_path / path), verbose=False)
        assert "val_loss" in made.callback_metrics


def train_replica(folder):
    set_torchrun_variables()
    os.environ["TORCHELASTIC_RUN_ID"] = "run"
    warnings.simplefilter("ignore")
    ends = []
    for path in (None, folder / "epoch=0.ckpt"):
        callback = SparseCallback("set", density=0.2)
        settings = dict(devices=2, strategy="ddp", limit_val_batches=0)
        _, module = fit(Automatic, folder, callback, path, seed=int(os.environ["RANK"]), **settings)
        callback.masking.check()
        ends.append((snapshot(callback.masking), [parameter.detach() for parameter in module.parameters()]))
    return ends


def test_two_replicas_agree_and_go_on_as_the_uninterrupted_ones(tmp_path):
    whole, *others = [end for ends in run(train_replica, 2, tmp_path) for end in ends]
    for masks, weights in others:
        assert same(masks, whole[0])
        assert all(map(torch.equal, weights, whole[1]))
