"""Rows of tensor tables that many architectures share; a bias is OPTIONAL, REQUIRED, or not there."""

from __future__ import annotations

from collections.abc import Iterator

from pyggml_adapt.graph.hparams import HParams
from pyggml_adapt.models.base import TensorSpec

OPTIONAL, REQUIRED = False, True
FUSED = "attn_qkv.weight"


def norm(name: str, n: int, bias: bool | None = None) -> Iterator[TensorSpec]:
    """Yield the tensors of a norm over n elements."""
    yield TensorSpec(f"{name}.weight", (n,))
    if bias is not None:
        yield TensorSpec(f"{name}.bias", (n,), bias)


def linear(name: str, n_in: int, n_out: int, bias: bool | None = None) -> Iterator[TensorSpec]:
    """Yield the tensors of a linear layer."""
    yield TensorSpec(f"{name}.weight", (n_in, n_out))
    if bias is not None:
        yield TensorSpec(f"{name}.bias", (n_out,), bias)


def attention(hp: HParams, bias: bool | None = None) -> Iterator[TensorSpec]:
    """Yield those of Q, K and V, one by one or fused, and of the output, whose bias `bias` is."""
    n_q = hp.n_embd_head_k * hp.n_head
    n_qkv = n_q + hp.n_embd_k_gqa + hp.n_embd_v_gqa
    yield TensorSpec(FUSED, (hp.n_embd, n_qkv), required=False)
    for name, n in (("attn_q", n_q), ("attn_k", hp.n_embd_k_gqa), ("attn_v", hp.n_embd_v_gqa)):
        yield TensorSpec(f"{name}.weight", (hp.n_embd, n), unless=FUSED)
        yield TensorSpec(f"{name}.bias", (n,), required=False, unless=FUSED)
    yield TensorSpec("attn_qkv.bias", (n_qkv,), required=False, unless="attn_q.weight")
    yield from linear("attn_output", n_q, hp.n_embd, bias)


def qk_norm(hp: HParams, bias: bool | None = None) -> Iterator[TensorSpec]:
    """Yield those of norms over each head of Q and K."""
    yield from norm("attn_q_norm", hp.n_embd_head_k, bias)
    yield from norm("attn_k_norm", hp.n_embd_head_k, bias)


def ffn(hp: HParams, bias: bool | None = None, *, gate: bool = True) -> Iterator[TensorSpec]:
    """Yield those of a feed-forward network."""
    if gate:
        yield from linear("ffn_gate", hp.n_embd, hp.n_ff, bias)
    yield from linear("ffn_down", hp.n_ff, hp.n_embd, bias)
    yield from linear("ffn_up", hp.n_embd, hp.n_ff, bias)


def experts(hp: HParams, *, gate: bool = REQUIRED, probs_bias: bool = False) -> Iterator[TensorSpec]:
    """Yield those of the router and the experts.  probs_bias: whether a bias may count when they are chosen."""
    n_ff = hp.n_ff_exp or hp.n_ff
    yield from linear("ffn_gate_inp", hp.n_embd, hp.n_expert)
    if probs_bias:
        yield TensorSpec("exp_probs_b.bias", (hp.n_expert,), required=False)
    yield TensorSpec("ffn_gate_exps.weight", (hp.n_embd, n_ff, hp.n_expert), gate)
    yield TensorSpec("ffn_down_exps.weight", (n_ff, hp.n_embd, hp.n_expert))
    yield TensorSpec("ffn_up_exps.weight", (hp.n_embd, n_ff, hp.n_expert))


def shared_expert(hp: HParams) -> Iterator[TensorSpec]:
    """Yield those of the expert that sees every token."""
    yield from linear("ffn_gate_shexp", hp.n_embd, hp.n_ff_shexp)
    yield from linear("ffn_down_shexp", hp.n_ff_shexp, hp.n_embd)
    yield from linear("ffn_up_shexp", hp.n_embd, hp.n_ff_shexp)
