"""dots.llm1: the Qwen3 block; the first layers are dense, the others have experts and shared ones.

Source: llama.cpp src/models/dots1.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_experts, read_gating_func
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.qwen3 import Qwen3


@register("dots1")
class Dots1(Qwen3):
    experts = "required"
    output = "required"

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        norm = keys.flag("expert_weights_norm", False)
        own = {"expert_gating_func": read_gating_func(keys), "expert_weights_norm": norm}
        return super().read_hparams(keys) | read_experts(keys) | own

    def check_hparams(self) -> None:
        super().check_hparams()
        if self.hp.n_head_kv != self.hp.n_head:
            raise ModelError(f"dots1.attention.head_count_kv = {self.hp.n_head_kv} is not head_count {self.hp.n_head}")

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        if not self.hp.has_experts(il):
            yield from tables.ffn(self.hp)
        else:
            yield from tables.experts(self.hp, probs_bias=True)
            yield from tables.shared_expert(self.hp)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.shared_moe_ffn(cur, w, il) if self.hp.has_experts(il) else g.ffn(cur, w, il)
