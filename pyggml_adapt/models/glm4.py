"""GLM 4 (0414): norms before and after attention and feed-forward network, gate and up in one weight.

Source: llama.cpp src/models/glm4.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register


@register("glm4")
class Glm4(Model):
    partial_rotary = True

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        keys.refuse("rope.dimension_sections")
        return super().read_hparams(keys)

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp
        yield from tables.norm("attn_norm", hp.n_embd)
        yield from tables.attention(hp)
        yield from tables.norm("post_attention_norm", hp.n_embd)
        yield from tables.norm("ffn_norm", hp.n_embd)
        yield from tables.linear("ffn_down", hp.n_ff, hp.n_embd)
        yield from tables.linear("ffn_up", hp.n_embd, 2 * hp.n_ff)  # the gate first
        yield from tables.norm("post_ffw_norm", hp.n_embd)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = g.qkv(cur, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.attn(q, k, v, w, il)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        cur = g.named(g.norm(cur, w.post_attention_norm, il), "post_attn_norm", il)
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        cur = g.named(g.norm(inp, w.ffn_norm, il), "ffn_norm", il)
        cur = g.ffn(cur, w, il, "swiglu")
        cur = g.named(g.norm(cur, w.post_ffw_norm, il), "post_mlp_norm", il)
        return g.named(g.add(cur, inp), "l_out", il)
