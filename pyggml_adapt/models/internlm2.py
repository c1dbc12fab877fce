"""InternLM 2: the llama block.

Source: llama.cpp src/models/internlm2.cpp
"""

from __future__ import annotations

from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("internlm2")
class InternLM2(Llama):
    rope_factors = ()
    experts = "none"
    output = "required"
    bias = None
    attn_out = ""
