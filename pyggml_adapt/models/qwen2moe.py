"""Qwen1.5 and Qwen2 with experts: the weights of those used do not sum to 1, and a gated one is shared.

Source: llama.cpp src/models/qwen2moe.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_n_ff_exp
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama


@register("qwen2moe")
class Qwen2Moe(Llama):
    rope_type = RopeType.NEOX
    rope_factors = ()
    experts = "required"
    output = "required"
    bias = None
    attn_out = ""

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        n_ff_shexp = keys.count("expert_shared_feed_forward_length", 0, least=0)
        return super().read_hparams(keys) | {
            "n_ff_exp": read_n_ff_exp(keys),
            "n_ff_shexp": n_ff_shexp or keys.count("feed_forward_length"),
            "expert_weights_norm": False,
        }

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.experts(self.hp)
        yield TensorSpec("ffn_gate_inp_shexp.weight", (self.hp.n_embd,))
        yield from tables.shared_expert(self.hp)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.named(g.add(g.moe_ffn(cur, w, il), g.gated_shared_expert(cur, w, il)), "ffn_out", il)
