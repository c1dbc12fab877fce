"""SmolLM3: the llama block; every fourth layer has no rope.

Source: llama.cpp src/models/smollm3.cpp
"""

from __future__ import annotations

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("smollm3")
class SmolLM3(Llama):
    rope_factors = ()
    experts = "none"
    bias = None

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        return super().build_qkv(g, w, cur, il) if (il + 1) % 4 else g.qkv(cur, w, il)
