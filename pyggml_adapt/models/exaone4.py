"""EXAONE 4: norms after each block and over heads of Q and K; the 32B has a window, and rope only where it has one.

Source: llama.cpp src/models/exaone4.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_swa
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register


@register("exaone4")
class Exaone4(Model):
    rope_type = RopeType.NEOX
    rope_factors = ("freqs",)
    nextn = True
    n_layer_32b: ClassVar[int] = 64  # the one size that has a window

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        found, n_swa = super().read_hparams(keys), keys.count("attention.sliding_window", 4096, least=0)
        if keys.n_layers()[0] != cls.n_layer_32b:
            return found
        if n_swa == 0:
            raise ModelError("exaone4.attention.sliding_window = 0, but with 64 layers there is a window")
        return found | read_swa(keys, 4, n_swa=n_swa) | {"rope_freq_base_swa": 0.0, "rope_freq_scale_swa": 0.0}

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from tables.attention(self.hp)
        yield from tables.qk_norm(self.hp)
        yield from tables.norm("post_attention_norm", self.hp.n_embd)
        yield from tables.ffn(self.hp)
        yield from tables.norm("post_ffw_norm", self.hp.n_embd)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        q, k, v = g.qkv(cur, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q, k = g.qk_norm(q, k, w, il)
        if self.hp.window is None or self.hp.is_swa(il):
            q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        q, k, v = g.named(q, "Qcur", il), g.named(k, "Kcur", il), g.named(v, "Vcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.named(g.attn(q, k, v, w, il), "attn_out", il)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        cur = g.named(g.norm(cur, w.post_attention_norm, il), "attn_post_norm", il)
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        cur = g.ffn(inp, w, il)
        cur = g.named(g.norm(cur, w.post_ffw_norm), "ffn_post_norm")
        return g.named(g.add(cur, inp), "l_out", il)
