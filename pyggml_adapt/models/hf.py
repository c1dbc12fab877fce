"""Hugging Face's names of a model's parameters, and where each is in a GGUF file.

Source: llama.cpp gguf-py/gguf/tensor_mapping.py; conversion/llama.py (permute, and the stacking of experts).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pyggml_adapt.models.base import Model
from pyggml_adapt.weights.peft import Target

_TOP = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "final_layernorm": "output_norm",  # Phi 2
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",  # Phi 3
    "self_attn.linear_attn": "attn_output",  # Nemotron
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "block_sparse_moe.gate": "ffn_gate_inp",  # Mixtral, transformers 4
    "mlp.gate": "ffn_gate_inp",  # Mixtral, transformers 5; Qwen, OLMoE, DeepSeek
    "block_sparse_moe.router.layer": "ffn_gate_inp",  # Granite
    "attention_layernorm": "attn_norm",  # Apertus
    "feedforward_layernorm": "ffn_norm",
    "attention.wo": "attn_output",  # InternLM 2, whose Q, K and V are one weight there
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "self_attn.dense": "attn_output",  # Phi 2
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.c_fc": "ffn_up",  # StarCoder2
    "mlp.c_proj": "ffn_down",
    "self_attn.query_layernorm": "attn_q_norm",  # Hunyuan
    "self_attn.key_layernorm": "attn_k_norm",
    "mlp.gate.wg": "ffn_gate_inp",
    "post_self_attn_layernorm": "post_attention_norm",  # GLM 4
    "post_mlp_layernorm": "post_ffw_norm",
    "mlp.gate_up_proj": "ffn_up",
    "post_feedforward_layernorm": "post_ffw_norm",  # OLMo 2
    "attention.dense": "attn_output",  # Ling
    "mlp.router": "ffn_gate_inp",  # gpt-oss
    "feed_forward.router": "ffn_gate_inp",  # Llama 4
    **{f"feed_forward.{which}_proj": f"ffn_{which}" for which in ("gate", "down", "up")},
    **{f"feed_forward.shared_expert.{which}_proj": f"ffn_{which}_shexp" for which in ("gate", "down", "up")},
    **{
        f"mlp.{shared}.{which}_proj": f"ffn_{which}_shexp"
        for shared in ("shared_expert", "shared_experts", "shared_mlp")  # Qwen; DeepSeek, dots, ERNIE, Ling; Hunyuan
        for which in ("gate", "down", "up")
    },
}
_EXPERT = {
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
}
# Their post_attention_layernorm has another name than ffn_norm.
_POST_NORM = frozenset({"exaone4", "glm4moe", "gpt-oss", "olmo2", "seed_oss"})
# The converter adds 1 to the weights of norms, which hence are not those of a PEFT directory.
_SHIFTED_NORMS = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
# Hugging Face turns the first half of a head against the second, llama.cpp's NORMAL rope neighbours: for these
# architectures the converter reorders the rows of Q and K.
_PERMUTED = frozenset(
    {"llama", "arcee", "deci", "deepseek", "granite", "granitemoe", "minicpm", "mistral3", "olmo", "smollm3", "xverse"}
)

_PARAMETER = re.compile(r"(?:model\.)?(?:layers\.([0-9]+)\.)?(.+)\.(weight|bias)")
_OF_EXPERT = re.compile(r"(.+\.experts)\.([0-9]{1,4})\.(.+)")


def hf_target(model: Model) -> Callable[[str], Target | None]:
    """Return the function from a parameter's Hugging Face path to its Target in the model, None if it has none."""
    hp = model.hp
    known = {spec.name for spec in model.all_tensors()}

    def target(parameter: str) -> Target | None:
        if not (match := _PARAMETER.fullmatch(parameter)):
            return None
        il, module, leaf = match.groups()
        expert = -1
        if il is None:
            found = _TOP.get(module)
        elif of_expert := _OF_EXPERT.fullmatch(module):
            expert = int(of_expert[2])
            found = _EXPERT.get(f"{of_expert[1]}.{of_expert[3]}")
        else:
            found = _LAYER.get(module)
            if found == "ffn_norm" and model.arch in _POST_NORM:
                found = "post_attention_norm"
        if found is not None and found.endswith("norm") and model.arch in _SHIFTED_NORMS:
            return None
        name = f"{found}.{leaf}" if il is None else f"blk.{il}.{found}.{leaf}"
        if found is None or name not in known or expert >= hp.n_expert > 0:
            return None
        return Target(name, _n_head(model, il, found), expert, hp.n_expert if expert >= 0 else 0)

    return target


def _n_head(model: Model, il: str | None, name: str) -> int:
    """Return the number of heads whose rows the converter reorders in a tensor of layer il, 0 for none."""
    if il is None or name not in ("attn_q", "attn_k") or model.arch not in _PERMUTED:
        return 0
    hp = model.hp.of_layer(int(il))
    return hp.n_head if name == "attn_q" else hp.n_head_kv
