"""The KV cache: cells shared by sequences, and the tensors that their K and V are kept in.

Source: llama.cpp src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyggml_adapt.engine.kv_cells import Cells, pad
from pyggml_adapt.errors import AllocError, ClosedError, ParameterError
from pyggml_adapt.ggml import Buffer, Context, Tensor, TensorTable, Type

if TYPE_CHECKING:
    from pyggml_adapt.models import HParams

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
N_SEQ_MAX = 64  # sequences of a cell are the bits of an uint64


class KVCache:
    """K and V for n_ctx tokens of up to n_seq_max sequences.

    It has two parts if layers attend to a sliding window: these have cells for one window and n_ubatch tokens only.
    """

    def __init__(
        self,
        hp: HParams,
        n_ctx: int,
        *,
        n_seq_max: int = 1,
        n_ubatch: int = 512,
        type_k: Type = Type.F16,
        type_v: Type = Type.F16,
        flash_attn: bool = True,
    ):
        """n_ubatch: tokens that are computed at once, at most.

        Raises: ParameterError for a type or size that cannot be; AllocError.
        """
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
        self.n_cells, self._v_trans = pad(n_ctx), not flash_attn
        self.parts: tuple[Cells, ...] = (Cells(self.n_cells, n_seq_max),)
        if hp.window is not None:
            n_swa = pad(min(hp.window.n * n_seq_max + n_ubatch, self.n_cells))
            self.parts += (Cells(n_swa, n_seq_max, hp.window),)
        # what a graph depends on: equal layouts share graphs
        self.layout = *(part.n_cells for part in self.parts), int(type_k), int(type_v)
        self._allocate(hp)

    def _allocate(self, hp: HParams) -> None:
        self._of_layer = [self.parts[hp.is_swa(il)] for il in range(hp.n_layer)]
        sizes = [hp.of_layer(il) for il in range(hp.n_layer)]
        n_embd_k = [size.n_embd_k_gqa for size in sizes]
        n_embd_v = [hp.n_embd_v_gqa if self._v_trans and size.n_head_kv else size.n_embd_v_gqa for size in sizes]
        self.nbytes = sum(
            cells.n_cells * (self.type_k.row_size(n_k) + self.type_v.row_size(n_v))
            for cells, n_k, n_v in zip(self._of_layer, n_embd_k, n_embd_v, strict=True)
        )
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
        self.k_l: dict[int, Tensor] = {}  # by layer: of those that have K and V
        self.v_l: dict[int, Tensor] = {}
        offset = 0
        for il, cells in enumerate(self._of_layer):
            if n_embd_k[il] == 0:
                continue  # there is no attention
            for tensors, letter, type, n in (
                (self.k_l, "k", self.type_k, n_embd_k[il]),
                (self.v_l, "v", self.type_v, n_embd_v[il]),
            ):
                tensor = self._ctx.new_tensor(type, (n, cells.n_cells), f"cache_{letter}_l{il}")
                self._buffer.place(tensor, offset)
                offset += tensor.nbytes
                tensors[il] = tensor
        self.table = TensorTable([*self.k_l.values(), *self.v_l.values()])

    @property
    def n_kv(self) -> tuple[int, ...]:
        """Return for each part how many cells, padded, the batch stored last must look at."""
        return tuple([part.n_kv for part in self.parts])  # for each token: a list is faster than a generator

    def find_slot(self, n_tokens: int) -> tuple[np.ndarray, ...]:
        """Return for each part the cells for n_tokens more tokens, int64.

        Raises: ContextFullError.
        """
        return tuple(part.find_slot(n_tokens) for part in self.parts)

    def store(self, cells: Sequence[np.ndarray], pos: np.ndarray, seq_id: np.ndarray) -> None:
        """Mark cells that find_slot() returned as holding positions `pos` of sequences `seq_id`."""
        for part, own in zip(self.parts, cells, strict=True):
            part.store(own, pos, seq_id)

    def next_cells(self, pos: int) -> list[int]:
        """Return for each part the cell for one token at `pos` after all others; none if they must be searched."""
        cells = [part.next_cell(pos) for part in self.parts]
        return [] if -1 in cells else cells

    def store_next(self, cells: Sequence[int], pos: int) -> None:
        """Mark the cells that next_cells() returned as holding `pos`."""
        for part, cell in zip(self.parts, cells, strict=True):
            part.store_next(cell, pos)

    def release(self, cells: Sequence[np.ndarray]) -> None:
        """Mark cells as empty, the next ones to be used."""
        for part, own in zip(self.parts, cells, strict=True):
            part.release(own)

    def seq_rm(self, seq_id: int, p0: int = 0, p1: int | None = None) -> None:
        """Remove positions p0 to p1 - 1 (to the end if None) of a sequence."""
        for part in self.parts:
            part.seq_rm(seq_id, p0, p1)

    def seq_cp(self, source: int, target: int, p0: int = 0, p1: int | None = None) -> None:
        """Let sequence `target` share the cells of positions p0 to p1 - 1 of `source`; nothing is copied."""
        for part in self.parts:
            part.seq_cp(source, target, p0, p1)

    def holds(self, n_past: int) -> bool:
        """Return whether all that position n_past of sequence 0 can see is there."""
        return all(part.holds(n_past) for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """Return whether the first cells of each part hold one sequence from its beginning: none was overwritten."""
        return all(part.is_whole for part in self.parts)

    def fits(self, source: KVCache, n_tokens: int) -> bool:
        """Return whether the first n_tokens tokens of `source` are there, and would be in the same cells here."""
        for ours, theirs in zip(self.parts, source.parts, strict=True):
            if not theirs.holds(n_tokens):
                return False
            if ours.n_cells != theirs.n_cells and not (theirs.is_whole and n_tokens <= ours.n_cells):
                return False
        return True

    def take(self, source: KVCache) -> None:
        """Mark the cells as those of `source` are marked, where it fits()."""
        for ours, theirs in zip(self.parts, source.parts, strict=True):
            ours.take(theirs)

    def copy(self, source: KVCache, n_tokens: int, n_layer: int) -> int:
        """Copy the K and V of the first n_layer layers of n_tokens tokens, which fit(); return the bytes copied.

        The other cache has the same types and layers.  The cells are not marked: store() or take() does that.
        Raises: ClosedError.
        """
        copied = 0
        layers = [il for il in self.k_l if il < n_layer for _ in "KV"]
        for il, ours, theirs in zip(layers, self._rows(n_layer), source._rows(n_layer), strict=True):
            cells = source._of_layer[il]
            n = n_tokens if cells.in_order or n_tokens == 0 else cells.used_max
            if ours.ndim == 2:
                ours[:n] = theirs[:n]
            else:
                ours[:, :n] = theirs[:, :n]
            copied += theirs.nbytes // cells.n_cells * n
        return copied

    def _rows(self, n_layer: int) -> Iterator[np.ndarray]:
        """Yield the bytes of each K and V of the first layers: [n_cells, row]; if transposed [row, n_cells, 1 element].

        They keep the memory alive, so another thread may close the cache meanwhile.
        """
        if self._memory is None:
            raise ClosedError("this KV cache is closed")
        offset = 0
        for il in (il for il in self.k_l if il < n_layer):
            for tensor in (self.k_l[il], self.v_l[il]):
                data = np.frombuffer(self._memory, np.uint8, tensor.nbytes, offset)
                offset += tensor.nbytes
                n_cells = self._of_layer[il].n_cells
                if tensor is self.v_l[il] and self._v_trans:
                    yield data.reshape(tensor.ne[0], n_cells, -1)
                else:
                    yield data.reshape(n_cells, -1)

    def close(self) -> None:
        """Give the memory back."""
        self._ctx.close()
        self._buffer.close()
        self._memory = None
