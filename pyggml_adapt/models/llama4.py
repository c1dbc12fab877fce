"""Llama 4: three layers that attend to chunks, then one that attends to all and has no rope; experts' inputs weighted.

Source: llama.cpp src/models/llama4.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import MAX_LAYERS, Keys, read_swa
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama


@register("llama4")
class Llama4(Llama):
    rope_factors = ("freqs",)
    experts = "required"
    bias = None
    n_chunk: ClassVar[int] = 8192  # whatever attention.sliding_window says
    n_no_rope_layer_step: ClassVar[int] = 4
    n_expert_no_qk_norm: ClassVar[int] = 128  # of the one size whose Q and K are not normed

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        keys.count("block_count", least=cls.n_no_rope_layer_step, most=MAX_LAYERS)  # llama.cpp has no fewer
        if keys.count("attention.sliding_window", cls.n_chunk, least=0) == 0:
            raise ModelError(f"{keys.arch}.attention.sliding_window = 0 is not implemented")
        n_ff_exp = keys.count("expert_feed_forward_length")
        own = {
            "n_ff_exp": n_ff_exp,
            "n_ff_shexp": n_ff_exp,
            "n_moe_layer_step": keys.count("interleave_moe_layer_step", least=0, most=MAX_LAYERS),
            "expert_gating_func": "sigmoid_weight",
            "expert_weights_norm": False,
            "n_attn_temp_floor_scale": cls.n_chunk,
            "f_attn_temp_scale": 0.1,
            "f_attn_temp_offset": 1.0,
        }
        return super().read_hparams(keys) | read_swa(keys, 4, n_swa=cls.n_chunk, is_chunked=True) | own

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        if self.hp.has_experts(il):
            yield from tables.experts(self.hp)
            yield from tables.shared_expert(self.hp)
        else:
            yield from tables.ffn(self.hp)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        if (il + 1) % self.n_no_rope_layer_step == 0:
            q, k, v = g.qkv(cur, w, il)
            return g.named(g.tempered(q), "Qcur", il), k, v
        q, k, v = super().build_qkv(g, w, cur, il)
        if self.hp.n_expert != self.n_expert_no_qk_norm:
            q, k = g.qk_norm(q, k, w, il)  # without weights
        return q, k, v

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = self.build_qkv(g, w, cur, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.named(g.attn(q, k, v, w, il), "attn_out", il)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        normed = g.norm(inp, w.ffn_norm, il)
        g.named(cur if self.hp.has_experts(il) else normed, "ffn_norm", il)  # the former is a slip of llama.cpp's
        return g.named(g.add(self.build_ffn(g, w, normed, il), inp), "l_out", il)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        if not self.hp.has_experts(il):
            return g.ffn(cur, w, il)
        out = g.moe_ffn(cur, w, il, weigh_inputs=True)
        out = g.add(out, g.ffn(cur, w, il, part="_shexp", name="ffn_moe_shexp"))
        return g.named(out, "ffn_moe_out_merged", il)
