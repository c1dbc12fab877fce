"""Llama 1 to 3, Mistral, Mixtral and everything else that ships as `llama`.

Source: llama.cpp src/models/llama.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register
from pyggml_adapt.models.tables import OPTIONAL


@register("llama")
class Llama(Model):
    rope_factors: ClassVar[tuple[str, ...]] = ("freqs", "longrope")
    experts = "optional"
    bias: ClassVar[bool | None] = OPTIONAL  # of attn_output and of the feed-forward network
    norm_bias: ClassVar[bool | None] = None
    gate: ClassVar[bool] = True  # whether the feed-forward network has one
    attn_out: ClassVar[str] = "attn_out"  # how llama.cpp names the attention's output, if at all

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp
        yield from tables.norm("attn_norm", hp.n_embd, self.norm_bias)
        yield from tables.attention(hp, self.bias)
        yield from tables.norm("ffn_norm", hp.n_embd, self.norm_bias)
        yield from self.ffn_tensors(il)

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        """Yield the tensors of the experts or the feed-forward network of layer il."""
        if self.hp.n_expert:
            yield from tables.experts(self.hp, gate=OPTIONAL)
        else:
            yield from tables.ffn(self.hp, self.bias, gate=self.gate)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il, w.attn_norm_b), "attn_norm", il)
        q, k, v = self.build_qkv(g, w, cur, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = self.build_attn(g, w, q, k, v, il)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        inp = g.named(g.add_residual(cur, inp), "ffn_inp", il)
        cur = g.named(g.norm(inp, w.ffn_norm, il, w.ffn_norm_b), "ffn_norm", il)
        cur = self.build_ffn(g, w, cur, il)
        return g.named(g.add_residual(cur, inp), "l_out", il)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V, rotated."""
        q, k, v = g.qkv(cur, w, il)
        return g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il), v

    def build_attn(self, g: GraphBuilder, w: LayerWeights, q: Tensor, k: Tensor, v: Tensor, il: int) -> Tensor:
        """Return the attention's output, [n_embd, n_tokens]."""
        cur = g.attn(q, k, v, w, il)
        return g.named(cur, self.attn_out, il) if self.attn_out else cur

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        """Return what the experts or the feed-forward network make of cur, [n_embd, n]."""
        return g.moe_ffn(cur, w, il) if self.hp.n_expert else g.ffn(cur, w, il)
