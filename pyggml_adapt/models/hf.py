"""Hugging Face's names of a model's parameters, and where each is in a GGUF file.

Source: llama.cpp gguf-py/gguf/tensor_mapping.py; conversion/llama.py (permute, and the stacking of experts).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pyggml_adapt.models.base import Model
from pyggml_adapt.weights.peft import Target

_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "block_sparse_moe.gate": "ffn_gate_inp",  # Mixtral, transformers 4
    "mlp.gate": "ffn_gate_inp",  # Mixtral, transformers 5
}
_EXPERT = {
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
}
# Hugging Face turns the first half of a head against the second, llama.cpp's NORMAL rope neighbours: for these
# architectures the converter reorders the rows of Q and K.
_PERMUTED = frozenset({"llama"})

_PARAMETER = re.compile(r"(?:model\.)?(?:layers\.([0-9]+)\.)?(.+)\.(weight|bias)")
_OF_EXPERT = re.compile(r"(.+\.experts)\.([0-9]{1,4})\.(.+)")


def hf_target(model: Model) -> Callable[[str], Target | None]:
    """Return the function from a parameter's Hugging Face path to its Target in the model, None if it has none."""
    hp = model.hp
    known = {spec.name for spec in model.all_tensors()}
    n_heads = {"attn_q": hp.n_head, "attn_k": hp.n_head_kv} if model.arch in _PERMUTED else {}

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
        name = f"{found}.{leaf}" if il is None else f"blk.{il}.{found}.{leaf}"
        if found is None or name not in known or expert >= hp.n_expert > 0:
            return None
        return Target(name, n_heads.get(found, 0), expert, hp.n_expert if expert >= 0 else 0)

    return target
