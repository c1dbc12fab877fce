"""Phi 3 and 4: partial rotary with LongRoPE, gate and up in one weight; attention sees all tokens, not a window.

Source: llama.cpp src/models/phi3.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register


@register("phi3")
class Phi3(Model):
    rope_type = RopeType.NEOX
    partial_rotary = True
    rope_factors = ("longrope",)
    bias: ClassVar[bool | None] = None  # of norms and attn_output

    def check_hparams(self) -> None:
        super().check_hparams()
        hp = self.hp
        if hp.n_embd_head_k * hp.n_head != hp.n_embd:
            raise ModelError(
                f"{hp.arch}.attention.key_length = {hp.n_embd_head_k} times head_count {hp.n_head} is not "
                f"embedding_length {hp.n_embd}"
            )

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.norm("attn_norm", self.hp.n_embd, self.bias)
        yield from tables.attention(self.hp, self.bias)
        yield from tables.norm("ffn_norm", self.hp.n_embd, self.bias)
        yield from self.ffn_tensors(il)

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        """Yield the tensors of the feed-forward network of layer il."""
        yield from tables.linear("ffn_down", self.hp.n_ff, self.hp.n_embd)
        yield from tables.linear("ffn_up", self.hp.n_embd, 2 * self.hp.n_ff)  # the gate first

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il, w.attn_norm_b), "attn_norm", il)
        q, k, v = g.qkv(cur, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        q = g.named(g.scaled(q, g.kq_scale), "Qcur", il)
        cur = g.attn(q, k, v, w, il, kq_scale=1.0)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        inp = g.add(cur, inp)
        cur = g.named(g.norm(inp, w.ffn_norm, il, w.ffn_norm_b), "ffn_norm", il)
        return g.named(g.add(inp, self.build_ffn(g, w, cur, il)), "l_out", il)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        """Return what the feed-forward network makes of cur, [n_embd, n]."""
        return g.ffn(cur, w, il, "swiglu")
