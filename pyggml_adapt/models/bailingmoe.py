"""Ling: the llama block with experts, some of them shared.

Source: llama.cpp src/models/bailingmoe.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_experts
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama


@register("bailingmoe")
class BailingMoe(Llama):
    rope_factors = ()
    experts = "required"
    output = "required"
    bias = None
    attn_out = ""

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        norm = keys.flag("expert_weights_norm", False)
        return super().read_hparams(keys) | read_experts(keys) | {"expert_weights_norm": norm}

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.experts(self.hp)
        yield from tables.shared_expert(self.hp)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.shared_moe_ffn(cur, w, il)
