"""Qwen3 with experts.

Source: llama.cpp src/models/qwen3moe.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.graph.hparams import Keys, read_n_ff_exp
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.qwen3 import Qwen3


@register("qwen3moe")
class Qwen3Moe(Qwen3):
    experts = "required"

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        return super().read_hparams(keys) | {"n_ff_exp": read_n_ff_exp(keys)}

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.experts(self.hp)
