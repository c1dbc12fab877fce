"""Hunyuan with experts, one shared; heads of Q and K are RMS-normed after rope.

Source: llama.cpp src/models/hunyuan-moe.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama


@register("hunyuan-moe")
class HunyuanMoe(Llama):
    rope_type = RopeType.NEOX
    rope_factors = ()
    experts = "required"
    bias = None

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        keys.count("expert_feed_forward_length")  # it must be there, but experts have n_ff
        n_ff_shexp = keys.count("expert_shared_feed_forward_length", 0, least=0)
        return super().read_hparams(keys) | {"n_ff_shexp": n_ff_shexp or keys.count("feed_forward_length")}

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.experts(self.hp)
        yield from tables.shared_expert(self.hp)

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from super().layer_tensors(il)
        yield from tables.qk_norm(self.hp)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = g.qkv(cur, w, il)
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "", il)
        q, k = g.qk_norm(q, k, w, il, "norm")
        return q, k, v

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.shared_moe_ffn(cur, w, il, "ffn_mlp")
