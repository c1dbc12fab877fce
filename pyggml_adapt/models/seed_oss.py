"""Seed-OSS: the llama block with NeoX rope; the norm before the feed-forward network has another name.

Source: llama.cpp src/models/seed-oss.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register


@register("seed_oss")
class SeedOss(Model):
    rope_type = RopeType.NEOX

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.norm("attn_norm", self.hp.n_embd)
        yield from tables.attention(self.hp)
        yield from tables.norm("post_attention_norm", self.hp.n_embd)
        yield from tables.ffn(self.hp)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = g.qkv(cur, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.named(g.attn(q, k, v, w, il), "attn_out", il)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        cur = g.named(g.norm(inp, w.post_attention_norm, il), "attn_post_norm", il)
        cur = g.ffn(cur, w, il)
        return g.named(g.add(cur, inp), "l_out", il)
