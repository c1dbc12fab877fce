"""OLMo 2 and 3: norms after each block, and over all of Q and of K; OLMo 3 has layers with a window, without YaRN.

Source: llama.cpp src/models/olmo2.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import Keys, read_swa
from pyggml_adapt.graph.weights import LayerWeights
from pyggml_adapt.models import tables
from pyggml_adapt.models.base import Model, TensorSpec, register


@register("olmo2")
class Olmo2(Model):
    rope_type = RopeType.NEOX
    output = "required"

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        found, n_swa = super().read_hparams(keys), keys.count("attention.sliding_window", 0, least=0)
        if n_swa == 0:
            return found
        unscaled = {"rope_freq_base_swa": 0.0, "rope_freq_scale_swa": 1.0, "yarn_swa": False}
        return found | read_swa(keys, 4, n_swa=n_swa) | unscaled

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp
        yield from tables.attention(hp)
        yield from tables.norm("attn_q_norm", hp.n_embd_head_k * hp.n_head)
        yield from tables.norm("attn_k_norm", hp.n_embd_k_gqa)
        yield from tables.norm("post_attention_norm", hp.n_embd)
        yield from tables.ffn(hp)
        yield from tables.norm("post_ffw_norm", hp.n_embd)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        q, k, v = g.flat_qkv(cur, w, il)  # [n_embd_head * n_head or n_head_kv, n_tokens]
        q, k = g.qk_norm(q, k, w, il)
        q, k, v = g.heads(q), g.heads(k), g.named(g.heads(v), "Vcur", il)
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.attn(q, k, v, w, il)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        cur = g.named(g.norm(cur, w.post_attention_norm, il), "attn_post_norm", il)
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        cur = g.ffn(inp, w, il)
        cur = g.named(g.norm(cur, w.post_ffw_norm), "ffn_post_norm")
        return g.named(g.add(cur, inp), "l_out", il)
