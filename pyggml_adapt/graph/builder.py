"""GraphBuilder: the blocks that models are built from, over ggml's ops.

Node names and their order are llama.cpp's, so that any node can be compared with llama-eval-callback's.
Source: llama.cpp src/llama-graph.cpp
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pyggml_adapt.ggml import CGraph, Context, RopeType, Slots, Tensor, Type, ops
from pyggml_adapt.graph.inputs import Inputs

if TYPE_CHECKING:
    from pyggml_adapt.models.hparams import HParams

EMBEDDING = "token_embd.weight"
MIN_WEIGHTS_SUM = 6.103515625e-5  # the smallest normal F16: experts' weights are never divided by zero


class Pair(Protocol):
    """A low-rank pair on a weight W [k, m]: a [k, rank], b [rank, m]; W's product gets scale * b(a(x)) added.

    a, b: names among the factors.  On an embedding [k, m] columns are picked: a [rank, m], b [rank, k].  On experts
    all have n_expert as well.
    """

    @property
    def a(self) -> str: ...
    @property
    def b(self) -> str: ...
    @property
    def scale(self) -> float: ...


class Sources(Protocol):
    """Where a task's weights are, by GGUF name, and the low-rank pairs on them, in the order in which they count."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def factors(self) -> Mapping[str, Tensor]: ...
    @property
    def pairs(self) -> Mapping[str, Sequence[Pair]]: ...


