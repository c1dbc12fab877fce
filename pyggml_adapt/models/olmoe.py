"""OLMoE: experts whose weights do not sum to 1, and norms over all of Q and of K.

Source: llama.cpp src/models/olmoe.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama


@register("olmoe")
class Olmoe(Llama):
    rope_type = RopeType.NEOX
    rope_factors = ()
    experts = "required"
    output = "required"
    bias = None
    attn_out = ""

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        return super().read_hparams(keys) | {"expert_weights_norm": False}

    def check_hparams(self) -> None:
        super().check_hparams()
        if self.hp.n_head_kv != self.hp.n_head:
            raise ModelError(f"olmoe.attention.head_count_kv = {self.hp.n_head_kv} is not head_count {self.hp.n_head}")

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from super().layer_tensors(il)
        yield from tables.norm("attn_q_norm", self.hp.n_embd_head_k * self.hp.n_head)
        yield from tables.norm("attn_k_norm", self.hp.n_embd_k_gqa)

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.experts(self.hp)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = g.flat_qkv(cur, w, il)  # [n_embd_head * n_head, n_tokens]
        q, k = g.qk_norm(q, k, w, il)
        q, k, v = g.heads(q), g.heads(k), g.named(g.heads(v), "Vcur", il)
        return g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il), v
