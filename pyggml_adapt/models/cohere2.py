"""Command R7B and Command A: Command R with a sliding window; every fourth layer sees all, and is not rotated.

Source: llama.cpp src/models/cohere2.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_swa
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.command_r import CommandR


@register("cohere2")
class Cohere2(CommandR):
    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        window = read_swa(keys, 4, n_swa=keys.count("attention.sliding_window"))
        own = {
            "f_logit_scale": keys.number("logit_scale", least=0.0),
            "rope_freq_base_swa": 0.0,
            "rope_freq_scale_swa": 0.0,
        }
        return super().read_hparams(keys) | window | own

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.norm("attn_norm", self.hp.n_embd)
        yield from tables.attention(self.hp)
        yield from tables.ffn(self.hp)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        return super().build_qkv(g, w, cur, il) if self.hp.is_swa(il) else g.qkv(cur, w, il)
