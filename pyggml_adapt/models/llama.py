"""Llama 1 to 3, Mistral, Mixtral and everything else that ships as `llama`.

Source: llama.cpp src/models/llama.cpp
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import Tensor
from pyggml_adapt.graph.builder import GraphBuilder, LayerWeights
from pyggml_adapt.models.base import Model, TensorSpec, register


@register("llama")
class Llama(Model):
    def check_hparams(self) -> None:
        hp = self.hp
        if hp.n_embd_head_k != hp.n_embd_head_v:
            raise ModelError(
                f"{hp.arch}.attention.value_length = {hp.n_embd_head_v} is not key_length {hp.n_embd_head_k}"
            )
        if hp.n_rot != hp.n_embd_head_k or hp.n_rot % 2:
            raise ModelError(
                f"{hp.arch}.rope.dimension_count = {hp.n_rot} is not the head size {hp.n_embd_head_k}, or odd"
            )

    def tensors(self) -> Iterator[TensorSpec]:
        yield from super().tensors()
        yield TensorSpec("rope_freqs.weight", (self.hp.n_rot // 2,), required=False)

    def layer_tensors(self) -> Iterator[TensorSpec]:
        hp = self.hp
        n_embd_q = hp.n_embd_head_k * hp.n_head
        yield TensorSpec("attn_norm.weight", (hp.n_embd,))
        yield TensorSpec("attn_q.weight", (hp.n_embd, n_embd_q))
        yield TensorSpec("attn_q.bias", (n_embd_q,), required=False)
        yield TensorSpec("attn_k.weight", (hp.n_embd, hp.n_embd_k_gqa))
        yield TensorSpec("attn_k.bias", (hp.n_embd_k_gqa,), required=False)
        yield TensorSpec("attn_v.weight", (hp.n_embd, hp.n_embd_v_gqa))
        yield TensorSpec("attn_v.bias", (hp.n_embd_v_gqa,), required=False)
        yield TensorSpec("attn_output.weight", (n_embd_q, hp.n_embd))
        yield TensorSpec("attn_output.bias", (hp.n_embd,), required=False)
        yield TensorSpec("ffn_norm.weight", (hp.n_embd,))
        if hp.n_expert:
            yield TensorSpec("ffn_gate_inp.weight", (hp.n_embd, hp.n_expert))
            yield TensorSpec("ffn_gate_exps.weight", (hp.n_embd, hp.n_ff, hp.n_expert), required=False)
            yield TensorSpec("ffn_down_exps.weight", (hp.n_ff, hp.n_embd, hp.n_expert))
            yield TensorSpec("ffn_up_exps.weight", (hp.n_embd, hp.n_ff, hp.n_expert))
            return
        for name, ne in (
            ("ffn_gate", (hp.n_embd, hp.n_ff)),
            ("ffn_down", (hp.n_ff, hp.n_embd)),
            ("ffn_up", (hp.n_embd, hp.n_ff)),
        ):
            yield TensorSpec(f"{name}.weight", ne)
            yield TensorSpec(f"{name}.bias", ne[1:], required=False)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        inp = cur  # [n_embd, n_tokens]
        cur = g.named(g.norm(cur, w.attn_norm, il), "attn_norm", il)
        q, k, v = g.qkv(cur, w, il)  # [n_embd_head, n_head or n_head_kv, n_tokens]
        q = g.named(g.rope(q, self.rope_type, w.model.rope_freqs), "Qcur", il)
        k = g.named(g.rope(k, self.rope_type, w.model.rope_freqs), "Kcur", il)
        if il == self.hp.n_layer - 1 and g.n_outputs == 0:
            g.store_kv(k, v, il)
            return None
        cur = g.named(g.attn(q, k, v, w, il), "attn_out", il)
        if il == self.hp.n_layer - 1:
            cur, inp = g.output_rows(cur), g.output_rows(inp)  # [n_embd, n_outputs]
        inp = g.named(g.add(cur, inp), "ffn_inp", il)
        cur = g.named(g.norm(inp, w.ffn_norm, il), "ffn_norm", il)
        cur = g.moe_ffn(cur, w, il) if self.hp.n_expert else g.ffn(cur, w, il)
        return g.named(g.add(cur, inp), "l_out", il)
