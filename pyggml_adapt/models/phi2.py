"""Phi 1 and 2: LayerNorms, partial rotary, biases everywhere; attention and network, with GELU, side by side.

Source: llama.cpp src/models/phi2.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights, Weights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register
from pyggml_adapt.models.tables import REQUIRED


@register("phi2")
class Phi2(Model):
    rope_type = RopeType.NEOX
    partial_rotary = True
    rms_norm = False
    output_norm = ("weight", "bias")
    output = "required"

    def tensors(self) -> Iterator[TensorSpec]:
        yield from super().tensors()
        yield TensorSpec("output.bias", (self.hp.n_vocab,))

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.norm("attn_norm", self.hp.n_embd, REQUIRED)
        yield from tables.attention(self.hp, REQUIRED)
        yield from tables.ffn(self.hp, REQUIRED, gate=False)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        normed = g.named(g.norm(cur, w.attn_norm, il, w.attn_norm_b), "attn_norm", il)
        q, k, v = g.qkv(normed, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.attn(g.scaled(q, g.kq_scale), k, v, w, il, kq_scale=1.0)
        if il == self.hp.n_layer - 1:  # [n_embd, n_outputs]
            cur, inp, normed = g.output_rows(cur), g.output_rows(inp), g.output_rows(normed)
        cur = g.add(cur, g.ffn(normed, w, il, "gelu"))
        return g.named(g.add(cur, inp), "l_out", il)

    def build_head(self, g: GraphBuilder, w: Weights, cur: Tensor) -> Tensor:
        cur = g.named(super().build_head(g, w, cur), "result_output_no_bias")
        return g.add(cur, w.output_b)
