"""The masks hold in loops that do not know them: the optimizer's own step, scalers, schedulers, trainers."""

import copy

import pytest
import torch
from apex_stand_in import FP16Optimizer
from helpers import assert_masks_hold, backward, batch_for, masked, mlp, same, snapshot, train
from torch import nn

from sparselearning import Masking
from sparselearning.invariants import NonFiniteError
from sparselearning.selection import add_highest


def pair(**modes):
    """Return two equal models and a Masking for each, with equal masks."""
    model = mlp(20, 30, 10)
    masking = masked(model, **modes)
    twin = copy.deepcopy(model)
    return model, masking, twin, masked(twin, sparse_init="resume", **modes)


def test_optimizer_step_and_mask_step_are_the_same():
    model, masking, twin, twin_masking = pair(prune_every_k_steps=2)
    inputs = batch_for(model)
    train(model, masking, 5, inputs)
    train(twin, twin_masking.optimizer, 5, inputs)
    assert same(model.state_dict(), twin.state_dict())
    assert same(masking.masks, twin_masking.masks)
    assert masking.steps == twin_masking.steps == 5
    assert_masks_hold(twin_masking)


def test_step_returns_the_loss_of_a_closure():
    model = mlp(20, 30, 10)
    masking = masked(model)
    inputs = batch_for(model)

    def closure():
        model.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    assert masking.step(closure) > 0
    assert masking.steps == 1
    assert_masks_hold(masking)


def test_gradient_accumulation_needs_nothing_special():
    model, masking, twin, twin_masking = pair()
    inputs = batch_for(model)
    for _ in range(3):
        for half in inputs.chunk(2):
            (model(half).square().mean() / 2).backward()
        masking.step()
        masking.optimizer.zero_grad()
        twin(inputs).square().mean().backward()
        twin_masking.step()
        twin_masking.optimizer.zero_grad()
    assert masking.steps == 3
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)
    assert_masks_hold(masking)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_lr_scheduler_that_patches_step(when):
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2) if when == "before" else None
    masking = masked(model, optimizer)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for step in (masking.step, optimizer.step, masking.step, optimizer.step):
        backward(model)
        step()
        scheduler.step()
        assert_masks_hold(masking)
    assert masking.steps == 4
    assert masking.param_groups[0]["lr"] == pytest.approx(0.001)


# Fused optimizers skip an overflowed step in their kernel and call their hooks all the same.
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale_the", ["optimizer", "masking"])
def test_an_overflow_under_grad_scaler_counts_no_step(fused, scale_the):
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    masking = masked(model, optimizer, prune_every_k_steps=2)
    stepper = masking if scale_the == "masking" else optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)

    def step(overflow=False):
        optimizer.zero_grad()
        loss = model(batch_for(model)).square().mean()
        scaler.scale(loss * torch.inf if overflow else loss).backward()
        scaler.step(stepper)
        scaler.update()

    step()
    before, masks = copy.deepcopy(model.state_dict()), snapshot(masking)
    step(overflow=True)
    assert scaler.get_scale() == 4
    assert masking.steps == 1
    assert same(model.state_dict(), before)
    assert same(masking.masks, masks), "an update came with a step that did not count"
    step()
    assert masking.steps == 2
    assert not same(masking.masks, masks)
    step(overflow=True)
    step()
    assert masking.steps == 3
    assert_masks_hold(masking)


def test_clipping_between_unscale_and_step():
    model = mlp(20, 30, 10)
    masking = masked(model)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        masking.optimizer.zero_grad()
        scaler.scale(model(batch_for(model)).square().mean()).backward()
        scaler.unscale_(masking)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(masking)
        scaler.update()
    assert masking.steps == 3
    assert_masks_hold(masking)


def test_autocast_trains_sparsely():
    model = mlp(20, 30, 10)
    masking = masked(model)
    for _ in range(3):
        masking.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(batch_for(model)).float().square().mean().backward()
        masking.step()
    masking.at_end_of_epoch()
    assert_masks_hold(masking)


def test_one_optimizer_for_two_models_takes_two_maskings():
    first, second = mlp(20, 30, 10), mlp(10, 20)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1, momentum=0.9)
    maskings = [masked(model, optimizer, density) for model, density in ((first, 0.1), (second, 0.5))]
    train(nn.Sequential(first, second), optimizer)
    for masking in maskings:
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        assert masking.steps == 3
    assert [masking.total_nonzero for masking in maskings] == [90, 100]


def test_a_compiled_model_shares_the_storage_and_follows_the_masks():
    model = mlp(20, 30, 10)
    compiled = torch.compile(model, backend="aot_eager")
    masking = masked(compiled)
    assert list(masking.masks) == ["fc1.weight", "fc2.weight"]
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        train(compiled, masking, 2)
        masking.at_end_of_epoch()
        inputs = batch_for(model)
        torch.testing.assert_close(compiled(inputs), model(inputs))
    assert [parameter.data_ptr() for parameter in model.parameters()] == storages
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "an update of the masks recompiled the model"
    assert_masks_hold(masking)


