"""The inputs of one graph: made with it, and filled before each computation.

Source: llama.cpp src/llama-graph.cpp, src/llama-kv-cache.cpp (set_input_*)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pyggml_adapt.ggml import Context, Tensor, Type

if TYPE_CHECKING:
    from pyggml_adapt.graph.hparams import HParams

_I32, _I64 = struct.Struct("=i").pack, struct.Struct("=q").pack
_FIRST = _I32(0)
HADAMARD_MIN = 64  # heads that are a multiple of this are rotated before they are quantised into the cache


class Batch(Protocol):
    """What is evaluated at once; arrays of n_tokens elements."""

    tokens: np.ndarray  # int32
    pos: np.ndarray  # int32
    cells: Sequence[np.ndarray]  # int64, for each part of the cache where in it each token's K and V go
    out_ids: np.ndarray  # int32, which tokens' logits are wanted
    embd: np.ndarray | None  # F32 [n_tokens, n_embd], hidden states to start from instead of the tokens' embeddings

    def mask(self, part: int, n_kv: int) -> np.ndarray:
        """Return bool [n_tokens, n_kv]: whether each token may see each cell of a part of the cache."""

    def distance(self, part: int, n_kv: int) -> np.ndarray:
        """Return [n_tokens, n_kv]: how many positions each cell of a part of the cache is before each token."""


class Step(Protocol):
    """One token that follows all others of its sequence."""

    token: int
    pos: int
    cells: Sequence[int]  # for each part of the cache where in it the token's K and V go

    def seen(self, part: int, n_kv: int) -> np.ndarray | None:
        """Return bool [n_kv]: the cells of a part that it sees; None if these are those of the last positions."""


class AttnInputs:
    """What attention needs to know of one part of the cache: of n_cells cells, those up to n_kv are looked at.

    n_embd_v_gqa: of V, for the layer that has most.  n_swa: how many positions a token sees, 0 for all.  alibi: whether
    the mask says how far away a position is.
    """

    def __init__(
        self,
        ctx: Context,
        suffix: str,
        *,
        n_tokens: int,
        n_kv: int,
        n_cells: int,
        n_embd_v_gqa: int,
        flash_attn: bool,
        n_swa: int,
        alibi: bool,
        k_rot: int,
        v_rot: int,
    ):
        """suffix: of the tensors' names.  k_rot, v_rot: sizes of the Hadamard rotations of K and V, 0 for none."""

        def new(name: str, type: Type, *ne: int) -> Tensor:
            return ctx.new_tensor(type, ne, f"attn_inp_{name}{suffix}").set_input()

        self.n_kv, self.n_cells, self.n_embd_v_gqa, self.v_trans = n_kv, n_cells, n_embd_v_gqa, not flash_attn
        self._alibi = alibi
        self.k_idxs = new("k_idxs", Type.I64, n_tokens)
        self.v_idxs = new("v_idxs", Type.I64, n_tokens * (n_embd_v_gqa if self.v_trans else 1))
        self.kq_mask = new("kq_mask", Type.F16 if flash_attn else Type.F32, n_kv, n_tokens)
        self.k_rot = new("k_rot", Type.F32, k_rot, k_rot).set_output() if k_rot else None
        self.v_rot = new("v_rot", Type.F32, v_rot, v_rot).set_output() if v_rot else None
        self._mask = np.empty((n_tokens, n_kv), dtype=np.float16 if flash_attn else np.float32)
        self._n_seen = min(n_swa, n_kv) if n_swa else n_kv
        self._steps = self._step_masks().data if n_tokens == 1 else None

    def _step_masks(self) -> np.ndarray:
        """Return an array of which n_kv elements are the mask of a token that sees the last cells up to its own."""
        seen = np.arange(1 - self._n_seen, 1) if self._alibi else np.zeros(self._n_seen)
        return np.pad(seen.astype(self._mask.dtype), self.n_kv, constant_values=-np.inf)

    @property
    def step_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors that step() has data for."""
        return self.k_idxs, self.v_idxs, self.kq_mask

    @property
    def rotations(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the rotations of K and V."""
        return self.k_rot, self.v_rot

    def fill(self, batch: Batch, part: int) -> None:
        """Write those inputs that the graph uses."""
        if not self.k_idxs.is_allocated:
            return  # there is no such layer in the graph
        cells = batch.cells[part]
        self.k_idxs.set_data(cells)
        self.v_idxs.set_data(self._element_idxs(cells) if self.v_trans else cells)
        if self.kq_mask.is_allocated:  # it is not where K and V are only stored
            visible = batch.mask(part, self.n_kv)
            self._mask.fill(-np.inf)
            self._mask[visible] = -batch.distance(part, self.n_kv)[visible] if self._alibi else 0
            self.kq_mask.set_data(self._mask)

    def step(self, step: Step, part: int) -> tuple[object, object, object]:
        """Return the data of step_tensors."""
        cell, seen = step.cells[part], step.seen(part, self.n_kv)
        idx = _I64(cell)
        v_idxs = self._element_idxs(np.array([cell])) if self.v_trans else idx
        if seen is None:
            start = self.n_kv + self._n_seen - cell - 1
            assert self._steps is not None  # for mypy: the graph is of one token
            return idx, v_idxs, self._steps[start : start + self.n_kv]
        self._mask.fill(-np.inf)
        self._mask[0, seen] = 0
        return idx, v_idxs, self._mask

    def _element_idxs(self, cells: np.ndarray) -> np.ndarray:
        """Return where each element of V goes in the transposed cache, int64 [n_tokens, n_embd_v_gqa]."""
        return cells[:, None] + np.arange(self.n_embd_v_gqa, dtype=np.int64) * self.n_cells


