"""transformers.Trainer with SparseCallback: masks, checkpoints, logs; interrupted and resumed runs are the same run."""

import os

import pytest
import torch
from helpers import assert_masks_hold, same, snapshot
from launch import run, set_torchrun_variables

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from sparselearning.integrations.transformers import SparseCallback  # noqa: E402

EXAMPLES, BATCH = 40, 8  # 5 steps an epoch


class Examples(torch.utils.data.Dataset):
    """Sequences whose label is the parity of their first token."""

    def __init__(self):
        self.tokens = torch.randint(64, (EXAMPLES, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": int(self.tokens[i, 0]) % 2}


class Noisy(Examples):
    """The same, but every look draws a random number."""

    def __getitem__(self, i):
        torch.rand(1)
        return super().__getitem__(i)


class Stream(torch.utils.data.IterableDataset):
    """The same without indices."""

    def __iter__(self):
        yield from (Examples()[i] for i in range(EXAMPLES))


def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=8, hidden_dropout_prob=0.1, **sizes)
    return transformers.BertForSequenceClassification(config)


def trainer(folder, callback, eval_dataset=None, **settings):
    """Return a Trainer of three epochs, as users write it."""
    usual = dict(num_train_epochs=3, per_device_train_batch_size=BATCH, learning_rate=1e-2, logging_steps=1)
    usual |= dict(save_strategy="steps", save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True)
    args = transformers.TrainingArguments(str(folder), **usual | settings)
    made = transformers.Trainer(
        model(), args, train_dataset=Examples(), eval_dataset=eval_dataset, callbacks=[callback]
    )
    return made


def result(trainer, callback):
    masking = callback.masking
    assert_masks_hold(masking)
    masking.check()
    return {
        "weights": [parameter.detach().clone() for parameter in trainer.model.parameters()],
        "masks": snapshot(masking),
        "steps": masking.steps,
        "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
    }


def equal(one, other):
    weights = all(map(torch.equal, one["weights"], other["weights"]))
    return weights and same(one["masks"], other["masks"]) and one["steps"] == other["steps"]


CASES = {
    "sparse_momentum": dict(density=0.2),
    "set": dict(density=0.2),
    "rigl": dict(density=0.1, prune_every_k_steps=2),
    "gmp": dict(density=0.2, prune_every_k_steps=2),
    "smet": dict(density=0.2, prune_every_k_steps=2),  # with the Trainer's AdamW
    "cht_soft": dict(density=0.2, prune_every_k_steps=2),
    "top_kast": dict(density=0.2, prune_every_k_steps=2),  # trains inactive weights in a copy
}


@pytest.fixture(scope="module", params=CASES)
def uninterrupted(request, tmp_path_factory):
    """A run with a checkpoint of every step: its method, folder and result."""
    folder = tmp_path_factory.mktemp(request.param)
    callback = SparseCallback(request.param, **CASES[request.param])
    whole = trainer(folder, callback)
    whole.train()
    return request.param, folder, result(whole, callback)


@pytest.mark.parametrize("step", [5, 7])
def test_a_run_that_goes_on_is_the_uninterrupted_one(uninterrupted, step, tmp_path):
    method, folder, expected = uninterrupted
    callback = SparseCallback(method, **CASES[method])
    resumed = trainer(tmp_path, callback, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    found = result(resumed, callback)
    assert found["losses"] == expected["losses"]
    assert equal(found, expected)


def moves(folder, method="set", **settings):
    """Return the steps after which the masks had moved, and the callback."""
    masks, moved = {}, []

    class Watching(SparseCallback):
        def on_step_end(self, args, state, control, **_):
            masks[state.global_step] = snapshot(self.masking)
            if not same(masks.get(state.global_step - 1, masks[state.global_step]), masks[state.global_step]):
                moved.append(state.global_step - 1)

    callback = Watching(method, density=0.2)
    made = trainer(folder, callback, save_strategy="no", **settings)
    made.train()
    assert_masks_hold(callback.masking)
    return moved, made, callback


def test_masks_move_when_an_epoch_begins_and_not_after_the_last(tmp_path):
    moved, _, callback = moves(tmp_path)
    assert moved == [5, 10]
    assert callback.masking.steps == 15


def test_accumulated_gradients_count_as_one_step(tmp_path):
    moved, _, callback = moves(tmp_path, gradient_accumulation_steps=2)  # 3 steps an epoch
    assert moved == [3, 6]
    assert callback.masking.steps == 9


def test_the_method_takes_the_steps_of_the_trainer(tmp_path):
    _, _, callback = moves(tmp_path, "rigl", max_steps=8)
    assert callback.masking.updates.last == 6  # 0.75 of them


def test_the_log_of_the_trainer_has_density_and_flops(tmp_path, capsys):
    _, made, callback = moves(tmp_path)
    records = [record for record in made.state.log_history if "loss" in record]
    assert len(records) == 15
    for record in records:
        assert record["density"] == callback.masking.density == pytest.approx(0.2, abs=1e-3)
        assert 0.2 < record["inference_flops"] < 0.5
        assert record["training_flops"] == pytest.approx(record["inference_flops"])
    said = capsys.readouterr()
    assert all(line.startswith("{'") for line in said.out.splitlines()), "the Trainer's own records alone"


def test_counting_flops_changes_no_random_number(tmp_path):
    losses = []
    for example in (None, {"input_ids": torch.zeros(1, 6, dtype=torch.long)}):
        callback = SparseCallback("set", density=0.2, example=example)
        made = trainer(tmp_path, callback, save_strategy="no", num_train_epochs=1)
        made.train_dataset.__class__ = Noisy
        made.train()
        losses.append(result(made, callback)["losses"])
    assert losses[0] == losses[1]


def test_data_without_indices_need_no_flops(tmp_path):
    callback = SparseCallback("set", density=0.2)
    made = trainer(tmp_path, callback, save_strategy="no", max_steps=4)
    made.train_dataset = Stream()
    made.train()
    record = made.state.log_history[0]
    assert record["density"] == callback.masking.density
    assert "inference_flops" not in record


def test_a_dense_checkpoint_is_refused(tmp_path):
    trainer(tmp_path, transformers.TrainerCallback(), max_steps=2).train()
    made = trainer(tmp_path, SparseCallback("set"), max_steps=4)
    with pytest.raises(RuntimeError, match=r"Expected a checkpoint with masks.*without resume_from_checkpoint"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_dense_run_takes_a_sparse_checkpoint_and_not_its_masks_along(tmp_path):
    trainer(tmp_path, SparseCallback("set"), max_steps=2).train()
    dense = trainer(tmp_path, transformers.TrainerCallback(), max_steps=3)
    dense.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert dense.state.global_step == 3
    sparse = trainer(tmp_path, SparseCallback("set"), max_steps=4)
    with pytest.raises(RuntimeError, match="Expected a checkpoint with masks"):
        sparse.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_reporter_behind_the_callback_sees_the_figures(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    made = trainer(tmp_path, SparseCallback("set"), max_steps=2, save_strategy="no")
    made.add_callback(Reporter())
    made.train()
    assert {"density", "inference_flops", "training_flops", "loss"} <= seen[0].keys()
    assert "density" not in seen[-1], "the summary of the run is no training record"


@pytest.mark.parametrize(("setting", "name"), [("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")])
def test_divided_weights_are_refused(setting, name, tmp_path):
    made = trainer(tmp_path, SparseCallback("set"))
    setattr(made.args, setting, True)
    with pytest.raises(RuntimeError, match=rf"Expected whole weights in every process.*Got {name}"):
        made.callback_handler.on_train_begin(made.args, made.state, made.control)


def test_a_second_train_goes_on_with_the_masks(tmp_path):
    _, made, callback = moves(tmp_path)
    first = snapshot(callback.masking)
    earlier = callback.masking
    made.args.num_train_epochs = 1
    made.train()
    assert callback.masking is not earlier
    assert not earlier.layers
    assert callback.masking.steps == 5
    assert same(snapshot(callback.masking), first)
    result(made, callback)


def test_the_same_trainer_goes_back_to_a_checkpoint(tmp_path):
    callback = SparseCallback("set", density=0.2)
    made = trainer(tmp_path, callback, max_steps=7)
    made.train()
    expected = result(made, callback)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert equal(result(made, callback), expected)


def test_the_masks_are_those_of_the_best_model(tmp_path):
    callback = SparseCallback("set", density=0.2)
    best = dict(load_best_model_at_end=True, metric_for_best_model="step", greater_is_better=False)
    made = trainer(tmp_path, callback, Examples(), eval_strategy="epoch", save_strategy="epoch", **best)
    made.compute_metrics = lambda _: {"step": made.state.global_step}
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-5")
    assert callback.masking.steps == 5
    callback.masking.check()
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    callback.masking.apply_mask()
    assert all(map(torch.equal, made.model.parameters(), before))


def train_replica(folder):
    set_torchrun_variables()
    results = []
    for checkpoint in (None, folder / "checkpoint-3"):
        callback = SparseCallback("set", density=0.2)
        made = trainer(folder, callback, ddp_backend="gloo", per_device_train_batch_size=4)
        made.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        results.append(result(made, callback))
    return results


def test_two_replicas_agree_and_go_on(tmp_path):
    (whole, resumed), (other, _) = run(train_replica, 2, tmp_path)
    assert equal(whole, other)
    assert equal(whole, resumed)
    assert whole["losses"] == resumed["losses"]
