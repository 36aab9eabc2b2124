"""The architectures of torchvision, timm and transformers compute the same after `convert` and `remove_dead_units`.

All layers become sparse that can, whatever their time.
"""

import importlib.util

import pytest
import torch
import torchvision
from helpers_conversion import cut_units, outputs_differ, sparsify

from sparselearning.sparse import available, convert, remove_dead_units

pytestmark = [
    pytest.mark.skipif(not available(), reason="built without sparse kernels"),
    pytest.mark.usefixtures("always_faster"),
]
# The size of the images.
TORCHVISION = {
    "alexnet": 63, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "fcn_resnet50": 32, "googlenet": 32,
    "inception_v3": 75, "lraspp_mobilenet_v3_large": 32, "maxvit": 64, "mnasnet0_5": 32, "mnasnet1_0": 32,
    "mobilenet_v2": 32, "mobilenet_v3_large": 32, "mobilenet_v3_small": 32, "regnet_x_400mf": 32, "regnet_y_400mf": 32,
    "resnet18": 32, "resnet34": 32, "resnet50": 32, "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32,
    "shufflenet_v2_x1_0": 32, "squeezenet1_0": 33, "squeezenet1_1": 33, "swin_t": 32, "swin_v2_t": 32, "vgg11": 32,
    "vgg11_bn": 32, "vit_b_16": 32, "wide_resnet50_2": 32,
}  # fmt: skip
SLOW = ("inception_v3", "swin_v2_t", "vgg11_bn")  # what takes longest
# The share of layers that become sparse: not parts that only train, and not attention, which reads weights itself.
SHARES = {"googlenet": 0.9, "inception_v3": 0.9, "swin_t": 0.5, "swin_v2_t": 0.6, "vit_b_16": 0.65}
TIMM = {
    "convmixer_768_32": 32, "cspdarknet53": 64, "dla34": 64, "ghostnet_100": 32, "hrnet_w18_small": 64,
    "mixer_s16_224": 224, "nfnet_f0": 32, "poolformer_s12": 64, "repvgg_a0": 32, "res2net50_26w_4s": 32,
    "rexnet_100": 32, "tf_efficientnet_lite0": 32, "xception41": 64,
}  # fmt: skip


def torchvision_model(name):
    """Return a small model of an architecture, and images that it takes."""
    size = TORCHVISION[name]
    if name == "maxvit":
        parts = dict(stem_channels=16, partition_size=2, block_channels=[16, 32], block_layers=[1, 1], head_dim=16)
        model = torchvision.models.MaxVit((size, size), stochastic_depth_prob=0.0, num_classes=4, **parts)
    else:
        more = dict(image_size=size) if name.startswith("vit") else {}
        more |= dict(init_weights=False) if name in ("googlenet", "inception_v3") else {}
        more |= dict(weights_backbone=None) if "cn_" in name or "lraspp" in name else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=4, **more)
    return model, torch.randn(2, 3, size, size)


def timm_model(name):
    import timm

    return timm.create_model(name, num_classes=4), torch.randn(2, 3, TIMM[name], TIMM[name])


def assert_equal(model, changed, images):
    with torch.no_grad():
        outputs = [output if isinstance(output, dict) else {"": output} for output in (model(images), changed(images))]
    for name, expected in outputs[0].items():
        size = expected.abs().max().item()
        torch.testing.assert_close(outputs[1][name], expected, rtol=1e-4, atol=1e-4 * size)


def check(model, images, density, share):
    converted, report = convert(sparsify(model, density), images)
    assert report.verified.startswith("outputs equal on the example, a second input")
    assert sum(layer.replaced for layer in report.layers) >= share * len(report.layers)
    for batch in (2, 16):
        assert_equal(model, converted, torch.randn(batch, *images.shape[1:]))
    cut_units(model)
    small, removed = remove_dead_units(model, images)
    assert not removed.notes
    assert_equal(model, small, torch.randn(2, *images.shape[1:]))


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TORCHVISION]
)
def test_torchvision_models_stay_exact(name):
    check(*torchvision_model(name), 0.2, SHARES.get(name, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_stay_exact_at_other_densities(name, density):
    check(*torchvision_model(name), density, SHARES.get(name, 1.0))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("name", TIMM)
def test_timm_models_stay_exact(name, density):
    check(*timm_model(name), density, 0.3 if name == "nfnet_f0" else 0.9)  # whose convolutions are subclasses


def transformers_model(name):
    """Return a small model of transformers, and its arguments by name."""
    import transformers

    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    t5 = dict(vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    ids = torch.randint(3, 50, (2, 7))
    given = dict(input_ids=ids, attention_mask=(torch.arange(7) < torch.tensor([[7], [5]])).long())
    config, model, given = {
        "bert": (transformers.BertConfig(**sizes), transformers.BertForSequenceClassification, given),
        "llama": (transformers.LlamaConfig(**sizes), transformers.LlamaForCausalLM, given),
        "opt": (transformers.OPTConfig(vocab_size=60, hidden_size=32, ffn_dim=48, word_embed_proj_dim=32,
                                       num_hidden_layers=2, num_attention_heads=2), transformers.OPTForCausalLM, given),
        "t5": (transformers.T5Config(**t5), transformers.T5ForConditionalGeneration,
               dict(input_ids=ids, decoder_input_ids=ids)),
    }[name]  # fmt: skip
    return model(config), given


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("name", ["bert", "llama", "opt", "t5"])
def test_transformers_models_stay_exact(name):
    model, given = transformers_model(name)
    converted, report = convert(sparsify(model, 0.3), given)
    assert not outputs_differ(model, converted, given)
    assert sum(layer.replaced for layer in report.layers) >= 0.85 * len(report.layers)
    cut_units(model)
    small, removed = remove_dead_units(model, given)
    assert not outputs_differ(model, small, given)
    assert not removed.notes
