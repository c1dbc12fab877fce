"""DeciLM, Nemotron 51B and 253B: llama blocks of different sizes, some with a linear layer or nothing for attention.

Source: llama.cpp src/models/deci.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama
from pyggml_adapt.models.tables import OPTIONAL


@register("deci")
class Deci(Llama):
    experts = "none"
    layered = True

    def check_hparams(self) -> None:
        super().check_hparams()
        if not self.hp.n_head_kv:
            raise ModelError("deci.attention.head_count_kv = 0 in all layers: one must have attention over tokens")
        for il in range(self.hp.n_layer):
            hp = self.hp.of_layer(il)
            if hp.n_ff == 0 and (hp.n_head or il == self.hp.n_layer - 1):
                reason = "which has attention" if hp.n_head else "the last one"
                raise ModelError(f"deci.feed_forward_length = 0 in layer {il}, {reason}, is not implemented")

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp.of_layer(il)
        if hp.n_head:
            yield from tables.norm("attn_norm", hp.n_embd)
        if hp.n_head_kv:
            yield from tables.attention(hp, OPTIONAL)
        elif hp.n_head:
            yield from tables.linear("attn_output", hp.n_embd, hp.n_embd)
        if hp.n_ff:
            yield from tables.norm("ffn_norm", hp.n_embd)
            yield from tables.ffn(hp, OPTIONAL)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        hp, inp, is_last = self.hp.of_layer(il), cur, il == self.hp.n_layer - 1  # [n_embd, n_tokens]
        if hp.n_ff == 0:
            return cur  # the layer does nothing
        if hp.n_head:
            cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        if hp.n_head_kv:
            q, k, v = self.build_qkv(g, w, cur, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
            if is_last and g.n_outputs == 0:
                g.store_kv(k, v, il)
                return None
            cur = g.attn(q, k, v, w, il)
        elif hp.n_head:
            cur = g.named(g.mm(w.attn_output, cur), "wo", il)
        if is_last:
            g.graph.expand(g.inputs.pos)  # it is filled though nothing may be rotated
            if g.n_outputs == 0:
                g.graph.expand(inp)  # filled too if the graph starts here, though nothing is stored that needs it
                return None
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        inp = g.named(g.add(cur, inp), "ffn_inp", il) if hp.n_head else cur
        cur = g.named(g.norm(inp, w.ffn_norm, il), "ffn_norm", il)
        return g.named(g.add(g.ffn(cur, w, il), inp), "l_out", il)
