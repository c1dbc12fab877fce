"""StableLM 1 and 2: LayerNorms, partial rotary; layers without ffn_norm feed one norm to attention and network.

Source: llama.cpp src/models/stablelm.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register
from pyggml_adapt.models.tables import REQUIRED


@register("stablelm")
class StableLM(Model):
    rope_type = RopeType.NEOX
    partial_rotary = True
    rms_norm = False
    output_norm = ("weight", "bias")
    output = "required"

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp
        yield from tables.norm("attn_norm", hp.n_embd, REQUIRED)
        yield from tables.attention(hp)
        yield TensorSpec("attn_q_norm.weight", (hp.n_embd_head_k, hp.n_head), required=False)
        yield TensorSpec("attn_k_norm.weight", (hp.n_embd_head_k, hp.n_head_kv), required=False)
        yield TensorSpec("ffn_norm.weight", (hp.n_embd,), required=False)
        yield TensorSpec("ffn_norm.bias", (hp.n_embd,), required=False)
        yield from tables.ffn(hp)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        normed = g.named(g.norm(cur, w.attn_norm, il, w.attn_norm_b), "attn_norm", il)
        q, k, v = g.qkv(normed, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        if w.attn_q_norm is not None:
            q = g.named(g.norm(q, w.attn_q_norm, il), "Qcur", il)
        if w.attn_k_norm is not None:
            k = g.named(g.norm(k, w.attn_k_norm, il), "Kcur", il)
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.attn(q, k, v, w, il)
        if il == self.hp.n_layer - 1:  # [n_embd, n_outputs]
            cur, inp, normed = g.output_rows(cur), g.output_rows(inp), g.output_rows(normed)
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        if w.ffn_norm is not None:
            normed = g.named(g.norm(inp, w.ffn_norm, il, w.ffn_norm_b), "ffn_norm", il)
        return g.named(g.add(g.ffn(normed, w, il), inp), "l_out", il)
