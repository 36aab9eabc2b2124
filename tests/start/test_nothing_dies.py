"""Models that people use, at density 0.05: nothing is dead before training, and 20 steps keep counts and zeros.

Alive is a parameter whose gradient is not all zeros. What is alive in the dense model has to be so under masks; a mask
on a scale, or an emptied layer, would cut a residual branch off. Densities are those of Erdos-Renyi, because the same
one everywhere leaves depthwise convolutions hardly any weights (docs/patterns.md). A few models run always, all by
`make soak`.
"""

import copy
import os
import warnings

import pytest
import torch
from helpers import assert_masks_hold
from torch import Tensor

from sparselearning import Masking
from sparselearning.start.maskable import named_parameters

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

ALWAYS = {"test_resnet", "test_vit", "mobilenetv3_small_050", "gpt2", "t5", "mixtral", "mamba", "wav2vec2"}
# Models of timm that take images of any size, and those that have to be told it.
ANY_SIZE = """cpubone_nano cs3darknet_focus_s csatv2 cspnext_tiny densenet121 dla46_c dpn48b edgenext_xx_small
efficientvim_m1 efficientvit_b0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 ghostnet_050
hardcorenas_b hgnetv2_b0 iformer_t inception_next_atto lcnetv2_small legacy_seresnet18
mobilenetv3_small_050 pvt_v2_b0 regnetx_002 repghostnet_050 resnest14d resnetv2_18
rexnet_100 skresnet18 starnet_s050 test_convnext test_convnext2 test_convnext3
test_efficientnet test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln test_mambaout
test_nfnet test_resnet tiny_vit_5m_224 tinynet_e""".split()  # noqa: SIM905
ONE_SIZE = """cait_xxs24_224 convit_tiny deit_tiny_patch16_224 efficientformerv2_s0 efficientvit_m0
eva02_tiny_patch14_224 gcvit_xxtiny gmlp_ti16_224 levit_128 mobilevit_xxs pit_ti_224
repvit_m1 swiftformer_xs test_byobnet test_coatnet test_maxvit test_vit test_vit2 test_vit3
test_vit4 test_vit_relpos visformer_tiny xcit_nano_12_p8_224""".split()  # noqa: SIM905

WIDTHS = dict.fromkeys(["hidden_size", "embedding_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"], 64)
WIDTHS |= dict.fromkeys(
    ["intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "ffn_dim",
     "moe_intermediate_size", "shared_expert_intermediate_size", "vocab_size", "n_positions",
     "max_position_embeddings"], 96,
)  # fmt: skip
WIDTHS |= dict.fromkeys(
    ["num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers",
     "num_key_value_heads", "num_experts_per_tok", "eos_token_id"], 2,
)  # fmt: skip
WIDTHS |= dict.fromkeys(
    ["num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads", "n_head", "n_heads",
     "num_local_experts", "num_experts", "n_routed_experts"], 4,
)  # fmt: skip
WIDTHS |= dict(head_dim=16, d_kv=16, image_size=32, patch_size=8, pad_token_id=0, bos_token_id=1)
OWN = {  # what a model needs besides
    "convnext": dict(hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 2, 2], num_stages=4, patch_size=4),
    "swin": dict(embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4),
    "wav2vec2": dict(conv_dim=[32, 32], conv_stride=[8, 8], conv_kernel=[10, 8], num_feat_extract_layers=2,
                     num_conv_pos_embedding_groups=4, mask_time_prob=0.0),
    "hubert": dict(conv_dim=[32, 32], conv_stride=[8, 8], conv_kernel=[10, 8], num_feat_extract_layers=2,
                   num_conv_pos_embedding_groups=4, mask_time_prob=0.0),
    "gptj": dict(rotary_dim=8),
    "deepseek_v3": dict(qk_rope_head_dim=8, qk_nope_head_dim=8, qk_head_dim=16, head_dim=8, v_head_dim=16,
                        kv_lora_rank=16, q_lora_rank=16, n_group=1, topk_group=1, first_k_dense_replace=1),
    "mamba2": dict(num_heads=8, head_dim=16, n_groups=1, state_size=16),
}  # fmt: skip
TRANSFORMERS = """albert bart beit bert big_bird bloom convnext deberta-v2 deepseek_v3 deit dinov2 distilbert electra
falcon gemma gemma2 gemma3_text gpt2 gpt_neo gpt_neox gpt_oss gptj granitemoe hubert jetmoe llama
llama4_text longformer mamba mamba2 marian mbart mistral mixtral mpt olmo olmoe opt pegasus phi phi3
qwen2 qwen2_moe qwen3 qwen3_moe roberta swin switch_transformers t5 vit wav2vec2 whisper xlnet""".split()  # noqa: SIM905


def shrunk(config, name):
    """Return a configuration of transformers with small numbers where it has numbers."""
    for key, value in WIDTHS.items():
        own = config.attribute_map.get(key, key)
        if type(vars(config).get(own)) is int:  # others are computed from these
            setattr(config, own, value)
    for key, value in OWN.get(name, {}).items():
        setattr(config, key, value)
    config.pad_token_id = 0
    return config


def build_transformers(name):
    """Return a small model and its inputs."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.set_verbosity_error()
    try:
        config = shrunk(transformers.AutoConfig.for_model(name), name)
    except ValueError:
        pytest.skip(f"this transformers has no {name}")
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    model = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)
    kinds = {
        "input_ids": torch.randint(3, 90, (2, 12)),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "input_values": torch.randn(2, 2000),
    }
    inputs = {model.main_input_name: kinds[model.main_input_name]}
    if getattr(config, "is_encoder_decoder", False) and not causal:
        inputs["decoder_input_ids"] = torch.randint(3, 90, (2, 6))
    return model, inputs


def build_timm(name):
    """Return a model and images."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = timm.create_model(name, num_classes=10, **(dict(img_size=64) if name in ONE_SIZE else {}))
    return model, {None: torch.randn(2, 3, 64, 64)}


def loss_of(model, inputs):
    output = model(*inputs.values()) if None in inputs else model(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    assert output.isfinite().all()
    return (output.float() - 1).square().mean()


def alive(model, inputs, dtype):
    """Return the names of parameters whose gradients are not all zeros in this precision."""
    model = copy.deepcopy(model).to(dtype).eval()
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    loss_of(model, inputs).backward()
    return {name for name, p in named_parameters(model) if p.grad is not None and p.grad.any()}


def check(model, inputs, dtype=torch.float32):
    before = alive(model, inputs, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    masking = Masking(optimizer, None, 0.3, prune_every_k_steps=5)
    masking.add_module(model, 0.05, "erdos_renyi_kernel")
    count, size = masking.total_nonzero, sum(mask.numel() for mask in masking.masks.values())
    assert count == max(round(0.05 * size), len(masking.layers))
    dead = before - alive(model, inputs, dtype)
    assert not dead
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
        assert masking.total_nonzero == count
    assert_masks_hold(masking)
    masking.check()


def marked(names):
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(TRANSFORMERS))
def test_nothing_dies_in_a_model_of_transformers(name):
    torch.manual_seed(0)
    check(*build_transformers(name))


@pytest.mark.parametrize("name", marked([*ANY_SIZE, *ONE_SIZE]))
def test_nothing_dies_in_a_model_of_timm(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(*build_timm(name), dtype=torch.float64)  # small gradients vanish in float32
