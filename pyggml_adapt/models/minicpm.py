"""MiniCPM 1 and 2: the Granite block; files that name no scales have those of MiniCPM 2.

Source: llama.cpp src/models/minicpm.cpp, granite.cpp
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.models.base import register
from pyggml_adapt.models.granite import LEAST_LOGIT_SCALE, Granite


@register("minicpm")
class MiniCPM(Granite):
    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        n_layer, n_embd = np.float32(keys.count("block_count")), np.float32(keys.count("embedding_length"))
        logit_scale, residual_scale = float(np.float32(256.0) / n_embd), float(np.float32(1.4) / np.sqrt(n_layer))
        return super(Granite, cls).read_hparams(keys) | {
            "f_logit_scale": keys.number("logit_scale", logit_scale, least=LEAST_LOGIT_SCALE),
            "f_residual_scale": keys.number("residual_scale", residual_scale, least=0.0),
            "f_embedding_scale": keys.number("embedding_scale", 12.0, least=0.0),
        }
