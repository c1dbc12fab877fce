"""GraphBuilder: the blocks that models are built from, over ggml's ops.

Node names and their order are llama.cpp's, so that any node can be compared with llama-eval-callback's.
Source: llama.cpp src/llama-graph.cpp
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyggml_adapt.ggml import CGraph, Context, OpHint, Prec, RopeType, Tensor, Type, ops
from pyggml_adapt.graph.inputs import Inputs
from pyggml_adapt.graph.weights import LayerWeights, Weights

if TYPE_CHECKING:
    from pyggml_adapt.graph.hparams import HParams

EMBEDDING = "token_embd.weight"
SWIGLU_OAI = 1.702, 7.0  # the factor in its sigmoid, and the limit of what it is given
MIN_WEIGHTS_SUM = 6.103515625e-5  # the smallest normal F16: experts' weights are never divided by zero


class GraphBuilder:
    """Build the graph of one forward pass over n_tokens tokens and what the cache holds."""

    def __init__(
        self,
        ctx: Context,
        graph: CGraph,
        hp: HParams,
        inputs: Inputs,
        weights: Weights,
        *,
        n_ctx: int,
        k_l: Mapping[int, Tensor],
        v_l: Mapping[int, Tensor],
    ):
        """n_ctx: of the cache, padded.  k_l, v_l: its tensors by layer, [n_embd_k_gqa, n_cells]."""
        self.ctx, self.graph, self.hp, self.inputs, self.weights = ctx, graph, hp, inputs, weights
        self.n_tokens, self.n_outputs, self.n_ctx = inputs.n_tokens, inputs.n_outputs, n_ctx
        self.k_l, self.v_l = k_l, v_l
        self.layer_inp: dict[int, Tensor] = {}  # of each layer that is built; of the head, as n_layer, the rows wanted
        self.kq_scale = hp.f_attention_scale or float(np.float32(1.0) / np.sqrt(np.float32(hp.n_embd_head_k)))

    def named(self, cur: Tensor, name: str, il: int = -1) -> Tensor:
        """Return cur, named as llama.cpp names the node."""
        cur.name = name if il < 0 else f"{name}-{il}"
        return cur

    def mm(self, w: Tensor, cur: Tensor) -> Tensor:
        """Return the product of weights [k, m], with the low-rank pairs on them, and activations [k, n]: [m, n]."""
        ctx, out = self.ctx, ops.mul_mat(self.ctx, w, cur)
        if w.name == EMBEDDING:  # as a tied head: pairs on it are the embedding's, and have the other orientation
            return out
        return self.weights.add_pairs(ctx, out, w, lambda a, b: ops.mul_mat(ctx, b, ops.mul_mat(ctx, a, cur)))

    def mm_id(self, w: Tensor, cur: Tensor, ids: Tensor) -> Tensor:
        """Return the products of cur and the experts that ids picks for each token, [m, n_used, n].

        w: [k, m, n_expert].  cur: [k, n_used or 1, n].  ids: [n_used, n].
        """
        ctx, out = self.ctx, ops.mul_mat_id(self.ctx, w, cur, ids)
        return self.weights.add_pairs(
            ctx, out, w, lambda a, b: ops.mul_mat_id(ctx, b, ops.mul_mat_id(ctx, a, cur, ids), ids)
        )

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        return ops.add(self.ctx, a, b)

    def add_residual(self, cur: Tensor, inp: Tensor) -> Tensor:
        """Return inp plus cur, which is scaled first if the model scales what is added."""
        return self.add(self.scaled(cur, self.hp.f_residual_scale) if self.hp.f_residual_scale else cur, inp)

    def biased(self, cur: Tensor, bias: Tensor | None) -> Tensor:
        """Return cur with the bias added, if there is one."""
        return cur if bias is None else ops.add(self.ctx, cur, bias)

    def scaled(self, cur: Tensor, factor: float) -> Tensor:
        """Return cur times a number."""
        return ops.scale(self.ctx, cur, factor)

    def soft_capped(self, cur: Tensor) -> Tensor:
        """Return logits, drawn towards 0 so that none is beyond the model's limit, if it has one."""
        limit = self.hp.f_final_logit_softcapping
        return self.scaled(ops.tanh(self.ctx, self.scaled(cur, 1.0 / limit)), limit) if limit else cur

    def norm(self, cur: Tensor, w: Tensor | None, il: int = -1, bias: Tensor | None = None) -> Tensor:
        """Return cur, its rows normed as the model's are, scaled by w and shifted by the bias where there are such."""
        ctx, hp = self.ctx, self.hp
        if hp.f_norm_rms_eps is not None:
            cur = ops.rms_norm(ctx, cur, hp.f_norm_rms_eps)
        else:
            cur = ops.norm(ctx, cur, hp.f_norm_eps)
        if w is None:
            return cur
        cur = ops.mul(ctx, self.named(cur, "norm", il), w)
        return cur if bias is None else self.add(self.named(cur, "norm_w", il), bias)

    def inp_embd(self, token_embd: Tensor) -> Tensor:
        """Return the embeddings of the input tokens, [n_embd, n_tokens]."""
        ctx, tokens = self.ctx, self.inputs.tokens
        cur = ops.get_rows(ctx, token_embd, tokens)
        cur = self.weights.add_pairs(
            ctx, cur, token_embd, lambda a, b: ops.mul_mat(ctx, b, ops.get_rows(ctx, a, tokens))
        )
        if self.hp.f_embedding_scale:
            cur = self.scaled(cur, self.hp.f_embedding_scale)
        return self.graph.expand(self.named(cur, "embd"))

    def output_rows(self, cur: Tensor) -> Tensor:
        """Return the columns of cur [n, n_tokens] whose logits are wanted: [n, n_outputs], which must not be 0."""
        assert self.inputs.out_ids is not None  # for mypy: a layer without outputs ends before it comes here
        return ops.get_rows(self.ctx, cur, self.inputs.out_ids)

    def qkv(self, cur: Tensor, w: LayerWeights, il: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V, each [n_embd_head, its number of heads, n_tokens]."""
        hp = self.hp.of_layer(il)
        if w.attn_qkv is not None:
            q, k, v = self._split_qkv(cur, w, il)
        else:
            q = self._clamped(self._projected(w.attn_q, w.attn_q_b, cur, "Qcur", il), "Qcur_clamped", il)
            k = self._clamped(self._projected(w.attn_k, w.attn_k_b, cur, "Kcur", il), "Kcur_clamped", il)
            v = self._clamped(self._projected(w.attn_v, w.attn_v_b, cur, "Vcur", il), "Vcur_clamped", il)
            q = ops.reshape(self.ctx, q, hp.n_embd_head_k, hp.n_head, self.n_tokens)
            k = ops.reshape(self.ctx, k, hp.n_embd_head_k, hp.n_head_kv, self.n_tokens)
            v = ops.reshape(self.ctx, v, hp.n_embd_head_v, hp.n_head_kv, self.n_tokens)
        return self.named(q, "Qcur", il), self.named(k, "Kcur", il), self.named(v, "Vcur", il)

    def _split_qkv(self, cur: Tensor, w: LayerWeights, il: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of Q, K and V in the product with the fused weight."""
        hp, n = self.hp.of_layer(il), self.n_tokens
        qkv = self._clamped(self._projected(w.attn_qkv, w.attn_qkv_b, cur, "wqkv", il, "wqkv_b"), "wqkv_clamped", il)
        k_head, v_head, nb2 = qkv.type.row_size(hp.n_embd_head_k), qkv.type.row_size(hp.n_embd_head_v), qkv.nb[1]
        k_at, v_at = k_head * hp.n_head, k_head * (hp.n_head + hp.n_head_kv)
        q = ops.view(self.ctx, qkv, (hp.n_embd_head_k, hp.n_head, n), (k_head, nb2))
        k = ops.view(self.ctx, qkv, (hp.n_embd_head_k, hp.n_head_kv, n), (k_head, nb2), k_at)
        return q, k, ops.view(self.ctx, qkv, (hp.n_embd_head_v, hp.n_head_kv, n), (v_head, nb2), v_at)

    def flat_qkv(self, cur: Tensor, w: LayerWeights, il: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V, each with all its heads in one row, [n_embd_head * its number of heads, n_tokens]."""
        if w.attn_qkv is None:
            q = self.biased(self.mm(w.attn_q, cur), w.attn_q_b)
            k = self.biased(self.mm(w.attn_k, cur), w.attn_k_b)
            v = self.biased(self.mm(w.attn_v, cur), w.attn_v_b)
        else:
            qkv = self._projected(w.attn_qkv, w.attn_qkv_b, cur, "wqkv", il, "wqkv_b")
            k_at = self.hp.n_embd_head_k * self.hp.n_head
            v_at = k_at + self.hp.n_embd_k_gqa
            q, k, v = (self._columns(qkv, *part) for part in ((0, k_at), (k_at, v_at), (v_at, qkv.ne[0])))
        return self.named(q, "Qcur", il), self.named(k, "Kcur", il), self.named(v, "Vcur", il)

    def _columns(self, cur: Tensor, start: int, end: int) -> Tensor:
        """Return a copy of elements start to end of each row of cur."""
        part = ops.view(self.ctx, cur, (end - start, cur.ne[1]), (cur.nb[1],), cur.type.row_size(start))
        return ops.cont(self.ctx, part)

    def qk_norm(self, q: Tensor, k: Tensor, w: LayerWeights, il: int, what: str = "normed") -> tuple[Tensor, Tensor]:
        """Return Q and K, their rows normed, named Qcur_<what> and Kcur_<what>."""
        q = self.named(self.norm(q, w.attn_q_norm, il), f"Qcur_{what}", il)
        return q, self.named(self.norm(k, w.attn_k_norm, il), f"Kcur_{what}", il)

    def tempered(self, q: Tensor) -> Tensor:
        """Return Q times what grows with its tokens' positions, in models that sharpen attention so."""
        assert self.inputs.attn_scale is not None  # for mypy: hp.f_attn_temp_scale says that there is one
        return ops.mul(self.ctx, q, self.inputs.attn_scale)

    def heads(self, cur: Tensor) -> Tensor:
        """Return cur [n_embd_head * number of heads, n_tokens] split into heads."""
        n_embd_head = self.hp.n_embd_head_k
        return ops.reshape(self.ctx, cur, n_embd_head, cur.ne[0] // n_embd_head, self.n_tokens)

    def _clamped(self, cur: Tensor, name: str, il: int) -> Tensor:
        limit = self.hp.f_clamp_kqv
        return self.named(ops.clamp(self.ctx, cur, -limit, limit), name, il) if limit > 0.0 else cur

    def _projected(self, w: Tensor, bias: Tensor | None, cur: Tensor, name: str, il: int, biased: str = "") -> Tensor:
        """Return w times cur, named, plus the bias if there is one, named `biased` or the same."""
        cur = self.named(self.mm(w, cur), name, il)
        return cur if bias is None else self.named(self.add(cur, bias), biased or name, il)

    def rope(self, cur: Tensor, rope_type: RopeType, w: LayerWeights, name: str, il: int) -> Tensor:
        """Return cur [n_embd_head, n_head, n_tokens] rotated by the positions of its tokens, named if it has a name."""
        hp, freq_base, freq_scale = self.hp, self.hp.rope_freq_base, self.hp.rope_freq_scale
        yarn = hp.yarn_ext_factor, hp.yarn_attn_factor
        if hp.is_swa(il):
            freq_base, freq_scale = hp.rope_freq_base_swa or freq_base, hp.rope_freq_scale_swa or freq_scale
            yarn = yarn if hp.yarn_swa else (0.0, 1.0)
        cur = ops.rope_ext(
            self.ctx,
            cur,
            self.inputs.pos,
            self._rope_factors(w.model),
            hp.n_rot,
            rope_type,
            hp.n_ctx_orig_yarn,
            freq_base,
            freq_scale,
            *yarn,
            hp.yarn_beta_fast,
            hp.yarn_beta_slow,
        )
        return self.named(cur, name, il) if name else cur

    def _rope_factors(self, w: Weights) -> Tensor | None:
        """Return what the frequencies are divided by; LongRoPE's depend on how long the context may become."""
        if w.rope_freqs is not None:
            return w.rope_freqs
        return w.rope_factors_long if self.n_ctx > self.hp.n_ctx_orig_yarn else w.rope_factors_short

    def hadamard(self, cur: Tensor, rotation: Tensor | None) -> Tensor:
        """Return cur with its rows rotated block by block, if the cache's type asks for it."""
        if rotation is None:
            return cur
        n, ne = rotation.ne[0], cur.ne
        rows = (n, math.prod(ne) // n)
        flat = ops.reshape(self.ctx, cur, *rows) if cur.is_contiguous else ops.cont(self.ctx, cur, *rows)
        product = ops.mul_mat_set_hint(ops.mul_mat(self.ctx, rotation, flat), OpHint.SRC0_IS_HADAMARD)
        return ops.reshape(self.ctx, product, *ne)

    def store_kv(self, k: Tensor, v: Tensor, il: int) -> None:
        """Write K and V of this batch into their cells of the cache."""
        ctx, n, hp, inputs = self.ctx, self.n_tokens, self.hp.of_layer(il), self.inputs.attn(il)
        k, v = self.hadamard(k, inputs.k_rot), self.hadamard(v, inputs.v_rot)
        self.graph.expand(self.inputs.pos)  # it is filled though no layer may rotate
        for cur in (k, v) if hp.swa_layers else (v, k):  # llama.cpp's order, of models with windows and without
            self.graph.expand(cur)
        k = ops.view(ctx, k, (hp.n_embd_k_gqa, n), (k.nb[2],))
        self.graph.expand(ops.set_rows(ctx, self.k_l[il], k, inputs.k_idxs))
        cache = self.v_l[il]
        if inputs.v_trans:  # V is kept transposed: one element a row
            merge = ops.reshape if v.nb[2] == v.type.row_size(hp.n_embd_v_gqa) else ops.cont
            v = merge(ctx, v, hp.n_embd_v_gqa, n)
            if hp.n_embd_v_gqa < cache.ne[0]:  # all layers have one table of where elements go
                v = ops.pad(ctx, v, cache.ne[0] - hp.n_embd_v_gqa, 0, 0, 0)
            cache, v = ops.reshape(ctx, cache, 1, math.prod(cache.ne)), ops.reshape(ctx, v, 1, math.prod(v.ne))
        else:
            v = ops.view(ctx, v, (hp.n_embd_v_gqa, n), (v.nb[2],))
        self.graph.expand(ops.set_rows(ctx, cache, v, inputs.v_idxs))

    def _cached(self, il: int) -> tuple[Tensor, Tensor]:
        """Return views of the first n_kv cells: K [n_embd_head, n_head_kv, n_kv]; V likewise, or [n_kv, n_head_kv,
        n_embd_head] if it is kept transposed."""
        hp, ctx, k, v = self.hp.of_layer(il), self.ctx, self.k_l[il], self.v_l[il]
        n_kv = self.inputs.attn(il).n_kv
        k_head = k.type.row_size(hp.n_embd_head_k)
        k = ops.view(ctx, k, (hp.n_embd_head_k, hp.n_head_kv, n_kv), (k_head, k.nb[1], k.nb[2]))
        if self.inputs.attn(il).v_trans:
            row = v.type.row_size(v.ne[1])  # of all cells
            v = ops.view(ctx, v, (n_kv, hp.n_head_kv, hp.n_embd_head_v), (row * hp.n_embd_head_v, row, v.nb[2]))
        else:
            v_head = v.type.row_size(hp.n_embd_head_v)
            v = ops.view(ctx, v, (hp.n_embd_head_v, hp.n_head_kv, n_kv), (v_head, v.nb[1], v.nb[2]))
        return k, v

    def attn(self, q: Tensor, k: Tensor, v: Tensor, w: LayerWeights, il: int, kq_scale: float | None = None) -> Tensor:
        """Return the attention over the cache, this batch included, projected to [n_embd, n_tokens].

        kq_scale: what products of Q and K are multiplied with, if it is not the model's.
        """
        scale, inputs = self.kq_scale if kq_scale is None else kq_scale, self.inputs.attn(il)
        q = self.graph.expand(self.hadamard(q, inputs.k_rot))
        self.store_kv(k, v, il)
        k, v = self._cached(il)
        q, k, v = (ops.permute(self.ctx, cur, 0, 2, 1, 3) for cur in (self._per_token(q), k, v))
        attend = self._attn_flash if self.inputs.flash_attn else self._attn_soft_max
        cur = attend(q, k, v, w.attn_sinks, scale, il)
        cur = self.hadamard(self.named(self.graph.expand(cur), "kqv_out", il), inputs.v_rot)
        return self.biased(self.mm(w.attn_output, cur), w.attn_output_b)

    def _attn_flash(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, il: int) -> Tensor:
        ctx, max_bias, soft_cap = self.ctx, self.hp.f_max_alibi_bias, self.hp.f_attn_logit_softcapping
        if k.type == Type.F32:
            k = ops.cast(ctx, k, Type.F16)
        if v.type == Type.F32:
            v = ops.cast(ctx, v, Type.F16)
        cur = ops.flash_attn_ext(ctx, q, k, v, self.inputs.attn(il).kq_mask, scale, max_bias, soft_cap, sinks=sinks)
        ops.prec_set_acc(cur, Prec.F32)  # [n_embd_head, n_head, n_tokens]
        return ops.reshape(ctx, cur, cur.ne[0] * cur.ne[1], cur.ne[2])

    def _attn_soft_max(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, il: int) -> Tensor:
        ctx, max_bias, soft_cap = self.ctx, self.hp.f_max_alibi_bias, self.hp.f_attn_logit_softcapping
        kq = self.named(ops.mul_mat(ctx, k, q), "kq", il)  # [n_kv, n_tokens, n_head]
        ops.prec_set_acc(kq, Prec.F32)
        if soft_cap:
            kq = self.named(self.scaled(kq, 1.0 / soft_cap), "kq_scaled_1", il)
            kq = self.named(ops.tanh(ctx, kq), "kq_tanh", il)
            kq = self.named(self.scaled(kq, soft_cap), "kq_scaled_2", il)
        kq = ops.soft_max_ext(ctx, kq, self.inputs.attn(il).kq_mask, scale, max_bias, sinks=sinks)
        kqv = self.named(ops.mul_mat(ctx, v, self.named(kq, "kq_soft_max", il)), "kqv", il)
        cur = ops.permute(ctx, kqv, 0, 2, 1, 3)  # [n_embd_head, n_head, n_tokens]
        return ops.cont(ctx, cur, cur.ne[0] * cur.ne[1], cur.ne[2])

    def _per_token(self, q: Tensor) -> Tensor:
        return ops.view(self.ctx, q, q.ne, q.nb[1:])

    def ffn(
        self, cur: Tensor, w: LayerWeights, il: int, act: str = "silu", *, part: str = "", name: str = "ffn_out"
    ) -> Tensor:
        """Return down(act(gate(cur)) * up(cur)), or down(act(up(cur))) where there is no gate: [n_embd, n].

        act: silu, gelu, relu_sqr, xielu, or swiglu of fused gate and up.  part: `_shexp` for the shared expert's.
        """
        up, gate, down = (f"ffn_{which}{part}" for which in ("up", "gate", "down"))
        cur_up = self._projected(getattr(w, up), getattr(w, f"{up}_b"), cur, "ffn_up", il, "ffn_up_b")
        if getattr(w, gate) is None:
            cur = self._activated(cur_up, act, il)
        else:
            cur = self._projected(getattr(w, gate), getattr(w, f"{gate}_b"), cur, "ffn_gate", il, "ffn_gate_b")
            cur = self._gated(cur, cur_up, act, "ffn", il)
        cur, bias = self.mm(getattr(w, down), cur), getattr(w, f"{down}_b")
        cur = cur if bias is None else self.add(self.named(cur, "ffn_down", il), bias)
        return self.named(cur, name, il) if name else cur

    def _gated(self, gate: Tensor, up: Tensor, act: str, prefix: str, il: int) -> Tensor:
        if act == "gelu":
            return self.named(ops.geglu_split(self.ctx, gate, up), f"{prefix}_geglu", il)
        if act == "swiglu_oai":
            return self.named(ops.swiglu_oai(self.ctx, gate, up, *SWIGLU_OAI), f"{prefix}_swiglu_oai", il)
        return self.named(ops.swiglu_split(self.ctx, gate, up), f"{prefix}_swiglu", il)

    def _activated(self, cur: Tensor, act: str, il: int) -> Tensor:
        ctx = self.ctx
        if act == "relu_sqr":
            cur = self.named(ops.relu(ctx, cur), "ffn_relu", il)
            return self.named(ops.sqr(ctx, cur), "ffn_sqr(relu)", il)
        if act == "xielu":
            return self.named(ops.xielu(ctx, cur, *self.hp.xielu[il]), "ffn_xielu", il)
        return self.named(getattr(ops, act)(ctx, cur), f"ffn_{act}", il)

    def shared_moe_ffn(self, cur: Tensor, w: LayerWeights, il: int, name: str = "ffn_shexp") -> Tensor:
        """Return the experts' output plus, if there is one, the shared expert's, which is named `name`: [n_embd, n]."""
        out = self.moe_ffn(cur, w, il)
        if w.ffn_up_shexp is None:
            return out
        return self.named(self.add(out, self.ffn(cur, w, il, part="_shexp", name=name)), "ffn_out", il)

    def gated_shared_expert(self, cur: Tensor, w: LayerWeights, il: int) -> Tensor:
        """Return the shared expert's output times the sigmoid of its gate, [n_embd, n]."""
        ctx = self.ctx
        gate = self.named(self.mm(w.ffn_gate_inp_shexp, cur), "ffn_shexp_gate_inp", il)  # [1, n]
        gate = self.named(ops.div(ctx, ops.silu(ctx, gate), gate), "ffn_shexp_gate", il)
        cur = self.ffn(cur, w, il, part="_shexp", name="ffn_shexp")
        return self.named(ops.mul(ctx, cur, gate), "ffn_shexp_out", il)

    def moe_ffn(
        self, cur: Tensor, w: LayerWeights, il: int, act: str = "silu", *, weigh_inputs: bool = False
    ) -> Tensor:
        """Return the sum of the n_expert_used best experts' outputs, each weighted by its probability: [n_embd, n].

        act: silu or swiglu_oai.  weigh_inputs: whether what they are given is weighted instead.
        """
        ctx, n_embd, n, n_used = self.ctx, cur.ne[0], cur.ne[1], self.hp.n_expert_used
        chosen, weights = self._choose_experts(cur, w, il)
        cur = ops.reshape(ctx, cur, n_embd, 1, n)
        if weigh_inputs:
            cur = ops.mul(ctx, ops.repeat_4d(ctx, cur, n_embd, n_used, n, 1), weights)
            cur = self.named(cur, "ffn_moe_weighted", il)
        cur = self._experts(cur, chosen, w, il, act)  # [n_embd, n_used, n]
        if not weigh_inputs:
            cur = self.named(ops.mul(ctx, cur, weights), "ffn_moe_weighted", il)
        self.graph.expand(cur)
        parts = [self.graph.expand(ops.view(ctx, cur, (n_embd, n), (cur.nb[2],), i * cur.nb[1])) for i in range(n_used)]
        out = parts[0]
        for part in parts[1:]:
            out = self.graph.expand(self.add(out, part))
        return self.named(out if n_used > 1 else ops.cont(ctx, out), "ffn_moe_out", il)

    def _experts(self, cur: Tensor, chosen: Tensor, w: LayerWeights, il: int, act: str) -> Tensor:
        """Return what the experts chosen for each token make of cur [n_embd, n_used or 1, n]: [n_embd, n_used, n]."""
        up = self._expert(w.ffn_up_exps, w.ffn_up_exps_b, cur, chosen, "ffn_moe_up", il)  # [n_ff, n_used, n]
        if w.ffn_gate_exps is None:
            cur = self.named(ops.silu(self.ctx, up), "ffn_moe_silu", il)
        else:
            gate = self._expert(w.ffn_gate_exps, w.ffn_gate_exps_b, cur, chosen, "ffn_moe_gate", il)
            cur = self._gated(gate, up, act, "ffn_moe", il)
        return self._expert(w.ffn_down_exps, w.ffn_down_exps_b, cur, chosen, "ffn_moe_down", il)

    def _expert(self, w: Tensor, bias: Tensor | None, cur: Tensor, ids: Tensor, name: str, il: int) -> Tensor:
        """Return the products of mm_id(), named, each plus its expert's column of the bias if there is one."""
        cur = self.named(self.mm_id(w, cur, ids), name, il)
        return cur if bias is None else self.named(ops.add_id(self.ctx, cur, bias, ids), f"{name}_biased", il)

    def _choose_experts(self, cur: Tensor, w: LayerWeights, il: int) -> tuple[Tensor, Tensor]:
        """Return the experts of each token, I32 [n_used, n], and their weights, [1, n_used, n].

        The weights are a function of the router's logits, softmax or sigmoid, and the experts those with the largest.
        With softmax_weight and sigmoid_weight these are chosen by the logits, and the softmax is of theirs only.
        """
        ctx, hp = self.ctx, self.hp
        logits = self._projected(w.ffn_gate_inp, w.ffn_gate_inp_b, cur, "ffn_moe_logits", il, "ffn_moe_logits_biased")
        if hp.expert_gating_func == "softmax_weight":
            probs = logits  # [n_expert, n]
        else:
            probs = ops.soft_max(ctx, logits) if hp.expert_gating_func == "softmax" else ops.sigmoid(ctx, logits)
        by = self.named(probs, "ffn_moe_probs", il)
        if hp.expert_gating_func == "sigmoid_weight":
            by = logits
        if w.exp_probs_b_b is not None:  # it counts for what is chosen only
            by = self.named(self.add(probs, w.exp_probs_b_b), "ffn_moe_probs_biased", il)
        chosen = self.named(ops.argsort_top_k(ctx, by, hp.n_expert_used), "ffn_moe_topk", il)
        return chosen, self.graph.expand(self._expert_weights(probs, chosen, il))

    def _expert_weights(self, probs: Tensor, chosen: Tensor, il: int) -> Tensor:
        """Return the weights of the experts chosen for each token, [1, n_used, n].  probs: [n_expert, n]."""
        ctx, hp, n = self.ctx, self.hp, probs.ne[1]
        weights = ops.get_rows(ctx, ops.reshape(ctx, probs, 1, hp.n_expert, n), chosen)
        weights = self.named(weights, "ffn_moe_weights", il)
        if hp.expert_gating_func == "softmax_weight":
            weights = ops.soft_max(ctx, ops.reshape(ctx, weights, hp.n_expert_used, n))
            weights = self.named(ops.reshape(ctx, weights, 1, hp.n_expert_used, n), "ffn_moe_weights_softmax", il)
        if hp.expert_weights_norm:
            weights = ops.reshape(ctx, weights, hp.n_expert_used, n)
            total = self.named(ops.sum_rows(ctx, weights), "ffn_moe_weights_sum", il)  # [1, n]
            total = self.named(ops.clamp(ctx, total, MIN_WEIGHTS_SUM), "ffn_moe_weights_sum_clamped", il)
            weights = self.named(ops.div(ctx, weights, total), "ffn_moe_weights_norm", il)
            weights = ops.reshape(ctx, weights, 1, hp.n_expert_used, n)
        if hp.expert_weights_scale not in (0.0, 1.0):
            weights = self.named(self.scaled(weights, hp.expert_weights_scale), "ffn_moe_weights_scaled", il)
        return weights
