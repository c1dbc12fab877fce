"""ERNIE 4.5 with experts: the first layers are dense, one expert may be shared.

Source: llama.cpp src/models/ernie4-5-moe.cpp, ernie4-5.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama
from pyggml_adapt.models.tables import OPTIONAL


@register("ernie4_5-moe")
class Ernie45Moe(Llama):
    rope_factors = ()
    experts = "required"
    bias = None

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        if (step := keys.count("interleave_moe_layer_step", least=0)) != 1:  # llama.cpp cannot load such files
            raise ModelError(f"{keys.arch}.interleave_moe_layer_step = {step} is not implemented")
        return super().read_hparams(keys) | {
            "n_ff_exp": keys.count("expert_feed_forward_length"),
            "n_ff_shexp": keys.count("expert_shared_feed_forward_length", 0, least=0),
            "n_layer_dense_lead": keys.count("leading_dense_block_count", 0, least=0),
        }

    def ffn_tensors(self, il: int) -> Iterator[TensorSpec]:
        if not self.hp.has_experts(il):
            yield from tables.ffn(self.hp)
            return
        yield from tables.experts(self.hp, gate=OPTIONAL, probs_bias=True)
        if self.hp.n_ff_shexp:
            yield from tables.shared_expert(self.hp)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.shared_moe_ffn(cur, w, il) if self.hp.has_experts(il) else g.ffn(cur, w, il)
