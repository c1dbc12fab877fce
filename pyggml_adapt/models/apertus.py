"""Apertus: RMS-normed heads of Q and K, and a feed-forward network with xIELU that is not gated.

Source: llama.cpp src/models/apertus.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import MAX_LAYERS, Keys
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.llama import Llama
from pyggml_adapt.models.tables import OPTIONAL


@register("apertus")
class Apertus(Llama):
    rope_type = RopeType.NEOX
    experts = "none"
    output = "required"

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        n = keys.count("block_count", most=MAX_LAYERS)
        columns = (keys.numbers(f"xielu.{name}", n) for name in ("alpha_n", "alpha_p", "beta", "eps"))
        return super().read_hparams(keys) | {"xielu": tuple(zip(*columns, strict=True))}

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp
        yield from tables.norm("attn_norm", hp.n_embd)
        yield from tables.attention(hp, OPTIONAL)
        yield from tables.qk_norm(hp)
        yield from tables.norm("ffn_norm", hp.n_embd)
        yield from tables.ffn(hp, gate=False)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = g.qkv(cur, w, il)
        q, k = g.qk_norm(q, k, w, il)
        q, k = g.rope(q, self.rope_type, w, "Qcur_pos", il), g.rope(k, self.rope_type, w, "Kcur_pos", il)
        return q, k, g.named(v, "Vcur_pos", il)

    def build_ffn(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
        return g.ffn(cur, w, il, "xielu", name="ffn_down")
