"""Every kind of model that ships as `llama`, bit for bit llama.cpp's logits."""

import pytest
from parity import assert_equal_to_llama_cpp
from real_models import real_models
from tiny_models import BOS

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
         "IQ4_XS")  # fmt: skip
BIASES = r"^output\.weight|\.bias"
ROPE = {"rope.freq_base": 50000.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 64}
VARIANTS = {
    "mha": {"n_head_kv": 4},
    "gqa": {"n_head": 8, "n_head_kv": 2, "n_embd": 256},
    "mqa": {"n_head_kv": 1},
    "one-layer": {"n_layer": 1},
    "head-16": {"head_dim": 16},
    "head-64": {"head_dim": 64},
    "head-80": {"head_dim": 80},
    "head-128": {"head_dim": 128, "n_head": 2, "n_head_kv": 1},
    "head-256": {"head_dim": 256, "n_head": 1, "n_head_kv": 1},
    "head-2": {"head_dim": 2},
    "odd-sizes": {"n_ff": 7, "n_embd": 20, "n_head": 2, "n_head_kv": 2},
    "tied": {"optional": "_exps"},
    "biases": {"optional": BIASES},
    "attention-biases": {"optional": r"attn_[qkv]\.bias"},
    "one-bias": {"optional": r"blk\.1\.ffn_up\.bias"},
    "rope-freqs": {"optional": "rope_freqs"},
    "rope-base": {"metadata": ROPE},
    "rope-none": {"metadata": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}},
    "rope-linear": {"metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    "rope-scale-linear": {"metadata": {"rope.scale_linear": 3.0}},
    "rope-factor-only": {"metadata": {"rope.scaling.factor": 3.0}},
    "rope-attn-factor": {"metadata": {"rope.scaling.attn_factor": 1.5}},
    "yarn": {"metadata": {**YARN, "rope.scaling.factor": 8.0}},
    "yarn-no-original": {"metadata": {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}},
    "yarn-no-factor": {"metadata": YARN},
    "yarn-attn-factor": {"metadata": {**YARN, "rope.scaling.factor": 7.0, "rope.scaling.attn_factor": 1.25}},
    "yarn-factor-below-1": {"metadata": {**YARN, "rope.scaling.factor": 0.5}},
    "yarn-rope-freqs": {"optional": "rope_freqs", "metadata": {**YARN, "rope.scaling.factor": 8.0, **ROPE}},
    "yarn-betas": {"metadata": {**YARN, "rope.scaling.factor": 8.0, "rope.scaling.yarn_beta_fast": 16.0,
                                "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_ext_factor": 0.75}},
    "yarn-log-multiplier": {"metadata": {**YARN, "rope.scaling.factor": 8.0, "rope.scaling.yarn_log_multiplier": 0.5}},
    "eps": {"metadata": {"attention.layer_norm_rms_epsilon": 0.1}},
    "moe-8-2": {"n_expert": 8, "n_expert_used": 2},
    "moe-4-1": {"n_expert": 4, "n_expert_used": 1},
    "moe-4-4": {"n_expert": 4, "n_expert_used": 4},
    "moe-1-1": {"n_expert": 1, "n_expert_used": 1},
    "moe-32-9": {"n_expert": 32, "n_expert_used": 9},
    "moe-no-gate": {"n_expert": 4, "n_expert_used": 2, "optional": r"^output\.weight"},
    "moe-one-gate": {"n_expert": 4, "n_expert_used": 2, "optional": r"blk\.0\.ffn_gate_exps"},
    "mixed-types": {"type": "Q4_0", "types": {"attn_v": "Q8_0", "token_embd": "F16", "ffn_down": "Q5_1"}},
}  # fmt: skip


@pytest.fixture(params=[True, False], ids=["flash", "soft-max"])
def flash_attn(request):
    return request.param


@pytest.mark.parametrize("type", TYPES)
def test_types(tiny_gguf, type, flash_attn):
    assert_equal_to_llama_cpp(tiny_gguf(type=type, n_embd=256, n_ff=512, n_head=8), flash_attn=flash_attn)


@pytest.mark.parametrize("type", TYPES)
def test_types_of_experts(tiny_gguf, type, flash_attn):
    path = tiny_gguf(type=type, n_embd=256, n_ff=256, n_head=8, n_expert=4, n_expert_used=2, n_layer=1)
    assert_equal_to_llama_cpp(path, flash_attn=flash_attn)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tiny_gguf, variant, flash_attn):
    assert_equal_to_llama_cpp(tiny_gguf(**VARIANTS[variant]), flash_attn=flash_attn)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("types", ["F32 F32", "BF16 BF16", "Q8_0 Q8_0", "Q4_0 Q4_0", "Q8_0 F16", "F16 Q4_0", "F32 F16"])
def test_types_of_the_cache(tiny_gguf, head_dim, types):
    type_k, type_v = types.split()
    path = tiny_gguf(head_dim=head_dim, type="Q8_0")  # quantised heads of 64 and 128 are rotated, those of 32 are not
    assert_equal_to_llama_cpp(path, type_k=type_k, type_v=type_v)


@pytest.mark.parametrize("types", ["F32 F32", "BF16 BF16", "Q8_0 F16", "Q4_0 F32", "F32 BF16"])
def test_types_of_the_cache_without_flash_attention(tiny_gguf, types):
    type_k, type_v = types.split()
    for head_dim in (32, 64):
        path = tiny_gguf(head_dim=head_dim, type="Q8_0")
        assert_equal_to_llama_cpp(path, type_k=type_k, type_v=type_v, flash_attn=False)


@pytest.mark.parametrize("n_ubatch", [1, 7, 512])
def test_sizes_of_ubatches(tiny_gguf, n_ubatch, flash_attn):
    assert_equal_to_llama_cpp(tiny_gguf(type="Q4_0"), n_ubatch=n_ubatch, flash_attn=flash_attn)


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_K"])
def test_two_threads(tiny_gguf, type, flash_attn):
    path = tiny_gguf(type=type, n_embd=256, n_ff=512, n_head=8)
    assert_equal_to_llama_cpp(path, n_threads=2, flash_attn=flash_attn)


def test_two_threads_and_experts(tiny_gguf, flash_attn):
    path = tiny_gguf(type="Q8_0", n_expert=4, n_expert_used=2)
    assert_equal_to_llama_cpp(path, n_threads=2, flash_attn=flash_attn)


@pytest.mark.parametrize(
    "path", real_models("tiny-*.gguf", "stories260K-*-[fq]*.gguf", "stories4M-base-*.gguf"), ids=lambda path: path.stem
)
def test_real_models(path, flash_attn):
    if "lora" in path.stem:
        pytest.skip("low-rank, not a model")
    ids = [BOS, *(3 + (i * 37) % 250 for i in range(120))]
    assert_equal_to_llama_cpp(path, ids, flash_attn=flash_attn)
