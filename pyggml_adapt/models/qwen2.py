"""Qwen2 and Qwen2.5: the llama block with NeoX rope; the head may have a bias.

Source: llama.cpp src/models/qwen2.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import Weights
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama


@register("qwen2")
class Qwen2(Llama):
    rope_type = RopeType.NEOX
    rope_factors = ()
    experts = "none"
    bias = None
    attn_out = ""

    def tensors(self) -> Iterator[TensorSpec]:
        yield from super().tensors()
        yield TensorSpec("output.bias", (self.hp.n_vocab,), required=False)

    def build_head(self, g: GraphBuilder, w: Weights, cur: Tensor) -> Tensor:
        return g.biased(super().build_head(g, w, cur), w.output_b)
