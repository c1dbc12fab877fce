"""Orion: the llama block with NeoX rope and LayerNorms.

Source: llama.cpp src/models/orion.cpp
"""

from __future__ import annotations

from pyggml_adapt.ggml import RopeType
from pyggml_adapt.models.base import register
from pyggml_adapt.models.llama import Llama
from pyggml_adapt.models.tables import REQUIRED


@register("orion")
class Orion(Llama):
    rope_type = RopeType.NEOX
    rms_norm = False
    output_norm = ("weight", "bias")
    rope_factors = ()
    experts = "none"
    output = "required"
    bias = None
    norm_bias = REQUIRED
    attn_out = ""
