"""Command R and R+: LayerNorms; attention and feed-forward network side by side; R+ norms heads of Q and K.

Source: llama.cpp src/models/command-r.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.graph.weights import LayerWeights, Weights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register


@register("command-r")
class CommandR(Model):
    partial_rotary = True
    rms_norm = False
    output = "tied"

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        return super().read_hparams(keys) | {"f_logit_scale": keys.number("logit_scale", 0.0, least=0.0)}

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp
        yield from tables.norm("attn_norm", hp.n_embd)
        yield from tables.attention(hp)
        if hp.n_layer >= 64:
            yield TensorSpec("attn_q_norm.weight", (hp.n_embd_head_k, hp.n_head))
            yield TensorSpec("attn_k_norm.weight", (hp.n_embd_head_k, hp.n_head_kv))
        yield from tables.ffn(hp)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        normed = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = self.build_qkv(g, w, normed, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        attn = g.attn(q, k, v, w, il)
        if il == self.hp.n_layer - 1:  # [n_embd, n_outputs]
            attn, inp, normed = g.output_rows(attn), g.output_rows(inp), g.output_rows(normed)
        cur = g.add(g.ffn(normed, w, il), inp)
        return g.named(g.add(cur, attn), "l_out", il)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V, rotated."""
        q, k, v = g.qkv(cur, w, il)
        if w.attn_q_norm is not None:
            q = g.named(g.norm(q, w.attn_q_norm, il), "Qcur", il)
            k = g.named(g.norm(k, w.attn_k_norm, il), "Kcur", il)
        return g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il), v

    def build_head(self, g: GraphBuilder, w: Weights, cur: Tensor) -> Tensor:
        cur = super().build_head(g, w, cur)
        return g.scaled(cur, self.hp.f_logit_scale) if self.hp.f_logit_scale else cur
