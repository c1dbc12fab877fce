"""Mistral 3: the llama block; YaRN may have parameters of its own, and Q may grow with the position.

Source: llama.cpp src/models/mistral3.cpp
"""

from __future__ import annotations

from typing import Any

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_yarn
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("mistral3")
class Mistral3(Llama):
    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        yarn = read_yarn(keys)
        return (
            super().read_hparams(keys)
            | yarn
            | {
                "f_attn_temp_scale": keys.number("attention.temperature_scale", 0.0),
                "n_attn_temp_floor_scale": yarn["n_ctx_orig_yarn"],
            }
        )

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().build_qkv(g, w, cur, il)
        if self.hp.f_attn_temp_scale:
            q = g.named(g.tempered(q), "Qcur_attn_temp_scaled", il)
        return q, k, v
