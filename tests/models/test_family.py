"""Every registered architecture, bit for bit llama.cpp's logits; more of `llama` is in test_parity.py."""

import re

import numpy as np
import pytest
from loras import write_lora
from parity import assert_equal_to_llama_cpp, differences
from reference import Reference
from tiny_models import (
    EXPERTS,
    LINEAR,
    NEMOTRON,
    NO_ATTENTION,
    NOTHING,
    SHARED,
    WINDOW,
    Tiny,
    layer_sizes,
    random_ids,
)

import pyggml_adapt as pga
from pyggml_adapt.models import architectures

OWN_HEAD = r"^output\."
FORMS = {  # of every architecture: which optional tensors there are, and the type of the matrices
    "plain": {"optional": r"^output\.weight|_exps"},
    "all": {"optional": r"^(?!.*attn_qkv)", "type": "Q8_0"},
    "none": {"optional": "^$"},
    "fused": {"optional": r"attn_qkv|_exps", "type": "F16"},
    "fused-no-bias": {"optional": r"attn_qkv\.weight"},
}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 64, "rope.scaling.factor": 8.0}
PARTIAL = {"rope.dimension_count": 16}
GRANITE = {"logit_scale": 8.0}
SMALL = {"n_embd": 32, "n_ff": 32, "n_head": 2, "n_head_kv": 1}
HEAD_64 = {"head_dim": 64}
LONGROPE = {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.19}
SHORT = {**LONGROPE, "rope.scaling.original_context_length": 512}  # the long factors are for n_ctx above it
LONG = {**LONGROPE, "rope.scaling.original_context_length": 256}
MXFP4 = {"_exps.weight": "MXFP4"}
NEXTN = {"n_layer": 4, "optional": r"^output\.|_norm|attn_[qkv]\.bias|^blk\.3"}
VARIANTS = [
    ("qwen2", {"metadata": YARN}),
    ("qwen2", {"n_head": 6, "n_head_kv": 3, "n_embd": 96}),
    ("qwen2", {"optional": r"output\.bias|attn_[qkv]\.bias"}),
    ("qwen3", {**HEAD_64, "metadata": {"attention.layer_norm_rms_epsilon": 0.1}}),
    ("qwen3", {"metadata": YARN}),
    ("qwen3moe", {**HEAD_64, "metadata": {"expert_count": 8, "expert_used_count": 1}}),
    ("qwen3moe", {"metadata": {"expert_feed_forward_length": None, "expert_used_count": 3}}),
    ("qwen3moe", {"type": "Q4_0", "metadata": {"expert_count": 32, "expert_used_count": 9}}),
    ("qwen2moe", {"metadata": {"expert_feed_forward_length": None, "expert_used_count": 3}}),
    ("qwen2moe", {"metadata": {"expert_shared_feed_forward_length": None}}),
    ("granite", {"metadata": {"rope.scaling.finetuned": False}}),
    ("granite", {"optional": r"attn_qkv", "metadata": {"rope.scaling.finetuned": False}}),
    ("granite", {"metadata": {"residual_scale": None, "embedding_scale": None, "attention.scale": None}}),
    ("granite", {"metadata": EXPERTS}),
    ("granite", {"metadata": {**EXPERTS, "expert_shared_feed_forward_length": 64}, "optional": "^$"}),
    ("granitemoe", {"metadata": {"expert_shared_feed_forward_length": 64, "rope.scaling.finetuned": False}}),
    ("granitemoe", {"metadata": {"attention.scale": 0.25, "expert_count": 0, "expert_used_count": 0}}),
    ("minicpm", {"metadata": {"embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 4.0}}),
    ("minicpm", {"metadata": EXPERTS, "n_layer": 3}),
    ("smollm3", {"n_layer": 5}),
    ("smollm3", {"n_layer": 4, "optional": "attn_qkv", "metadata": YARN}),
    ("olmo2", {"n_head_kv": 4, "metadata": YARN}),
    ("olmo2", {"metadata": {"attention.sliding_window": 0}}),
    ("olmo2", {"n_layer": 5, "metadata": {**YARN, **WINDOW, "rope.freq_base_swa": 500.0}}),
    ("olmo2", {"n_layer": 2, "metadata": {**YARN, **WINDOW, "attention.sliding_window_pattern": [False, True]}}),
    ("olmoe", {"metadata": {"expert_count": 16, "expert_used_count": 8}}),
    ("olmo", {"metadata": {"attention.clamp_kqv": 0.25}}),
    ("olmo", {"optional": "attn_qkv", "metadata": {"attention.clamp_kqv": 0.25, "attention.layer_norm_epsilon": 0.1}}),
    ("arcee", {"metadata": YARN}),
    ("internlm2", {"metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}}),
    ("seed_oss", HEAD_64),
    ("mistral3", {"metadata": {**YARN, "rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 2.0}}),
    ("mistral3", {"metadata": {**YARN, "rope.scaling.yarn_log_multiplier": 0.5, "rope.scaling.attn_factor": 1.25}}),
    ("mistral3", {"metadata": {**YARN, "rope.scaling.factor": 0.5, "rope.scaling.yarn_log_multiplier": 1.0}}),
    ("mistral3", {"metadata": {"rope.scaling.yarn_beta_fast": 4.0, "attention.temperature_scale": 0.0}}),
    ("mistral3", {"metadata": EXPERTS, **HEAD_64}),
    ("mistral3", {"metadata": {**YARN, "attention.temperature_scale": 0.3}}),
    ("mistral3", {"n_ctx_train": 50, "metadata": {"attention.temperature_scale": -0.1}}),
    ("ernie4_5", HEAD_64),
    ("ernie4_5-moe", {"metadata": {"expert_shared_feed_forward_length": None, "leading_dense_block_count": None}}),
    ("ernie4_5-moe", {"optional": "exp_probs_b", "n_layer": 3}),
    ("hunyuan-dense", {"metadata": {"rope.scaling.alpha": 1000.0}}),
    ("hunyuan-dense", {**HEAD_64, "metadata": {"rope.scaling.alpha": 50.0, "rope.freq_base": 50000.0}}),
    ("hunyuan-dense", {"metadata": {"expert_count": 1, "expert_used_count": 1}}),
    ("hunyuan-moe", {"metadata": {"expert_shared_feed_forward_length": None}}),
    ("stablelm", {"metadata": PARTIAL}),
    ("stablelm", {"optional": "attn_[qk]_norm", "metadata": PARTIAL}),
    ("stablelm", {"optional": "attn_q_norm|ffn_norm.weight"}),
    ("starcoder2", {"metadata": {"attention.layer_norm_epsilon": 0.1}}),
    ("phi2", {"metadata": PARTIAL}),
    ("phi2", {"n_head_kv": 4, "optional": "attn_qkv", "metadata": PARTIAL}),
    ("command-r", {"metadata": {"logit_scale": 0.0625}}),
    ("command-r", {**SMALL, "n_layer": 64, "metadata": {"logit_scale": 0.25}}),
    ("gemma", {**HEAD_64, "n_head_kv": 1}),
    ("gemma", {"metadata": PARTIAL}),
    ("baichuan", {**SMALL, "n_layer": 32}),
    ("baichuan", {**SMALL, "n_layer": 40}),
    ("baichuan", {**SMALL, "n_layer": 40, "n_head": 3, "n_head_kv": 3, "n_embd": 48, "optional": "attn_qkv"}),
    ("gemma2", {"n_layer": 5, "metadata": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}}),
    ("gemma2", {"n_layer": 3, "metadata": {"attention.sliding_window": None, "rope.freq_base_swa": 500.0}}),
    ("gemma2", {"n_layer": 3, "metadata": {"attention.sliding_window_pattern": [False, True, True]}}),
    ("gemma2", {**HEAD_64, "metadata": {"attention.sliding_window_pattern": 0, "rope.freq_base_swa": 500.0}}),
    ("gemma2", {**SMALL, "n_layer": 46, "head_dim": 32}),
    ("gemma2", {"metadata": {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}}),
    ("cohere2", {"metadata": {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}}),
    ("olmo2", {"metadata": {**WINDOW, "rope.scaling.type": "none", "rope.scaling.factor": 8.0}}),
    ("gemma3", {"metadata": {"final_logit_softcapping": 0.0, "attn_logit_softcapping": 0.0}}),
    ("gemma3", {"metadata": {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}}),
    ("gemma3", {"n_layer": 7, "metadata": {"rope.freq_base": 1e6, "rope.freq_base_swa": 500.0}}),
    ("gemma3", {"n_layer": 3, "metadata": {**YARN, "attention.sliding_window_pattern": 2}}),
    ("gemma3", {"metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6}}),
    ("gemma3", {"metadata": {"attention.sliding_window": 0, "final_logit_softcapping": 3.0, "rope.freq_base": 1e6}}),
    ("gemma3", {**SMALL, "n_layer": 62, "head_dim": 32, "optional": "^$", "metadata": {"rope.freq_base": 1e6}}),
    ("cohere2", {"n_layer": 5, "metadata": {"rope.freq_base_swa": 500.0, "logit_scale": 0.0}}),
    ("cohere2", {"n_layer": 3, "metadata": {"attention.sliding_window_pattern": [True, False, True], **PARTIAL}}),
    ("exaone4", {"optional": r"rope_freqs", "metadata": {"attention.sliding_window": 24}}),
    ("exaone4", {**SMALL, "n_layer": 64, "metadata": {**WINDOW, "rope.freq_base_swa": 500.0}}),
    ("exaone4", {**SMALL, "n_layer": 64, "optional": "^rope", "metadata": {"attention.sliding_window_pattern": 3}}),
    ("exaone4", {"n_layer": 3, "optional": r"^output|^blk\.2\.(?!attn_qkv)", "metadata": {"nextn_predict_layers": 1}}),
    ("orion", {"n_head_kv": 4}),
    ("nemotron", {"metadata": PARTIAL}),
    ("exaone", {"metadata": {"rope.freq_base": 50000.0}, "optional": "rope_freqs"}),
    ("glm4", {"metadata": PARTIAL}),
    ("glm4", {**HEAD_64, "metadata": {"rope.dimension_count": 32}, "optional": "attn_[qkv].bias"}),
    ("dots1", {"metadata": {"expert_gating_func": 1, "expert_weights_norm": True, "expert_weights_scale": 2.5}}),
    ("dots1", {"optional": "exp_probs_b", "metadata": {"expert_weights_norm": True, "expert_shared_count": 1}}),
    ("dots1", {"metadata": {"leading_dense_block_count": None, "expert_weights_scale": 1.0}}),
    ("bailingmoe", {"metadata": {**SHARED, "expert_weights_norm": None, "expert_weights_scale": 0.5}}),
    ("deepseek", {"metadata": {"leading_dense_block_count": 0, "expert_weights_scale": 16.0}}),
    ("deepseek", {"n_layer": 3, "metadata": {"leading_dense_block_count": 2, "expert_shared_count": 1}}),
    ("phi3", {"optional": "rope_factors", "metadata": SHORT}),
    ("phi3", {"optional": "rope_factors", "metadata": LONG}),
    ("phi3", {"optional": "rope_factors", "metadata": {**LONG, **PARTIAL, "rope.scaling.factor": 4.0}}),
    ("phi3", {"optional": "rope_factors_long|attn_qkv", "metadata": {**SHORT, "attention.sliding_window": 16}}),
    ("phi3", {"optional": "rope_factors_short|attn_qkv", "metadata": {**SHORT, **PARTIAL}}),
    ("phi3", {"optional": "rope_factors", "metadata": {**YARN, "rope.scaling.attn_factor": 1.19}}),
    ("phimoe", {"optional": "rope_factors", "metadata": {**SHORT, "expert_used_count": 1}}),
    ("phimoe", {"optional": "rope_factors", "metadata": {**LONG, **PARTIAL, "expert_count": 16}}),
    ("phimoe", {"optional": "attn_qkv", "metadata": {**YARN, "attention.sliding_window": 16}}),
    ("glm4moe", {"optional": "attn_q_norm|bias", "metadata": {"leading_dense_block_count": None, **PARTIAL}}),
    ("glm4moe", {"optional": "attn_k_norm|attn_qkv", "metadata": {"expert_gating_func": 1, "expert_shared_count": 1}}),
    ("glm4moe", {"metadata": {"expert_gating_func": 0, "expert_weights_norm": True, "expert_weights_scale": 2.5}}),
    ("glm4moe", {**HEAD_64, "n_layer": 3, "metadata": {"expert_gating_func": 2, "expert_weights_scale": 1.0, **YARN}}),
    ("glm4moe", {**NEXTN, "metadata": {"nextn_predict_layers": 1, "expert_weights_norm": True}}),
    ("glm4moe", {**NEXTN, "optional": "^output", "metadata": {"nextn_predict_layers": 2}}),
    ("deci", NEMOTRON),
    ("deci", {**NEMOTRON, "type": "Q8_0", "optional": r"rope_freqs|\.bias"}),
    ("deci", {**NEMOTRON, "optional": "attn_qkv"}),
    ("deci", layer_sizes(LINEAR, (4, 4, 96), (6, 2, 32), LINEAR)),
    ("deci", layer_sizes((4, 2, 192), NOTHING, NOTHING, NO_ATTENTION)),
    ("deci", {"metadata": {"attention.head_count": 4, "attention.head_count_kv": 2, "feed_forward_length": 96}}),
    ("deci", {**HEAD_64, "metadata": {"attention.head_count": 4, "attention.head_count_kv": None}}),
    ("deci", {"optional": "rope_factors", "metadata": SHORT}),
    ("deci", {"optional": "rope_factors", "metadata": LONG}),
    ("gpt-oss", {"types": MXFP4, "metadata": YARN}),
    ("gpt-oss", {"metadata": {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}}),
    ("gpt-oss", {"types": MXFP4, "type": "Q8_0", "n_layer": 5, "metadata": {"rope.freq_base_swa": 500.0}}),
    ("gpt-oss", {**HEAD_64, "n_layer": 4, "metadata": {**YARN, "attention.sliding_window_pattern": 3}}),
    ("gpt-oss", {"n_layer": 3, "metadata": {"attention.sliding_window_pattern": [False, True, True]}}),
    ("gpt-oss", {"types": MXFP4, "metadata": {"expert_count": 32, "expert_used_count": 4}}),
    ("gpt-oss", {"optional": "attn_qkv", "metadata": {"expert_used_count": 1, "expert_weights_scale": 2.0}}),
    ("llama4", {"metadata": {"interleave_moe_layer_step": 1, "expert_used_count": 1}}),
    ("llama4", {"optional": "rope_freqs", "metadata": {"interleave_moe_layer_step": 0, "block_count": 9}}),
    ("llama4", {"optional": "attn_.*bias", "metadata": {"interleave_moe_layer_step": 3, "block_count": 7}}),
    ("llama4", {**SMALL, "metadata": {"expert_count": 128, "expert_used_count": 1}}),
    ("llama4", {**HEAD_64, "metadata": {**YARN, "rope.freq_base_swa": 500.0, "attention.sliding_window": 16}}),
    ("llama4", {"metadata": {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 500.0}}),
    ("llama4", {"n_layer": 4, "metadata": {"attention.sliding_window_pattern": [False, True, False, True]}}),
    ("apertus", {"metadata": {"xielu.alpha_n": 0.1, "xielu.alpha_p": [0.2, 0.9], "xielu.beta": [0.5, -0.5]}}),
]


@pytest.fixture(params=[True, False], ids=["flash", "soft-max"])
def flash_attn(request):
    return request.param


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize("form", FORMS)
def test_forms(tiny_gguf, arch, form, flash_attn):
    assert_equal_to_llama_cpp(tiny_gguf(arch, **FORMS[form]), random_ids(120), flash_attn=flash_attn)


@pytest.mark.parametrize("arch, variant", VARIANTS, ids=[f"{arch}-{i}" for i, (arch, _) in enumerate(VARIANTS)])
def test_variants(tiny_gguf, arch, variant, flash_attn):
    assert_equal_to_llama_cpp(tiny_gguf(arch, **variant), random_ids(120), flash_attn=flash_attn)


@pytest.mark.parametrize("arch", architectures())
def test_long(tiny_gguf, arch):
    """More tokens than one padded step of n_kv holds, and a cache that is quantised and hence rotated."""
    assert_equal_to_llama_cpp(tiny_gguf(arch, n_embd=256, head_dim=64), type_k="Q8_0", type_v="Q8_0")


# every optional tensor but those that exclude others
EVERYTHING = {"optional": "^(?!.*attn_qkv)", "type": "Q8_0"}


@pytest.mark.parametrize("arch", architectures())
def test_adaptors(arch, tiny_gguf, split_models):
    """Two derivatives, between them changed in tensors of every kind, answer as their own files do."""
    names = {re.sub(r"^blk\.\d+\.", "", spec.name): spec.name for spec in Tiny(arch, **EVERYTHING).tensors()}
    names.pop("rope_freqs.weight", None)
    halves = ["|".join(rf"^{name}$" for name in sorted(names.values())[i::2]).replace(".", r"\.") for i in (0, 1)]
    models = {"base": tiny_gguf(arch, **EVERYTHING)}
    models |= {str(i): tiny_gguf(arch, **EVERYTHING, changed={half: 5}) for i, half in enumerate(halves)}
    ids, rows = random_ids(30), {}
    with pga.Host(*split_models(models), n_threads=1) as host:
        for task, path in models.items():
            with host.session(task, n_ctx=256) as session, pga.Host(path, n_threads=1) as alone:
                rows[task] = session.eval(ids, all_logits=True)
                with alone.session(n_ctx=256) as one:
                    np.testing.assert_array_equal(rows[task], one.eval(ids, all_logits=True))
    assert not np.array_equal(rows["base"], rows["0"])
    assert not np.array_equal(rows["base"], rows["1"])


@pytest.mark.parametrize("fused", [False, True], ids=["q-k-v", "qkv"])
@pytest.mark.parametrize("arch", architectures())
def test_low_rank(arch, fused, tiny_gguf, tmp_path):
    """Low-rank pairs on every matrix, as llama.cpp applies them."""
    options = {"optional": r"^output\.weight|_exps" + ("|attn_qkv" if fused else "")}
    tiny = Tiny(arch, **options)
    has_head = any(spec.name == "output.weight" for spec in tiny.tensors())  # pairs on what is tied are not llama.cpp's
    targets = r"(attn_(q|k|v|qkv|output)|ffn_(up|gate|down)(_exps|_shexp)?|ffn_gate_inp|^output)\.weight"
    lora = write_lora(tmp_path / "lora.gguf", tiny, targets + ("|token_embd" if has_head else ""))
    same = {"n_ubatch": 48, "n_threads": 1}
    base = tiny_gguf(arch, **options)
    with Reference(base, **same) as reference, pga.Host(base, {"lora": lora}, **same) as host:
        reference.set_loras({lora: 1.0})
        with host.session("lora", n_ctx=512) as session, host.session("base", n_ctx=64) as plain:
            assert differences(reference, session, random_ids(120)) == []
            session.rewind(0)
            assert not np.array_equal(session.eval(random_ids(8)), plain.eval(random_ids(8)))
