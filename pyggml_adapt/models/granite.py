"""Granite: the llama block with scales of embeddings, attention, residuals and logits.

Source: llama.cpp src/models/granite.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.graph.weights import LayerWeights, Weights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama

LEAST_LOGIT_SCALE = 1e-30  # logits are divided by it


@register("granite")
class Granite(Llama):
    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        keys.refuse("deepstack_mapping", -1)
        return super().read_hparams(keys) | {
            "f_logit_scale": keys.number("logit_scale", least=LEAST_LOGIT_SCALE),
            "f_residual_scale": keys.number("residual_scale", 0.0, least=0.0),
            "f_embedding_scale": keys.number("embedding_scale", 0.0, least=0.0),
            "f_attention_scale": keys.number("attention.scale", 0.0, least=0.0),
            "rope_finetuned": keys.flag("rope.scaling.finetuned", True),
            "n_ff_shexp": keys.count("expert_shared_feed_forward_length", 0, least=0),
        }

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from super().ffn_tensors(il)
        if self.hp.n_expert and self.hp.n_ff_shexp:
            yield from tables.shared_expert(self.hp)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        return super().build_qkv(g, w, cur, il) if self.hp.rope_finetuned else g.qkv(cur, w, il)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.shared_moe_ffn(cur, w, il) if self.hp.n_expert else g.ffn(cur, w, il)

    def build_head(self, g: GraphBuilder, w: Weights, cur: Tensor) -> Tensor:
        return g.scaled(super().build_head(g, w, cur), float(np.float32(1.0) / np.float32(self.hp.f_logit_scale)))