def apex(model):
    """Return Apex's wrapper around SGD, with a loss scale that adapts."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return FP16Optimizer(sgd, dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 128.0})


def test_apex_master_weights_are_masked_with_their_fp16_copies():
    model = mlp(20, 30, 10).half()
    optimizer = apex(model)
    masking = Masking(optimizer, None, fp16=True)
    masking.add_module(model, 0.2)
    masters = dict(optimizer.pairs())
    seen = []

    def step(overflow=False):
        optimizer.zero_grad()
        loss = model(batch_for(model)).float().square().mean()
        optimizer.backward(loss * torch.inf if overflow else loss)
        masking.step()

    for _ in range(2):
        step()
        step(overflow=True)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        for layer in masking.layers:
            assert not masters[layer.weight][~layer.mask].any()
        seen.append(masking.total_nonzero)
    assert seen == [180, 180]
    assert masking.steps == 2
    for layer in masking.layers:  # release 1.0 asked for the state of the fp16 copy, which has none
        momentum = masking.get_momentum_for_weight(layer.weight)
        assert momentum is optimizer.optimizer.state[masters[layer.weight]]["momentum_buffer"]
        assert momentum.dtype == torch.float32
        assert momentum.any()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def updated_under_apex(**modes):
    """Return a Masking on a half-precision model, after one step and one update."""
    model = mlp(20, 30, 10).half()
    optimizer = apex(model)
    masking = masked(model, optimizer, **modes)
    optimizer.backward(model(batch_for(model)).float().square().mean())
    masking.step()
    masking.at_end_of_epoch()
    return masking


def test_apex_functions_see_the_master_weight():
    def by_state(masking, name, weight, mask):
        return masking.optimizer.state[weight]["momentum_buffer"][mask].abs().sum().item()

    masking = updated_under_apex(redistribution_mode=by_state)
    assert min(masking.name2variance.values()) > 0
    assert_masks_hold(masking)


def test_apex_gradients_are_those_of_the_master_weight():
    seen = []

    def grow(masking, name, mask, count, weight):
        seen.append(masking.get_gradient_for_weight(weight))
        return add_highest(seen[-1].abs(), mask, count)

    masking = updated_under_apex(growth_mode=grow)
    assert [gradient.dtype for gradient in seen] == [torch.float32, torch.float32]
    layer = masking.layers[1]
    for weight in (layer.weight, layer.master):
        assert torch.equal(masking.get_gradient_for_weight(weight), seen[1])
    layer.master.grad[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"gradient of fc2\.weight"):
        masking.at_end_of_epoch()


# Trainers; skipped where they are not installed. Their own warnings are not ours.
trainer = pytest.mark.filterwarnings("ignore")


@trainer
@pytest.mark.parametrize("prepared", ["before", "after"])
def test_accelerate(prepared):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if prepared == "after":
        masking = masked(model, optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
        masking = masked(model, optimizer)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch_for(model)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert masking.steps == 3
    masking.at_end_of_epoch()
    assert_masks_hold(masking)


@trainer
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = mlp(20, 30, 10)

        def training_step(self, batch, _):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            self.masking = masked(self, optimizer)
            return optimizer

        def on_train_epoch_end(self):
            self.masking.at_end_of_epoch()

    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 20)), batch_size=8)
    loop = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loop.fit(module, data)
    assert module.masking.steps == 6
    assert module.masking.total_nonzero == 180
    assert_masks_hold(module.masking)


@trainer
def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp(20, 30, 10)

        def forward(self, x):
            output = self.layers(x)
            return {"loss": output.square().mean(), "logits": output}

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    masking = masked(model, optimizer, prune_every_k_steps=2)
    arguments = transformers.TrainingArguments(
        tmp_path, num_train_epochs=2, per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True
    )
    data = [{"x": torch.randn(20)} for _ in range(24)]
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler)).train()
    assert masking.steps == 6
    assert masking.total_nonzero == 180
    assert_masks_hold(masking)


@trainer
@pytest.mark.parametrize("sparse_init", ["constant", "resume"])
def test_lightning_that_fits_twice_with_lbfgs(sparse_init, tmp_path):
    lightning = pytest.importorskip("lightning")
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.masking = mlp(20, 30, 10), None

        def training_step(self, batch, _):
            seen.append(all(not layer.weight[~layer.mask].any() for layer in self.masking.layers))
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.LBFGS(self.parameters(), max_iter=4)
            first = self.masking is None
            self.masking = masked(
                self,
                optimizer,
                sparse_init="constant" if first else sparse_init,
                growth_mode="random",
                redistribution_mode="none",
            )
            return optimizer

    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 20)), batch_size=8)
    for _ in range(2):
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        lightning.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet).fit(module, data)
        assert module.masking.steps == 2
        assert module.masking.total_nonzero == 180
        assert_masks_hold(module.masking)
    assert len(seen) > 8
    assert all(seen)