class Inputs:
    """Input tensors for n_tokens tokens, in the layouts that the cache's types ask for."""

    def __init__(
        self,
        ctx: Context,
        hp: HParams,
        *,
        n_tokens: int,
        n_outputs: int,
        n_kv: Sequence[int],
        n_cells: Sequence[int],
        flash_attn: bool,
        k_rot: int = 0,
        v_rot: int = 0,
        n_embd: int = 0,
    ):
        """n_kv, n_cells: of the parts of the cache: for all layers but those with a window, and for these if there are.

        k_rot, v_rot: sizes of the Hadamard rotations of K and V, 0 for none.  n_embd: elements of a hidden state if the
        graph starts from these, 0 if it starts from tokens.
        """
        self.n_tokens, self.n_outputs, self.flash_attn = n_tokens, n_outputs, flash_attn
        self._ctx, self._hp = ctx, hp
        self.tokens = self._new("inp_tokens", Type.I32, n_tokens)
        self.embd = self._new("inp_embd", Type.F32, n_embd, n_tokens) if n_embd else None
        self.pos = self._new("inp_pos", Type.I32, n_tokens)
        self.attn_scale = self._new("inp_attn_scale", Type.F32, 1, 1, n_tokens) if hp.f_attn_temp_scale else None
        self.parts = tuple(
            AttnInputs(
                ctx,
                suffix,
                n_tokens=n_tokens,
                n_kv=n_kv[part],
                n_cells=n_cells[part],
                n_embd_v_gqa=hp.n_embd_v_gqa,
                flash_attn=flash_attn,
                n_swa=hp.window.n if part and hp.window is not None else 0,
                alibi=hp.f_max_alibi_bias > 0.0,
                k_rot=k_rot,
                v_rot=v_rot,
            )
            for part, suffix in zip(range(len(n_cells)), ("", "_swa"), strict=False)
        )
        self.out_ids = self._new("out_ids", Type.I32, n_outputs) if n_outputs else None
        self._step_parts: list[tuple[int, AttnInputs]] = []
        self._step_tensors: tuple[Tensor, ...] = ()

    def _new(self, name: str, type: Type, *ne: int) -> Tensor:
        return self._ctx.new_tensor(type, ne, name).set_input()

    def attn(self, il: int) -> AttnInputs:
        """Return the inputs for the part of the cache that has layer il."""
        return self.parts[self._hp.is_swa(il)]

    def prepare(self) -> None:
        """Once, after allocation: write what is the same in every computation; as outputs they are not overwritten."""
        for part in self.parts:
            for rotation in part.rotations:
                if rotation is not None and rotation.is_allocated:
                    rotation.set_data(hadamard(rotation.ne[0]))
        self._step_parts = [(i, part) for i, part in enumerate(self.parts) if part.kq_mask.is_allocated]
        of_parts = [tensor for _, part in self._step_parts for tensor in part.step_tensors]
        wanted = self.tokens, self.pos, self.out_ids, self.attn_scale, *of_parts
        self._step_tensors = tuple(tensor for tensor in wanted if tensor is not None)

    def fill(self, batch: Batch) -> None:
        """Write those inputs that the graph uses; the batch has the graph's numbers of tokens and outputs."""
        if self.embd is None:
            self.tokens.set_data(batch.tokens)
        else:
            self.embd.set_data(batch.embd)
        if not self.pos.is_allocated:
            return  # a graph of the head alone
        self.pos.set_data(batch.pos)
        if self.attn_scale is not None and self.attn_scale.is_allocated:
            self.attn_scale.set_data(self._attn_scale(batch.pos))
        if self.out_ids is not None:
            self.out_ids.set_data(batch.out_ids)
        for i, part in enumerate(self.parts):
            part.fill(batch, i)

    def fill_step(self, step: Step) -> None:
        """Write the inputs of a graph of one token and one output."""
        data: tuple[object, ...] = _I32(step.token), _I32(step.pos), _FIRST
        if self.attn_scale is not None:
            data += (self._attn_scale(np.array([step.pos])),)
        for i, part in self._step_parts:
            data += part.step(step, i)
        self._ctx.set_data(self._step_tensors, data)

    def _attn_scale(self, pos: np.ndarray) -> np.ndarray:
        """Return what Q is multiplied with: it grows with the logarithm of the position.  F32 [n_tokens]."""
        hp = self._hp
        steps = (pos.astype(np.float32) + np.float32(hp.f_attn_temp_offset)) / np.float32(hp.n_attn_temp_floor_scale)
        scale = np.log(np.floor(steps).astype(np.float64) + 1.0) * float(np.float32(hp.f_attn_temp_scale)) + 1.0
        return scale.astype(np.float32)


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
