"""gpt and llama: what is masked, caches of keys and values, converted models, drawing tokens."""

import json

import pytest
import torch
from helpers import masked
from small_text import script  # noqa: F401  (puts language/ where networks.py is found)
from torch import nn

from sparselearning.models.attention import attend
from sparselearning.models.generation import draw, generate, load, save
from sparselearning.models.gpt import GPT
from sparselearning.models.llama import Llama, rotate
from sparselearning.sparse import available, convert, in_place
from sparselearning.sparse import save as save_any
from sparselearning.sparse.in_place import Times
from sparselearning.start.maskable import maskable_parameters

SIZES = dict(layers=2, width=32, heads=4, context=12)
MODELS = {
    "gpt": lambda: GPT(50, **SIZES),
    "gpt, own head": lambda: GPT(50, **SIZES, tied=False),
    "llama": lambda: Llama(50, **SIZES),
    "llama, 2 key/value heads": lambda: Llama(50, **SIZES, kv_heads=2),
}


@pytest.fixture(params=[*MODELS])
def model(request):
    return MODELS[request.param]().eval()


def tokens_of(count, batch=1):
    return torch.randint(50, (batch, count))


def test_masks_go_on_attention_and_mlp_alone(model):
    names = [name for name, _ in maskable_parameters(model)]
    linears = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert names == [name for name in linears if name != "head.weight"]
    assert all(".attention." in name or ".mlp." in name for name in names)


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 1, 5], [12]])
def test_reading_with_a_cache_equals_reading_at_once(model, parts):
    tokens, cache = tokens_of(12, batch=3), model.new_cache()
    read = torch.cat([model(part, cache) for part in tokens.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(read, model(tokens))


@torch.no_grad()
def test_a_token_does_not_see_those_after_it(model):
    tokens = tokens_of(12)
    other = tokens.clone()
    other[0, 7:] = (other[0, 7:] + 1) % 50
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


def uncached(model, prompt, count, context):
    """The likeliest tokens, with the whole window read for each."""
    seen, first = list(prompt), max(len(prompt) - context, 0)
    for _ in range(count):
        if len(seen) - first > context:
            first = len(seen) - context // 2
        seen.append(int(model(torch.tensor([seen[first:]]))[0, -1].argmax()))
    return seen[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4, 12, 20])
def test_generation_equals_generation_without_a_cache(model, length):
    prompt = tokens_of(length)[0].tolist()
    assert [*generate(model, prompt, 30, 12, temperature=0)] == uncached(model, prompt, 30, 12)


def by_dense_layers(models, places, *_, **__):
    """Stand for the times of models: the more dense layers there are, the longer everything takes."""
    dense = [1.0 + sum(isinstance(part, nn.Linear) for part in model.modules()) for model in models]
    return [Times([ms, ms], dict.fromkeys(places, ms), dict.fromkeys(places, ms)) for ms in dense]


@pytest.mark.long
@torch.no_grad()
@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_a_converted_model_generates_the_same(monkeypatch):
    """Token by token with a cache; every layer is made sparse, whatever is faster here."""
    monkeypatch.setattr(in_place, "time_in_turns", by_dense_layers)
    for make in MODELS.values():
        model = make()
        masked(model, density=0.2)
        fast, report = convert(model.eval(), tokens_of(1))
        assert sum(layer.replaced for layer in report.layers) == len([*maskable_parameters(model)]), report
        tokens, caches = tokens_of(8), (model.new_cache(), fast.new_cache())
        for token in tokens.split(1, dim=1):
            torch.testing.assert_close(fast(token, caches[1]), model(token, caches[0]))
        written = [[*generate(each, [1, 2], 20, 12, temperature=0)] for each in (model, fast)]
        assert written[0] == written[1]


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    angles = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.1])
    turns = angles.cos(), angles.sin()
    x = torch.randn(4)
    turned = rotate(x.expand(1, 1, 9, 4), turns)[0, 0]
    torch.testing.assert_close(turned.norm(dim=1), x.norm().expand(9))
    products = turned @ turned.T
    for distance in range(9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(turned[0], x)


def test_attention_is_softmax_of_products_of_what_was_seen():
    query, keys, values = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    for new in range(2):
        seen = 4 + new
        weights = (query[0, :, new, None] * keys[0, :, :seen]).sum(-1).div(2).softmax(-1)
        expected = (weights[..., None] * values[0, :, :seen]).sum(1)
        torch.testing.assert_close(attend(query, keys, values)[0, :, new], expected)


def test_tokens_are_drawn_from_the_likeliest():
    logits = torch.tensor([1.0, 3.0, 2.0, -5.0])
    assert {draw(logits, temperature=0)} == {1}
    assert {draw(logits, temperature=9.0, top_k=2) for _ in range(60)} == {1, 2}
    assert {draw(logits, temperature=99.0) for _ in range(200)} == {0, 1, 2, 3}
    assert [*map(type, generate(GPT(50, **SIZES), [1], 2, 12))] == [int, int]
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(GPT(50, **SIZES), [], 1, 12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT(50, width=32, heads=5), "5 heads divide, got 32"),
        (lambda: Llama(50, width=32, heads=5), "5 heads divide, got 32"),
        (lambda: Llama(50, width=32, heads=4, kv_heads=3), "3 key/value heads divide, got 4"),
        (lambda: Llama(50, width=12, heads=4), "even size.*got 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


GPT2 = dict(model_type="gpt2", n_layer=2, n_embd=32, n_head=4, n_positions=16)
LLAMA = dict(model_type="llama", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
LLAMA |= dict(intermediate_size=48, max_position_embeddings=16)


@torch.no_grad()
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda config: config["model_type"])
def test_models_of_transformers_are_built_and_cached(config, tmp_path):
    pytest.importorskip("transformers")
    from networks import OfTransformers

    (tmp_path / "config.json").write_text(json.dumps(config))
    model = OfTransformers(str(tmp_path / "config.json"), 50, 16).eval()
    assert len([*maskable_parameters(model)]) == {"gpt2": 8, "llama": 14}[config["model_type"]]
    tokens, cache = tokens_of(12), model.new_cache()
    read = torch.cat([model(part, cache) for part in tokens.split([5, 1, 6], dim=1)], dim=1)
    assert read.shape == (1, 12, 50)
    torch.testing.assert_close(read, model(tokens))
    with pytest.raises(ValueError, match="reads at most 16 tokens: take --context 16 or less"):
        OfTransformers(str(tmp_path / "config.json"), 50, 17)
    for wrong in ("nothing", str(tmp_path / "none.json")):
        with pytest.raises(ValueError, match=f"--arch transformers:{wrong} cannot be built"):
            OfTransformers(wrong, 50, 16)


@pytest.mark.long
@torch.no_grad()
@pytest.mark.skipif(not available(), reason="built without sparse kernels")
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_generates_the_same_with_its_cache(name, tmp_path, monkeypatch):
    monkeypatch.setattr(in_place, "time_in_turns", by_dense_layers)
    model = MODELS[name]()
    masked(model, density=0.2)
    fast, _ = convert(model.eval(), tokens_of(1))
    size = save(fast, tmp_path / "model.sparse")
    assert size == (tmp_path / "model.sparse").stat().st_size
    served = load(tmp_path / "model.sparse")
    tokens, caches = tokens_of(9), (fast.new_cache(), served.new_cache())
    for token in tokens.split([1, 3, 1, 4], dim=1):
        torch.testing.assert_close(served(token, caches[1]), fast(token, caches[0]))
    assert caches[1].tokens == 9
    written = [[*generate(each, [1, 2], 20, 12, temperature=0)] for each in (fast, served)]
    assert written[0] == written[1]


def test_a_file_of_another_model_is_named(tmp_path):
    save_any(nn.Linear(3, 2), tmp_path / "other.sparse", torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"Expected a language model in .*other\.sparse, got a model of float32"):
        load(tmp_path / "other.sparse")
