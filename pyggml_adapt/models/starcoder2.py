"""StarCoder2: LayerNorms, biases everywhere, and a feed-forward network with GELU that is not gated.

Source: llama.cpp src/models/starcoder2.cpp
"""

from __future__ import annotations

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama
from pyggml_adapt.models.tables import REQUIRED


@register("starcoder2")
class Starcoder2(Llama):
    rope_type = RopeType.NEOX
    rms_norm = False
    output_norm = ("weight", "bias")
    rope_factors = ()
    experts = "none"
    bias = REQUIRED
    norm_bias = REQUIRED
    gate = False
    attn_out = ""

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.ffn(cur, w, il, "gelu")
