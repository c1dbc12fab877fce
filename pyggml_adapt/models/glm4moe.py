"""GLM 4.5: heads of Q and K may be normed; the first layers are dense, the others have experts and shared ones.

Layers after the last, which predict further tokens, are kept and not computed.
Source: llama.cpp src/models/glm4-moe.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_experts, read_gating_func
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register

SIGMOID = 2


@register("glm4moe")
class Glm4Moe(Model):
    rope_type = RopeType.NEOX
    partial_rotary = True
    experts = "required"
    nextn = True

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        keys.refuse("rope.dimension_sections")
        return {
            **super().read_hparams(keys),
            **read_experts(keys),
            "expert_gating_func": read_gating_func(keys, SIGMOID),
            "expert_weights_norm": keys.flag("expert_weights_norm", False),
        }

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp
        yield from tables.norm("attn_norm", hp.n_embd)
        yield from tables.attention(hp)
        for norm in tables.qk_norm(hp):
            yield norm._replace(required=False)
        yield from tables.norm("post_attention_norm", hp.n_embd)
        if not hp.has_experts(il):
            yield from tables.ffn(hp)
        else:
            for spec in tables.experts(hp, probs_bias=True):
                yield spec._replace(required=True)
            yield from tables.shared_expert(hp)

    def nextn_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from super().nextn_tensors(il)
        yield TensorSpec("nextn.embed_tokens.weight", (self.hp.n_embd, self.hp.n_vocab))
        yield TensorSpec("nextn.shared_head_head.weight", (self.hp.n_embd, self.hp.n_vocab))

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = g.qkv(cur, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        if w.attn_q_norm is not None:
            q = g.named(g.norm(q, w.attn_q_norm, il), "Qcur_normed", il)
        if w.attn_k_norm is not None:
            k = g.named(g.norm(k, w.attn_k_norm, il), "Kcur_normed", il)
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.attn(q, k, v, w, il)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        cur = g.named(g.norm(inp, w.post_attention_norm, il), "post_attn_norm", il)
        has_experts = self.hp.has_experts(il)
        cur = g.shared_moe_ffn(cur, w, il, name="ffn_shexp_out") if has_experts else g.ffn(cur, w, il)
        return g.named(g.add(cur, inp), "l_out", il)
