"""Mistral 3, without its scaling of attention by position: the llama block; YaRN may have parameters of its own.

Source: llama.cpp src/models/mistral3.cpp
"""

from __future__ import annotations

from typing import Any

from pyggml_adapt.models.base import register
from pyggml_adapt.models.hparams import Keys, read_yarn
from pyggml_adapt.models.llama import Llama


@register("mistral3")
class Mistral3(Llama):
    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        keys.refuse("attention.temperature_scale")
        return super().read_hparams(keys) | read_yarn(keys)
