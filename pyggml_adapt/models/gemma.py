"""Gemma 1: scaled embeddings, a tied head, and a feed-forward network gated with GELU.

Source: llama.cpp src/models/gemma.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights, Weights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register


@register("gemma")
class Gemma(Model):
    rope_type = RopeType.NEOX
    partial_rotary = True
    output = "tied"

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.norm("attn_norm", self.hp.n_embd)
        yield from tables.attention(self.hp)
        yield from tables.norm("ffn_norm", self.hp.n_embd)
        yield from tables.ffn(self.hp)

    def build_inp(self, g: GraphBuilder, w: Weights) -> Tensor:
        return g.named(g.scaled(super().build_inp(g, w), float(np.sqrt(np.float32(self.hp.n_embd)))), "inp_scaled")

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = g.qkv(cur, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        q = g.named(g.scaled(q, g.kq_scale), "Qcur_scaled", il)
        cur = g.attn(q, k, v, w, il, kq_scale=1.0)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        inp = g.named(g.add(cur, inp), "sa_out", il)
        cur = g.named(g.norm(inp, w.ffn_norm, il), "ffn_norm", il)
        cur = g.ffn(cur, w, il, "gelu")
        return g.named(g.add(cur, inp), "l_out", il)
