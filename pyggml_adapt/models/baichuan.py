"""Baichuan and Baichuan 2: the llama block; models of 32 layers (7B) have rope, those of 40 (13B) ALiBi.

Source: llama.cpp src/models/baichuan.cpp
"""

from __future__ import annotations

from typing import Any

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("baichuan")
class Baichuan(Llama):
    rope_factors = ()
    experts = "none"
    output = "required"
    bias = None
    attn_out = ""

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        return super().read_hparams(keys) | {"f_max_alibi_bias": 8.0 if keys.n_layers()[0] == 40 else 0.0}

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        return super().build_qkv(g, w, cur, il) if self.hp.n_layer == 32 else g.qkv(cur, w, il)
