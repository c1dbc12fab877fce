"""Arcee: the llama block, its feed-forward network not gated but with squared ReLU.

Source: llama.cpp src/models/arcee.cpp
"""

from __future__ import annotations

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("arcee")
class Arcee(Llama):
    rope_factors = ("freqs",)
    experts = "none"
    bias = None
    gate = False

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.ffn(cur, w, il, "relu_sqr")
