"""gpt-oss: every head has a sink, every second layer a window, and the router and all experts have biases.

Source: llama.cpp src/models/openai-moe.cpp
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
from pyggml_adapt.models.tables import REQUIRED


@register("gpt-oss")
class GptOss(Model):
    rope_type = RopeType.NEOX
    output = "required"
    experts = "required"

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        own = {
            "n_ff_exp": keys.count("expert_feed_forward_length"),
            "expert_gating_func": "softmax_weight",
            "expert_weights_norm": False,
        }
        window = read_swa(keys, 2, n_swa=keys.count("attention.sliding_window"))
        return super().read_hparams(keys) | window | own

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        hp = self.hp
        yield from tables.norm("attn_norm", hp.n_embd)
        yield from tables.attention(hp, REQUIRED)
        yield TensorSpec("attn_sinks.weight", (hp.n_head,))
        yield from tables.norm("post_attention_norm", hp.n_embd)
        yield from tables.experts(hp)
        yield TensorSpec("ffn_gate_inp.bias", (hp.n_expert,))
        for name, n in (("gate", hp.n_ff_exp), ("down", hp.n_embd), ("up", hp.n_ff_exp)):
            yield TensorSpec(f"ffn_{name}_exps.bias", (n, hp.n_expert))

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = g.qkv(cur, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q, k = g.rope(q, self.rope_type, w, "Qcur", il), g.rope(k, self.rope_type, w, "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.named(g.attn(q, k, v, w, il), "attn_out", il)
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        cur = g.named(g.norm(inp, w.post_attention_norm, il), "attn_post_norm", il)
        cur = g.moe_ffn(cur, w, il, "swiglu_oai")
        cur = g.named(g.add(cur, inp), "l_out", il)
        return g.output_rows(cur) if il == self.hp.n_layer - 1 else cur  # [n_embd, n_outputs or n_tokens]