class Weights:
    """The weights of one graph, by GGUF name: `w.token_embd` is token_embd.weight, `w.x_b` is x.bias, absent None.

    Each is a slot, made when it is first asked for.
    """

    def __init__(self, slots: Slots, sources: Sources, prefix: str = "", model: Weights | None = None):
        self._slots, self._sources, self._prefix = slots, sources, prefix
        self._made: dict[str, Tensor] = {} if model is None else model._made
        self._scaled: list[str] = [] if model is None else model._scaled
        self.model: Weights = self if model is None else model

    @property
    def names(self) -> tuple[str, ...]:
        """Return the full names of the tensors used so far, in the order of their slots."""
        return tuple(self._made)

    @property
    def scaled(self) -> tuple[str, ...]:
        """Return the names of the tensors b of the pairs that were scaled, in the order of their scale nodes."""
        return tuple(self._scaled)

    def layer(self, il: int) -> LayerWeights:
        """Return the weights whose names start blk.il."""
        return LayerWeights(self._slots, self._sources, f"blk.{il}.", self.model)

    def __getattr__(self, attribute: str) -> Any:
        is_bias = attribute.endswith("_b")
        name = f"{self._prefix}{attribute[:-2]}.bias" if is_bias else f"{self._prefix}{attribute}.weight"
        return self._slot(name, self._sources.tensors[name]) if name in self._sources.tensors else None

    def _slot(self, name: str, source: Tensor) -> Tensor:
        if name not in self._made:
            self._made[name] = self._slots.add(source)
            self._made[name].name = name  # a head that is tied to the embedding is another weight of its own
        return self._made[name]

    def add_pairs(self, ctx: Context, out: Tensor, w: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return `out` plus what the low-rank pairs on a weight add; product: of slots for a pair's a and b."""
        for pair in self._sources.pairs.get(w.name, ()):
            a, b = (self._slot(name, self._sources.factors[name]) for name in (pair.a, pair.b))
            delta = self._slots.add_scale(ops.scale(ctx, product(a, b), pair.scale))  # exchanged with the weights
            self._scaled.append(pair.b)
            out = ops.add(ctx, out, delta)
        return out


class LayerWeights(Weights):
    """The weights of one layer; `w.model` has those that belong to none."""


class GraphBuilder:
    """Build the graph of one forward pass over n_tokens tokens that attend to n_kv cells of the cache."""

    def __init__(
        self,
        ctx: Context,
        graph: CGraph,
        hp: HParams,
        inputs: Inputs,
        weights: Weights,
        *,
        n_kv: int,
        k_l: list[Tensor],
        v_l: list[Tensor],
    ):
        """k_l, v_l: the cache's tensors of each layer, [n_embd_k_gqa, n_cells]."""
        self.ctx, self.graph, self.hp, self.inputs, self.weights = ctx, graph, hp, inputs, weights
        self.n_tokens, self.n_outputs, self.n_kv = inputs.n_tokens, inputs.n_outputs, n_kv
        self.k_l, self.v_l = k_l, v_l
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
        hp = self.hp
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
        hp, n = self.hp, self.n_tokens
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
        hp = self.hp
        cur = ops.rope_ext(
            self.ctx,
            cur,
            self.inputs.pos,
            w.model.rope_freqs,
            hp.n_rot,
            rope_type,
            hp.n_ctx_orig_yarn,
            hp.rope_freq_base,
            hp.rope_freq_scale,
            hp.yarn_ext_factor,
            hp.yarn_attn_factor,
            hp.yarn_beta_fast,
            hp.yarn_beta_slow,
        )
        return self.named(cur, name, il) if name else cur

    def hadamard(self, cur: Tensor, rotation: Tensor | None) -> Tensor:
        """Return cur with its rows rotated block by block, if the cache's type asks for it."""
        if rotation is None:
            return cur
        n, ne = rotation.ne[0], cur.ne
        rows = (n, math.prod(ne) // n)
        flat = ops.reshape(self.ctx, cur, *rows) if cur.is_contiguous else ops.cont(self.ctx, cur, *rows)
        product = ops.mul_mat_set_hadamard(ops.mul_mat(self.ctx, rotation, flat))
        return ops.reshape(self.ctx, product, *ne)

    def store_kv(self, k: Tensor, v: Tensor, il: int) -> None:
        """Write K and V of this batch into their cells of the cache."""
        ctx, n = self.ctx, self.n_tokens
        k, v = self.hadamard(k, self.inputs.k_rot), self.hadamard(v, self.inputs.v_rot)
        self.graph.expand(self.inputs.pos)  # it is filled though no layer may rotate
        self.graph.expand(v)
        self.graph.expand(k)
        k = ops.view(ctx, k, (self.hp.n_embd_k_gqa, n), (k.nb[2],))
        self.graph.expand(ops.set_rows(ctx, self.k_l[il], k, self.inputs.k_idxs))
        if self.inputs.v_trans:  # V is kept transposed: one element a row
            cache = ops.reshape(ctx, self.v_l[il], 1, math.prod(self.v_l[il].ne))
            merge = ops.reshape if v.nb[2] == v.type.row_size(self.hp.n_embd_v_gqa) else ops.cont
            v = ops.reshape(ctx, merge(ctx, v, self.hp.n_embd_v_gqa, n), 1, math.prod(v.ne))
        else:
            cache = self.v_l[il]
            v = ops.view(ctx, v, (self.hp.n_embd_v_gqa, n), (v.nb[2],))
        self.graph.expand(ops.set_rows(ctx, cache, v, self.inputs.v_idxs))

    def _cached(self, il: int) -> tuple[Tensor, Tensor]:
        """Return views of the first n_kv cells: K [n_embd_head, n_head_kv, n_kv]; V likewise, or [n_kv, n_head_kv,
        n_embd_head] if it is kept transposed."""
        hp, ctx, k, v = self.hp, self.ctx, self.k_l[il], self.v_l[il]
        k_head = k.type.row_size(hp.n_embd_head_k)
        k = ops.view(ctx, k, (hp.n_embd_head_k, hp.n_head_kv, self.n_kv), (k_head, k.nb[1], k.nb[2]))
        if self.inputs.v_trans:
            n_cells = v.ne[1]
            row = v.type.row_size(n_cells)
            v = ops.view(ctx, v, (self.n_kv, hp.n_head_kv, hp.n_embd_head_v), (row * hp.n_embd_head_v, row, v.nb[2]))
        else:
            v_head = v.type.row_size(hp.n_embd_head_v)
            v = ops.view(ctx, v, (hp.n_embd_head_v, hp.n_head_kv, self.n_kv), (v_head, v.nb[1], v.nb[2]))
        return k, v

    def attn(self, q: Tensor, k: Tensor, v: Tensor, w: LayerWeights, il: int, kq_scale: float | None = None) -> Tensor:
        """Return the attention over the cache, this batch included, projected to [n_embd, n_tokens].

        kq_scale: what products of Q and K are multiplied with, if it is not the model's.
        """
        scale = self.kq_scale if kq_scale is None else kq_scale
        q = self.graph.expand(self.hadamard(q, self.inputs.k_rot))
        self.store_kv(k, v, il)
        k, v = self._cached(il)
        cur = self._attn_flash(q, k, v, scale) if self.inputs.flash_attn else self._attn_soft_max(q, k, v, scale, il)
        cur = self.hadamard(self.named(self.graph.expand(cur), "kqv_out", il), self.inputs.v_rot)
        return self.biased(self.mm(w.attn_output, cur), w.attn_output_b)

    def _attn_flash(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx = self.ctx
        q, k, v = (ops.permute(ctx, cur, 0, 2, 1, 3) for cur in (self._per_token(q), k, v))
        if k.type == Type.F32:
            k = ops.cast(ctx, k, Type.F16)
        if v.type == Type.F32:
            v = ops.cast(ctx, v, Type.F16)
        cur = ops.flash_attn_ext(ctx, q, k, v, self.inputs.kq_mask, scale)
        ops.mul_mat_set_prec_f32(cur)  # [n_embd_head, n_head, n_tokens]
        return ops.reshape(ctx, cur, cur.ne[0] * cur.ne[1], cur.ne[2])

    def _attn_soft_max(self, q: Tensor, k: Tensor, v: Tensor, scale: float, il: int) -> Tensor:
        ctx = self.ctx
        q, k, v = (ops.permute(ctx, cur, 0, 2, 1, 3) for cur in (self._per_token(q), k, v))
        kq = self.named(ops.mul_mat(ctx, k, q), "kq", il)  # [n_kv, n_tokens, n_head]
        ops.mul_mat_set_prec_f32(kq)
        kq = self.named(ops.soft_max_ext(ctx, kq, self.inputs.kq_mask, scale), "kq_soft_max", il)
        kqv = self.named(ops.mul_mat(ctx, v, kq), "kqv", il)  # [n_embd_head, n_tokens, n_head]
        cur = ops.permute(ctx, kqv, 0, 2, 1, 3)
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

    def moe_ffn(self, cur: Tensor, w: LayerWeights, il: int) -> Tensor:
        """Return the sum of the n_expert_used best experts' outputs, each weighted by its probability: [n_embd, n]."""
        ctx, n_embd, n, n_used = self.ctx, cur.ne[0], cur.ne[1], self.hp.n_expert_used
        chosen, weights = self._choose_experts(cur, w, il)
        cur = ops.reshape(ctx, cur, n_embd, 1, n)
        up = self.named(self.mm_id(w.ffn_up_exps, cur, chosen), "ffn_moe_up", il)  # [n_ff, n_used, n]
        if w.ffn_gate_exps is None:
            cur = self.named(ops.silu(ctx, up), "ffn_moe_silu", il)
        else:
            gate = self.named(self.mm_id(w.ffn_gate_exps, cur, chosen), "ffn_moe_gate", il)
            cur = self._gated(gate, up, "silu", "ffn_moe", il)
        cur = self.named(self.mm_id(w.ffn_down_exps, cur, chosen), "ffn_moe_down", il)
        cur = self.graph.expand(self.named(ops.mul(ctx, cur, weights), "ffn_moe_weighted", il))  # [n_embd, n_used, n]
        parts = [self.graph.expand(ops.view(ctx, cur, (n_embd, n), (cur.nb[2],), i * cur.nb[1])) for i in range(n_used)]
        out = parts[0]
        for part in parts[1:]:
            out = self.graph.expand(self.add(out, part))
        return self.named(out if n_used > 1 else ops.cont(ctx, out), "ffn_moe_out", il)

    def _choose_experts(self, cur: Tensor, w: LayerWeights, il: int) -> tuple[Tensor, Tensor]:
        """Return the experts of each token, I32 [n_used, n], and their weights, [1, n_used, n]."""
        ctx, hp, n = self.ctx, self.hp, cur.ne[1]
        logits = self.named(self.mm(w.ffn_gate_inp, cur), "ffn_moe_logits", il)
        gating = ops.sigmoid if hp.expert_gating_func == "sigmoid" else ops.soft_max
        probs = by = self.named(gating(ctx, logits), "ffn_moe_probs", il)  # [n_expert, n]
        if w.exp_probs_b_b is not None:  # it counts for what is chosen only
            by = self.named(self.add(probs, w.exp_probs_b_b), "ffn_moe_probs_biased", il)
        chosen = self.named(ops.argsort_top_k(ctx, by, hp.n_expert_used), "ffn_moe_topk", il)
        weights = ops.get_rows(ctx, ops.reshape(ctx, probs, 1, hp.n_expert, n), chosen)
        weights = self.named(weights, "ffn_moe_weights", il)
        if hp.expert_weights_norm:
            weights = ops.reshape(ctx, weights, hp.n_expert_used, n)
            total = self.named(ops.sum_rows(ctx, weights), "ffn_moe_weights_sum", il)  # [1, n]
            total = self.named(ops.clamp(ctx, total, MIN_WEIGHTS_SUM), "ffn_moe_weights_sum_clamped", il)
            weights = self.named(ops.div(ctx, weights, total), "ffn_moe_weights_norm", il)
            weights = ops.reshape(ctx, weights, 1, hp.n_expert_used, n)
        if hp.expert_weights_scale not in (0.0, 1.0):
            weights = self.named(self.scaled(weights, hp.expert_weights_scale), "ffn_moe_weights_scaled", il)
        return chosen, self.graph.expand(weights)
