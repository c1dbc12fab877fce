"""Gemma 2: norms before and after each block, every second layer with a sliding window, attention and logits capped.

Source: llama.cpp src/models/gemma2.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_swa
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import TensorSpec, register
from pyggml_adapt.models.gemma import Gemma


@register("gemma2")
class Gemma2(Gemma):
    n_layer_27b: ClassVar[int] = 46  # the one size whose scale is another
    post_norm_has_number: ClassVar[bool] = False  # whether llama.cpp names ffn_post_norm by its layer

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        return (
            super().read_hparams(keys)
            | cls.read_window(keys)
            | cls.read_caps(keys)
            | {"f_attention_scale": cls.attention_scale(keys)}
        )

    @classmethod
    def read_caps(cls, keys: Keys) -> dict[str, Any]:
        """Return the limits of attention and of logits."""
        return {
            "f_attn_logit_softcapping": keys.positive("attn_logit_softcapping", 50.0),
            "f_final_logit_softcapping": keys.positive("final_logit_softcapping", 30.0),
        }

    @classmethod
    def read_window(cls, keys: Keys) -> dict[str, Any]:
        """Return the hyper-parameters of layers with a sliding window."""
        return read_swa(keys, 2, n_swa=keys.count("attention.sliding_window", 4096))

    @classmethod
    def attention_scale(cls, keys: Keys) -> float:
        """Return what Q is multiplied with: it depends on the head size, or on the width of the largest model."""
        n_embd, n_head = keys.count("embedding_length"), keys.count("attention.head_count")
        n = n_embd // n_head
        if keys.n_layers()[0] != cls.n_layer_27b:
            n = keys.count("attention.key_length", max(n, 1))
        return float(np.float32(1.0) / np.sqrt(np.float32(max(n, 1))))

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        yield from super().layer_tensors(il)
        yield from tables.norm("post_attention_norm", self.hp.n_embd)
        yield from tables.norm("post_ffw_norm", self.hp.n_embd)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = self.build_qkv(g, w, cur, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.attn(g.scaled(q, g.kq_scale), k, v, w, il, kq_scale=1.0)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        cur = g.named(g.norm(cur, w.post_attention_norm, il), "attn_post_norm", il)
        inp = g.named(g.add(cur, inp), "sa_out", il)
        cur = g.named(g.norm(inp, w.ffn_norm, il), "ffn_norm", il)
        cur = g.ffn(cur, w, il, "gelu")
        cur = g.named(g.norm(cur, w.post_ffw_norm), "ffn_post_norm", il if self.post_norm_has_number else -1)
        return g.named(g.add(cur, inp), "l_out", il)

    def build_qkv(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V, not yet rotated."""
        return g.qkv(cur, w, il)
