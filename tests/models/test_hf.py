"""Hugging Face's parameter names: where each is in a GGUF file."""

import pytest
from tiny_models import NEMOTRON, Tiny

from pyggml_adapt.models import HParams, model_class
from pyggml_adapt.models.hf import hf_target
from pyggml_adapt.weights.peft import Target

TOP = ["model.embed_tokens", "model.norm", "lm_head"]
LAYER = [
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj", "block_sparse_moe.gate",
]  # fmt: skip


def model_of(**variant):
    tiny = Tiny(**{"n_head": 4, "n_head_kv": 2, "n_layer": 2, **variant})
    return model_class("llama")(HParams.from_gguf(tiny.all_metadata(), 500))


@pytest.mark.parametrize("n_expert", [0, 3])
def test_every_tensor_has_a_name(n_expert):
    """But rope_freqs, which is computed and no parameter, and Q, K and V in one."""
    model = model_of(n_expert=n_expert, n_expert_used=2 if n_expert else 0)
    target = hf_target(model)
    experts = [f"block_sparse_moe.experts.{i}.w{j}" for i in range(3) for j in (1, 2, 3)]
    modules = TOP + [f"model.layers.{il}.{name}" for il in range(2) for name in LAYER + experts]
    found = [target(f"{module}.{leaf}") for module in modules for leaf in ("weight", "bias")]
    names = {spec.name for spec in model.all_tensors() if "attn_qkv" not in spec.name}
    assert {t.name for t in found if t} == names - {"rope_freqs.weight"}


@pytest.mark.parametrize(("parameter", "expected"), [
    ("model.layers.0.self_attn.q_proj.weight", Target("blk.0.attn_q.weight", 4)),
    ("model.layers.1.self_attn.q_proj.bias", Target("blk.1.attn_q.bias", 4)),
    ("model.layers.0.self_attn.k_proj.weight", Target("blk.0.attn_k.weight", 2)),
    ("model.layers.0.self_attn.k_proj.bias", Target("blk.0.attn_k.bias", 2)),
    ("model.layers.0.self_attn.v_proj.weight", Target("blk.0.attn_v.weight")),
    ("model.layers.0.self_attn.o_proj.weight", Target("blk.0.attn_output.weight")),
    ("model.embed_tokens.weight", Target("token_embd.weight")),
    ("embed_tokens.weight", Target("token_embd.weight")),  # of a LlamaModel, which has no head
    ("lm_head.weight", Target("output.weight")),
    ("model.layers.2.self_attn.q_proj.weight", None),
    ("model.layers.00.self_attn.q_proj.weight", None),
    ("model.layers.0.self_attn.q_proj", None),
    ("model.layers.0.self_attn.q_norm.weight", None),
    ("model.layers.0.block_sparse_moe.experts.0.w1.weight", None),
    ("model.layers.0.mlp.gate.weight", None),
    ("model.layers.self_attn.q_proj.weight", None),
    ("model.layers.0.norm.weight", None),
    ("score.weight", None),
    ("lm_head.bias", None),
    ("", None),
])  # fmt: skip
def test_dense(parameter, expected):
    assert hf_target(model_of())(parameter) == expected


@pytest.mark.parametrize(("parameter", "expected"), [
    ("model.layers.1.block_sparse_moe.experts.2.w1.weight", Target("blk.1.ffn_gate_exps.weight", 0, 2, 3)),
    ("model.layers.1.block_sparse_moe.experts.0.w2.weight", Target("blk.1.ffn_down_exps.weight", 0, 0, 3)),
    ("model.layers.1.block_sparse_moe.experts.1.w3.weight", Target("blk.1.ffn_up_exps.weight", 0, 1, 3)),
    ("model.layers.1.block_sparse_moe.gate.weight", Target("blk.1.ffn_gate_inp.weight")),
    ("model.layers.1.mlp.gate.weight", Target("blk.1.ffn_gate_inp.weight")),
    ("model.layers.1.block_sparse_moe.experts.3.w1.weight", None),
    ("model.layers.1.block_sparse_moe.experts.0.w4.weight", None),
    ("model.layers.1.block_sparse_moe.experts.0.w1.bias", None),
    ("model.layers.1.block_sparse_moe.experts.99999.w1.weight", None),
    ("model.layers.1.mlp.gate_proj.weight", None),
])  # fmt: skip
def test_experts(parameter, expected):
    assert hf_target(model_of(n_expert=3, n_expert_used=2))(parameter) == expected


