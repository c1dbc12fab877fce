"""Qwen3: the llama block with NeoX rope and RMS-normed heads of Q and K.

Source: llama.cpp src/models/qwen3.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama


@register("qwen3")
class Qwen3(Llama):
    rope_type = RopeType.NEOX
    rope_factors = ()
    experts = "none"
    bias = None
    attn_out = ""

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from super().layer_tensors(il)
        yield from tables.qk_norm(self.hp)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = g.qkv(cur, w, il)
        q, k = g.qk_norm(q, k, w, il)
        return g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il), v
