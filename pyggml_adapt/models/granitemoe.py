"""Granite with experts; one may be shared.

Source: llama.cpp src/models/granite-moe.cpp, granite.cpp
"""

from __future__ import annotations

from typing import Any

from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.models.base import register
from pyggml_adapt.models.granite import Granite


@register("granitemoe")
class GraniteMoe(Granite):
    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        return super().read_hparams(keys) | {"rope_finetuned": True}  # as a switch, the key is that of granite alone
