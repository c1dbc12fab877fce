"""Gemma 3: Gemma 2 with norms of Q and K instead of caps, and five layers with a window, of other rope, to one without.

Source: llama.cpp src/models/gemma3.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_swa
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.gemma2 import Gemma2


@register("gemma3")
class Gemma3(Gemma2):
    output = "optional"
    n_layer_27b = 62
    post_norm_has_number = True

    @classmethod
    def read_caps(cls, keys: Keys) -> dict[str, Any]:
        return {"f_final_logit_softcapping": keys.number("final_logit_softcapping", 0.0, least=0.0)}

    @classmethod
    def read_window(cls, keys: Keys) -> dict[str, Any]:
        n_swa = keys.count("attention.sliding_window", 0, least=0)
        if n_swa == 0:
            return {}
        rope = {"rope_freq_base_swa": keys.positive("rope.freq_base_swa", 10000.0), "rope_freq_scale_swa": 1.0}
        return read_swa(keys, 6, n_swa=n_swa) | rope

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from super().layer_tensors(il)
        yield from tables.qk_norm(self.hp)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().build_qkv(g, w, cur, il)
        return *g.qk_norm(q, k, w, il), v
