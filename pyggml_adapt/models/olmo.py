"""OLMo 1: the llama block with LayerNorms that have no weights; Q, K and V may be clamped.

Source: llama.cpp src/models/olmo.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama


@register("olmo")
class Olmo(Llama):
    rms_norm = False
    output_norm = ()
    rope_factors = ()
    experts = "none"
    bias = None
    attn_out = ""

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        return super().read_hparams(keys) | {"f_clamp_kqv": keys.number("attention.clamp_kqv", 0.0, least=0.0)}

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.attention(self.hp)
        yield from tables.ffn(self.hp)
