"""Baichuan and Baichuan 2, 7B: the llama block; only models of 32 layers have rope.

Source: llama.cpp src/models/baichuan.cpp
"""

from __future__ import annotations

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder, LayerWeights
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("baichuan")
class Baichuan(Llama):
    rope_freqs = False
    experts = "none"
    output = "required"
    bias = None
    attn_out = ""

    def check_hparams(self) -> None:
        super().check_hparams()
        if self.hp.n_layer == 40:
            raise ModelError("baichuan.block_count = 40, for which attention with ALiBi is not implemented")

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        return super().build_qkv(g, w, cur, il) if self.hp.n_layer == 32 else g.qkv(cur, w, il)
