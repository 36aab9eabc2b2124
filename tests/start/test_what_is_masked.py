"""What is masked in the models that people use: weights of layers, and nothing else. Nothing dies of its masks.

    python tests/start/test_what_is_masked.py

writes the golden files anew: for each model the names of masked parameters, with # for numbers, and how a weight whose
inputs come first, or that holds experts, is read. Models are built on the meta device, without memory for weights.
"""

import json
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_masks_hold
from torch import nn

from sparselearning import Masking
from sparselearning.orientation import PLAIN
from sparselearning.start.maskable import judge
from sparselearning.start.parametrized import stored_weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GOLDEN = Path(__file__).parent / "golden"


def golden(library):
    path = GOLDEN / f"{library}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def build_timm(name, device="meta"):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        return timm.create_model(name)


def build_transformers(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.for_model(name)
        except ValueError:
            pytest.skip(f"this transformers has no {name}")
        known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return (transformers.AutoModelForCausalLM if known else transformers.AutoModel).from_config(config)


BUILDERS = {"timm": build_timm, "transformers": build_transformers}


def masked_in(model):
    """Return the pattern of names of masked parameters -> how the weight is read, in words, or an empty string."""
    found = {}
    for name, _, reason, way, _ in judge(model):
        if not reason:
            words = ["experts"] * way.stacked + ["inputs first"] * way.inputs_first
            found[re.sub(r"\d+", "#", name)] = "" if way == PLAIN else ", ".join(words)
    return dict(sorted(found.items()))


MODELS = [(library, name) for library in BUILDERS for name in golden(library)]


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_weights_of_layers_are_masked_and_nothing_else(library, name):
    model = BUILDERS[library](name)
    assert masked_in(model) == golden(library)[name]
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    owners = {id(p): part for part in model.modules() for p in part.parameters(recurse=False)}
    owners |= {id(each.parameter): each.module for each in stored_weights(model)}
    for _, parameter, reason, _, _ in judge(model):
        owner = owners[id(parameter)]
        known = isinstance(owner, layers) or type(owner).__name__ == "Conv1D" or "Expert" in type(owner).__name__
        assert reason or (known and parameter.dim() > 1)


SMALL = ["convnext_atto", "deit_tiny_patch16_224", "mambaout_femto", "mobilenetv3_small_050", "xcit_nano_12_p8_224",
         "swiftformer_xs", "edgenext_xx_small"]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_nothing_dies_of_its_masks(name):
    torch.manual_seed(0)
    model = build_timm(name, "cpu")
    scales = {name: p.clone() for name, p in model.named_parameters() if p.dim() < 2 or "scale" in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    masking = Masking(optimizer, None, 0.3, prune_every_k_steps=2)
    masking.add_module(model, density=0.05)
    assert all(torch.equal(p, scales[name]) for name, p in model.named_parameters() if name in scales)
    count, images = masking.total_nonzero, torch.randn(2, 3, 224, 224)
    for _ in range(4):
        optimizer.zero_grad()
        output = model(images)
        assert output.isfinite().all()
        output.square().mean().backward()
        optimizer.step()
    assert masking.total_nonzero == count
    assert_masks_hold(masking)


def write_golden():
    for library, names in {"timm": timm_names(), "transformers": TRANSFORMERS}.items():
        found = {}
        for name in names:
            try:
                found[name] = masked_in(BUILDERS[library](name))
            except Exception as error:
                print(f"{library} {name}: {error}", file=sys.stderr)
        (GOLDEN / f"{library}.json").write_text(json.dumps(found, indent=1) + "\n")


def timm_names():
    """Return the smallest-named model of each of timm's families."""
    import timm

    families = {}
    for name in timm.list_models():
        families.setdefault(timm.models._registry._model_to_module[name], []).append(name)
    small = ("tiny", "small", "atto", "nano")
    return [min(names, key=lambda n: (not any(s in n for s in small), len(n), n)) for names in families.values()]


TRANSFORMERS = """albert bart beit bert big_bird blip bloom clip convnext deberta-v2 deepseek_v3 deit dinov2 distilbert
electra falcon gemma gemma2 gemma3_text gpt2 gpt_neo gpt_neox gpt_oss gptj granitemoe hubert jamba jetmoe llama
llama4_text longformer mamba mamba2 marian mbart mistral mixtral mpt olmo olmoe opt pegasus phi phi3 qwen2 qwen2_moe
qwen3 qwen3_moe recurrent_gemma reformer roberta rwkv siglip swin switch_transformers t5 vit wav2vec2 whisper xlnet
zamba""".split()  # noqa: SIM905

if __name__ == "__main__":
    write_golden()
