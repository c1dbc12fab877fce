"""The inputs of one graph: made with it, and filled before each computation.

Source: llama.cpp src/llama-graph.cpp, src/llama-kv-cache.cpp (set_input_*)
"""

from __future__ import annotations

import struct
from typing import Protocol

import numpy as np

from pyggml_adapt.ggml import Context, Tensor, Type

_I32, _I64 = struct.Struct("=i").pack, struct.Struct("=q").pack
_FIRST = _I32(0)
HADAMARD_MIN = 64  # heads that are a multiple of this are rotated before they are quantised into the cache


class Batch(Protocol):
    """What is evaluated at once; arrays of n_tokens elements."""

    tokens: np.ndarray  # int32
    pos: np.ndarray  # int32
    cells: np.ndarray  # int64, where in the cache each token's K and V go
    out_ids: np.ndarray  # int32, which tokens' logits are wanted
    embd: np.ndarray | None  # F32 [n_tokens, n_embd], hidden states to start from instead of the tokens' embeddings

    def mask(self, n_kv: int) -> np.ndarray:
        """Return bool [n_tokens, n_kv]: whether each token may see each cell."""


class Inputs:
    """Input tensors for n_tokens tokens and n_kv cells, in the layouts that the cache's types ask for."""

    def __init__(
        self,
        ctx: Context,
        *,
        n_tokens: int,
        n_outputs: int,
        n_kv: int,
        n_cells: int,
        n_embd_v_gqa: int,
        flash_attn: bool,
        k_rot: int = 0,
        v_rot: int = 0,
        n_embd: int = 0,
    ):
        """k_rot, v_rot: sizes of the Hadamard rotations of K and V, 0 for none.

        n_embd: elements of a hidden state if the graph starts from these, 0 if it starts from tokens.
        """
        self.n_tokens, self.n_outputs, self.n_kv = n_tokens, n_outputs, n_kv
        self.n_cells, self.n_embd_v_gqa, self.flash_attn = n_cells, n_embd_v_gqa, flash_attn
        self.v_trans = not flash_attn
        self._ctx = ctx
        self.tokens = self._new("inp_tokens", Type.I32, n_tokens)
        self.embd = self._new("inp_embd", Type.F32, n_embd, n_tokens) if n_embd else None
        self.pos = self._new("inp_pos", Type.I32, n_tokens)
        self.k_idxs = self._new("attn_inp_k_idxs", Type.I64, n_tokens)
        self.v_idxs = self._new("attn_inp_v_idxs", Type.I64, n_tokens * (n_embd_v_gqa if self.v_trans else 1))
        self.kq_mask = self._new("attn_inp_kq_mask", Type.F16 if flash_attn else Type.F32, n_kv, n_tokens)
        self.k_rot = self._new("attn_inp_k_rot", Type.F32, k_rot, k_rot).set_output() if k_rot else None
        self.v_rot = self._new("attn_inp_v_rot", Type.F32, v_rot, v_rot).set_output() if v_rot else None
        self.out_ids = self._new("out_ids", Type.I32, n_outputs) if n_outputs else None
        self._mask = np.empty((n_tokens, n_kv), dtype=np.float16 if flash_attn else np.float32)
        steps = np.zeros(2 * n_kv if n_tokens == 1 else 0, dtype=self._mask.dtype)
        steps[n_kv:] = -np.inf
        self._steps = steps.data  # n_kv elements from n_kv - i on are a mask that shows i cells
        step_tensors = self.tokens, self.pos, self.k_idxs, self.v_idxs, self.out_ids, self.kq_mask
        self._step_tensors = tuple(tensor for tensor in step_tensors if tensor is not None)

    def _new(self, name: str, type: Type, *ne: int) -> Tensor:
        return self._ctx.new_tensor(type, ne, name).set_input()

    def fill_constants(self) -> None:
        """Write what is the same in every computation; once, after allocation: as outputs they are not overwritten."""
        for rotation in (self.k_rot, self.v_rot):
            if rotation is not None and rotation.is_allocated:
                rotation.set_data(hadamard(rotation.ne[0]))

    def fill(self, batch: Batch) -> None:
        """Write those inputs that the graph uses; the batch has the graph's numbers of tokens and outputs."""
        if self.embd is None:
            self.tokens.set_data(batch.tokens)
        else:
            self.embd.set_data(batch.embd)
        if not self.pos.is_allocated:
            return  # a graph of the head alone
        self.pos.set_data(batch.pos)
        self.k_idxs.set_data(batch.cells)
        self.v_idxs.set_data(self._element_idxs(batch.cells) if self.v_trans else batch.cells)
        if self.out_ids is not None:
            self.out_ids.set_data(batch.out_ids)
        if not self.kq_mask.is_allocated:
            return  # a graph that only stores K and V of its one layer
        self._mask.fill(-np.inf)
        self._mask[batch.mask(self.n_kv)] = 0
        self.kq_mask.set_data(self._mask)

    def fill_step(self, token: int, pos: int) -> None:
        """Write those inputs of a graph of one token and one output: in cell `pos`, it sees all cells up to its own."""
        cell = _I64(pos)
        v_idxs = self._element_idxs(np.array([pos])) if self.v_trans else cell
        start = self.n_kv - pos - 1
        mask = self._steps[start : start + self.n_kv]
        self._ctx.set_data(self._step_tensors, (_I32(token), _I32(pos), cell, v_idxs, _FIRST, mask))

    def _element_idxs(self, cells: np.ndarray) -> np.ndarray:
        """Return where each element of V goes in the transposed cache, int64 [n_tokens, n_embd_v_gqa]."""
        return cells[:, None] + np.arange(self.n_embd_v_gqa, dtype=np.int64) * self.n_cells


def hadamard(n: int) -> np.ndarray:
    """Return the orthonormal Walsh-Hadamard matrix of size n, a power of two; it is its own inverse.  F32 [n, n]."""
    out = np.full((1, 1), np.float32(1.0 / np.sqrt(np.float32(n))), dtype=np.float32)
    while len(out) < n:
        out = np.block([[out, out], [out, -out]])
    return np.ascontiguousarray(out)


def hadamard_sizes(type_k: Type, type_v: Type, n_embd_head_k: int, n_embd_head_v: int) -> tuple[int, int]:
    """Return the sizes of the rotations of K and V, 0 for none: quantised caches are rotated, as llama.cpp does.

    K takes the largest power of two that divides its head, V the smallest size.
    """
    k_rot = v_rot = 0
    if type_k.is_quantized and n_embd_head_k % HADAMARD_MIN == 0:
        k_rot = n_embd_head_k & -n_embd_head_k
    if type_v.is_quantized and n_embd_head_v % HADAMARD_MIN == 0:
        v_rot = HADAMARD_MIN
    return k_rot, v_rot
