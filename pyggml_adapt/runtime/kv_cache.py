"""The KV cache: cells shared by sequences, and the tensors that their K and V are kept in.

Source: llama.cpp src/llama-kv-cache.cpp, src/llama-kv-cells.h
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pyggml_adapt.errors import AllocError, ClosedError, ContextFullError, ParameterError
from pyggml_adapt.ggml import Buffer, Context, Tensor, TensorTable, Type

if TYPE_CHECKING:
    from pyggml_adapt.models import HParams

N_PAD = 256  # n_kv and n_cells are multiples of this, so that graphs are reused; llama.cpp's number
N_SEQ_MAX = 64  # sequences of a cell are the bits of an uint64
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_FIRST = np.ones(1, dtype=np.uint64)  # the bit of sequence 0


class KVCache:
    """Cells for n_ctx tokens of up to n_seq_max sequences; each cell has a position and the sequences it belongs to."""

    def __init__(
        self,
        hp: HParams,
        n_ctx: int,
        *,
        n_seq_max: int = 1,
        type_k: Type = Type.F16,
        type_v: Type = Type.F16,
        flash_attn: bool = True,
    ):
        """Raises: ParameterError for a type or size that cannot be; AllocError."""
        for name, value in (("type_k", type_k), ("type_v", type_v)):
            if value.name not in TYPES:
                raise ParameterError(f"{name} = {value.name} is not one of {', '.join(TYPES)}")
        if type_v.is_quantized and not flash_attn:
            raise ParameterError(f"type_v = {type_v.name} needs flash attention")
        for name, value, n in (("type_k", type_k, hp.n_embd_head_k), ("type_v", type_v, hp.n_embd_head_v)):
            if n % value.blck_size:
                raise ParameterError(
                    f"{name} = {value.name} needs heads that are a multiple of {value.blck_size}, not {n}"
                )
        if not 1 <= n_seq_max <= N_SEQ_MAX:
            raise ParameterError(f"n_seq_max = {n_seq_max} is not from 1 to {N_SEQ_MAX}")
        self.n_ctx, self.n_seq_max, self.type_k, self.type_v = n_ctx, n_seq_max, type_k, type_v
        self.n_cells, self._v_trans = _pad(n_ctx), not flash_attn
        self.layout = self.n_cells, int(type_k), int(type_v)  # what a graph depends on: equal layouts share graphs
        self.pos = np.full(self.n_cells, -1, dtype=np.int32)  # -1: empty
        self.seqs = np.zeros(self.n_cells, dtype=np.uint64)  # bit s: belongs to sequence s
        self._n_used = 0  # cells in use
        self.used_max = 0  # cells up to the last one in use
        self._in_order = n_seq_max == 1  # every cell in use has its index as its position
        self._allocate(hp)

    def _allocate(self, hp: HParams) -> None:
        per_token = self.type_k.row_size(hp.n_embd_k_gqa) + self.type_v.row_size(hp.n_embd_v_gqa)
        self.nbytes = per_token * self.n_cells * hp.n_layer
        self._ctx = Context(Context.size_for(2 * hp.n_layer))
        try:
            memory = mmap.mmap(-1, self.nbytes)  # zeros, resident only where they are written
        except (OSError, OverflowError) as error:
            raise AllocError(
                f"no memory for a KV cache of {self.nbytes} bytes: use a smaller n_ctx than {self.n_ctx}, "
                f"or a smaller type"
            ) from error
        self._buffer = Buffer.from_mapping(memory)
        self._memory: mmap.mmap | None = memory
        self.k_l: list[Tensor] = []
        self.v_l: list[Tensor] = []
        offset = 0
        for il in range(hp.n_layer):
            for tensors, letter, type, n in (
                (self.k_l, "k", self.type_k, hp.n_embd_k_gqa),
                (self.v_l, "v", self.type_v, hp.n_embd_v_gqa),
            ):
                tensor = self._ctx.new_tensor(type, (n, self.n_cells), f"cache_{letter}_l{il}")
                self._buffer.place(tensor, offset)
                offset += tensor.nbytes
                tensors.append(tensor)
        self.table = TensorTable([*self.k_l, *self.v_l])

    def find_slot(self, n_tokens: int) -> np.ndarray:
        """Return the first n_tokens empty cells, int64.

        Raises: ContextFullError.
        """
        end = self.used_max + n_tokens
        if self._n_used == self.used_max and end <= self.n_cells:  # no gaps: nothing to search
            return np.arange(self.used_max, end, dtype=np.int64)
        free = np.flatnonzero(self.pos < 0)
        if free.size < n_tokens:
            raise ContextFullError(f"{n_tokens} more tokens do not fit: {free.size} of {self.n_cells} cells are free")
        return free[:n_tokens]

    @property
    def n_kv(self) -> int:
        """Return how many cells, padded, the batch stored last must look at."""
        return -(-self.used_max // N_PAD) * N_PAD

    def store(self, cells: np.ndarray, pos: np.ndarray, seq_id: np.ndarray) -> None:
        """Mark empty cells, in ascending order, as holding positions `pos` of sequences `seq_id`."""
        self.pos[cells] = pos
        self.seqs[cells] = self._bits(seq_id)
        self._n_used += len(cells)
        self.used_max = max(self.used_max, int(cells[-1]) + 1)
        if self._in_order:
            self._in_order = int(pos[0]) == int(cells[0]) and (len(pos) == 1 or np.array_equal(pos, cells))

    def is_next(self, pos: int) -> bool:
        """Return whether there is one sequence, in order and without gaps, that position `pos` comes after."""
        return self._in_order and self._n_used == self.used_max == pos < self.n_cells

    def store_next(self) -> None:
        """Mark the next cell as holding the next position, where is_next() says that this can be."""
        n = self.used_max
        self.pos[n], self.seqs[n] = n, 1
        self._n_used = self.used_max = n + 1

    def _bits(self, seq_id: np.ndarray) -> np.ndarray:
        return _FIRST if self.n_seq_max == 1 else np.left_shift(_FIRST, seq_id.astype(np.uint64))

    def _count(self) -> None:
        used = np.flatnonzero(self.pos >= 0)
        self._n_used = used.size
        self.used_max = int(used[-1]) + 1 if used.size else 0
        self._in_order = self.n_seq_max == 1 and np.array_equal(self.pos[used], used)

    def release(self, cells: np.ndarray) -> None:
        """Mark cells as empty."""
        self.pos[cells] = -1
        self.seqs[cells] = 0
        self._count()

    def seq_rm(self, seq_id: int, p0: int = 0, p1: int | None = None) -> None:
        """Remove positions p0 to p1 - 1 (to the end if None) of a sequence."""
        bit = np.uint64(1 << seq_id)
        hit = (self.seqs & bit != 0) & (self.pos >= p0)
        if p1 is not None:
            hit &= self.pos < p1
        self.seqs[hit] &= ~bit
        self.pos[self.seqs == 0] = -1
        self._count()

    def seq_cp(self, source: int, target: int, p0: int = 0, p1: int | None = None) -> None:
        """Let sequence `target` share the cells of positions p0 to p1 - 1 of `source`; nothing is copied."""
        hit = (self.seqs & np.uint64(1 << source) != 0) & (self.pos >= p0)
        if p1 is not None:
            hit &= self.pos < p1
        self.seqs[hit] |= np.uint64(1 << target)

    def copy(self, source: KVCache, n_tokens: int, n_layer: int) -> int:
        """Copy the K and V of the first n_layer layers in the first n_tokens cells; return the bytes copied.

        The other cache has the same types and layers.  The cells are not marked: store() does that.
        Raises: ClosedError.
        """
        copied = 0
        for ours, theirs in zip(self._rows(n_layer), source._rows(n_layer), strict=True):
            if ours.ndim == 2:
                ours[:n_tokens] = theirs[:n_tokens]
            else:
                ours[:, :n_tokens] = theirs[:, :n_tokens]
            copied += theirs.nbytes // source.n_cells * n_tokens
        return copied

    def _rows(self, n_layer: int) -> Iterator[np.ndarray]:
        """Yield the bytes of each K and V of the first layers: [n_cells, row]; if transposed [row, n_cells, 1 element].

        They keep the memory alive, so another thread may close the cache meanwhile.
        """
        if self._memory is None:
            raise ClosedError("this KV cache is closed")
        offset = 0
        for il in range(n_layer):
            for tensor in (self.k_l[il], self.v_l[il]):
                data = np.frombuffer(self._memory, np.uint8, tensor.nbytes, offset)
                offset += tensor.nbytes
                if tensor is self.v_l[il] and self._v_trans:
                    yield data.reshape(tensor.ne[0], self.n_cells, -1)
                else:
                    yield data.reshape(self.n_cells, -1)

    def mask(self, pos: np.ndarray, seq_id: np.ndarray, n_kv: int) -> np.ndarray:
        """Return bool [n_tokens, n_kv]: each token sees the cells of its sequence up to its own position."""
        visible = self.pos[:n_kv] <= pos[:, None]
        visible &= (self.seqs[:n_kv] & self._bits(seq_id)[:, None]) != 0
        return visible

    def close(self) -> None:
        """Give the memory back."""
        self._ctx.close()
        self._buffer.close()
        self._memory = None


def _pad(n: int) -> int:
    return -(-max(n, 1) // N_PAD) * N_PAD
