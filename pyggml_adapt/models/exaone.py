"""EXAONE 3: the llama block with NeoX rope.

Source: llama.cpp src/models/exaone.cpp
"""

from __future__ import annotations

from pyggml_adapt.ggml import RopeType
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama


@register("exaone")
class Exaone(Llama):
    rope_factors = ("freqs",)
    rope_type = RopeType.NEOX
    experts = "none"
    bias = None
    attn_out = ""