@pytest.mark.parametrize(("arch", "parameter", "expected"), [
    ("qwen2", "self_attn.q_proj.bias", Target("blk.0.attn_q.bias")),
    ("qwen3", "self_attn.q_norm.weight", Target("blk.0.attn_q_norm.weight")),
    ("qwen3moe", "mlp.experts.3.down_proj.weight", Target("blk.0.ffn_down_exps.weight", 0, 3, 4)),
    ("qwen2moe", "mlp.shared_expert.up_proj.weight", Target("blk.0.ffn_up_shexp.weight")),
    ("qwen2moe", "mlp.shared_expert_gate.weight", None),
    ("granite", "self_attn.k_proj.weight", Target("blk.0.attn_k.weight", 2)),
    ("granitemoe", "block_sparse_moe.router.layer.weight", Target("blk.0.ffn_gate_inp.weight")),
    ("granitemoe", "block_sparse_moe.input_linear.weight", None),
    ("smollm3", "self_attn.q_proj.weight", Target("blk.0.attn_q.weight", 4)),
    ("olmo2", "self_attn.q_proj.weight", Target("blk.0.attn_q.weight")),
    ("olmo2", "post_attention_layernorm.weight", Target("blk.0.post_attention_norm.weight")),
    ("olmo2", "post_feedforward_layernorm.weight", Target("blk.0.post_ffw_norm.weight")),
    ("seed_oss", "post_attention_layernorm.weight", Target("blk.0.post_attention_norm.weight")),
    ("internlm2", "feed_forward.w3.weight", Target("blk.0.ffn_up.weight")),
    ("internlm2", "attention.wqkv.weight", None),
    ("starcoder2", "mlp.c_fc.bias", Target("blk.0.ffn_up.bias")),
    ("phi2", "self_attn.dense.weight", Target("blk.0.attn_output.weight")),
    ("command-r", "self_attn.q_proj.weight", Target("blk.0.attn_q.weight")),
    ("gemma", "mlp.down_proj.weight", Target("blk.0.ffn_down.weight")),
    ("gemma", "input_layernorm.weight", None),
    ("nemotron", "input_layernorm.bias", None),
    ("glm4", "mlp.gate_up_proj.weight", Target("blk.0.ffn_up.weight")),
    ("glm4", "post_attention_layernorm.weight", Target("blk.0.ffn_norm.weight")),
    ("glm4", "post_self_attn_layernorm.weight", Target("blk.0.post_attention_norm.weight")),
    ("dots1", "mlp.gate_proj.weight", Target("blk.0.ffn_gate.weight")),
    ("dots1", "mlp.shared_experts.down_proj.weight", None),  # layer 0 is dense
    ("hunyuan-moe", "mlp.shared_mlp.gate_proj.weight", Target("blk.0.ffn_gate_shexp.weight")),
    ("hunyuan-dense", "self_attn.key_layernorm.weight", Target("blk.0.attn_k_norm.weight")),
    ("bailingmoe", "attention.query_key_value.weight", None),
    ("gpt-oss", "post_attention_layernorm.weight", Target("blk.0.post_attention_norm.weight")),
    ("gpt-oss", "self_attn.o_proj.bias", Target("blk.0.attn_output.bias")),
    ("gpt-oss", "mlp.router.weight", Target("blk.0.ffn_gate_inp.weight")),
    ("gpt-oss", "mlp.experts.gate_up_proj.weight", None),
    ("llama4", "self_attn.q_proj.weight", Target("blk.0.attn_q.weight")),
    ("llama4", "feed_forward.gate_proj.weight", Target("blk.0.ffn_gate.weight")),
    ("llama4", "feed_forward.router.weight", None),  # layer 0 is dense
    ("phi3", "self_attn.qkv_proj.weight", Target("blk.0.attn_qkv.weight")),
    ("phi3", "mlp.gate_up_proj.weight", Target("blk.0.ffn_up.weight")),
    ("phimoe", "block_sparse_moe.experts.1.w2.weight", Target("blk.0.ffn_down_exps.weight", 0, 1, 4)),
    ("phimoe", "post_attention_layernorm.bias", Target("blk.0.ffn_norm.bias")),
    ("glm4moe", "self_attn.q_proj.bias", Target("blk.0.attn_q.bias")),
    ("glm4moe", "post_attention_layernorm.weight", Target("blk.0.post_attention_norm.weight")),
    ("glm4moe", "mlp.gate_proj.weight", Target("blk.0.ffn_gate.weight")),
    ("glm4moe", "mlp.gate.weight", None),  # layer 0 is dense
    ("exaone4", "post_attention_layernorm.weight", Target("blk.0.post_attention_norm.weight")),
    ("gemma2", "post_attention_layernorm.weight", None),
    ("gemma3", "self_attn.q_norm.weight", None),
    ("deci", "self_attn.k_proj.weight", Target("blk.0.attn_k.weight", 2)),
    ("apertus", "feedforward_layernorm.weight", Target("blk.0.ffn_norm.weight")),
])  # fmt: skip
def test_other_architectures(arch, parameter, expected):
    model = model_class(arch)(HParams.from_gguf(Tiny(arch).all_metadata(), 500))
    assert hf_target(model)(f"model.layers.0.{parameter}") == expected


@pytest.mark.parametrize(("parameter", "expected"), [
    ("0.self_attn.q_proj.weight", Target("blk.0.attn_q.weight", 4)),
    ("1.self_attn.q_proj.weight", Target("blk.1.attn_q.weight", 8)),
    ("5.self_attn.k_proj.bias", Target("blk.5.attn_k.bias", 1)),
    ("2.self_attn.linear_attn.weight", Target("blk.2.attn_output.weight")),
    ("2.self_attn.q_proj.weight", None),
    ("3.mlp.up_proj.weight", Target("blk.3.ffn_up.weight")),
    ("3.self_attn.o_proj.weight", None),
    ("4.mlp.up_proj.weight", None),
    ("6.mlp.up_proj.weight", None),
])  # fmt: skip
def test_layers_that_differ(parameter, expected):
    model = model_class("deci")(HParams.from_gguf(Tiny("deci", **NEMOTRON).all_metadata(), 500))
    assert hf_target(model)(f"model.layers.{parameter}") == expected


def test_norms_whose_weights_the_converter_shifts():
    model = model_class("gemma")(HParams.from_gguf(Tiny("gemma").all_metadata(), 500))
    assert hf_target(model)("model.norm.weight") is None
