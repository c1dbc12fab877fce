"""XVERSE: the llama block.

Source: llama.cpp src/models/xverse.cpp
"""

from __future__ import annotations

from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("xverse")
class Xverse(Llama):
    rope_factors = ()
    experts = "none"
    output = "required"
    bias = None
    attn_out = ""
