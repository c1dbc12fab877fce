"""Phi 3.5 with experts: Phi 3 with biases of norms, attn_output and the head.

Source: llama.cpp src/models/phimoe.cpp, phi3.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.weights import LayerWeights, Weights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.phi3 import Phi3
from pyggml_adapt.models.tables import REQUIRED


@register("phimoe")
class PhiMoe(Phi3):
    output_norm = ("weight", "bias")
    output = "required"
    experts = "required"
    bias = REQUIRED

    def tensors(self) -> Iterator[TensorSpec]:
        for spec in super().tensors():  # the factors are for a whole head, even if less of it is rotated
            is_factors = spec.name.startswith("rope_factors")
            yield spec._replace(ne=(self.hp.n_embd_head_k // 2,)) if is_factors else spec
        yield TensorSpec("output.bias", (self.hp.n_vocab,))

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.experts(self.hp)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.moe_ffn(cur, w, il)

    def build_head(self, g: GraphBuilder, w: Weights, cur: Tensor) -> Tensor:
        return g.add(g.named(super().build_head(g, w, cur), "result_output_no_bias"), w.output_b)
