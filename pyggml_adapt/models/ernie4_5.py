"""ERNIE 4.5: the llama block.

Source: llama.cpp src/models/ernie4-5.cpp
"""

from __future__ import annotations

from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("ernie4_5")
class Ernie45(Llama):
    rope_factors = ()
    experts = "none"
    bias = None
    attn_out = ""
