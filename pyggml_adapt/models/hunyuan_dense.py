"""Hunyuan, dense: the llama block with NeoX rope; heads of Q and K are RMS-normed after it.

Source: llama.cpp src/models/hunyuan-dense.cpp, hunyuan-vl.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama

MAX_ALPHA = 1e6  # its power times the base stays finite


@register("hunyuan-dense")
class HunyuanDense(Llama):
    rope_type = RopeType.NEOX
    rope_factors = ()
    experts = "none"
    bias = None

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        keys.refuse("rope.dimension_sections")
        found = super().read_hparams(keys)
        if keys.count("expert_count", 0, least=0) <= 1:  # these have one "expert" and are dense
            found |= {"n_expert": 0, "n_expert_used": 0}
        if (alpha := keys.number("rope.scaling.alpha", 0.0, least=0.0)) > 0.0:
            n = keys.count("attention.key_length", keys.count("embedding_length") // keys.count("attention.head_count"))
            if n <= 2 or alpha > MAX_ALPHA:
                raise ModelError(
                    f"{keys.arch}.rope.scaling.alpha = {alpha} is too large, or the head size {n} too small"
                )
            power = np.float32(alpha) ** (np.float32(n) / np.float32(n - 2))
            found["rope_freq_base"] = float(np.float32(keys.number("rope.freq_base", 10000.0)) * power)
        return found

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from super().layer_tensors(il)
        yield from tables.qk_norm(self.hp)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().build_qkv(g, w, cur, il)
        q, k = g.qk_norm(q, k, w, il, "norm")
        return q, k, v
