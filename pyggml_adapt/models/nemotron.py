"""Nemotron 3 and 4, Minitron: LayerNorms, partial rotary, and squared ReLU without a gate.

Source: llama.cpp src/models/nemotron.cpp
"""

from __future__ import annotations

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama
from pyggml_adapt.models.tables import REQUIRED


@register("nemotron")
class Nemotron(Llama):
    rope_type = RopeType.NEOX
    partial_rotary = True
    rms_norm = False
    output_norm = ("weight", "bias")
    rope_factors = ()
    experts = "none"
    output = "required"
    norm_bias = REQUIRED
    gate = False
    attn_out = ""

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.ffn(cur, w, il, "relu_sqr", name="")
