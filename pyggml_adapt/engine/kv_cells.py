"""Cells of the KV cache: which positions of which sequences they hold, and where the next tokens go.

Source: llama.cpp src/llama-kv-cache.cpp (find_slot, apply_ubatch, seq_rm), src/llama-kv-cells.h
"""

from __future__ import annotations

import numpy as np

from pyggml_adapt.errors import ContextFullError
from pyggml_adapt.graph.hparams import Window

N_PAD = 256  # n_kv and n_cells are multiples of this, so that graphs are reused; llama.cpp's number
_FIRST = np.ones(1, dtype=np.uint64)  # the bit of sequence 0


class Cells:
    """Each cell has a position and the sequences it belongs to.

    With a window, cells that no later token can see are used again: n_cells may be fewer than a sequence has tokens.
    """

    def __init__(self, n_cells: int, n_seq_max: int = 1, window: Window | None = None):
        self.n_cells, self.n_seq_max, self.window = n_cells, n_seq_max, window
        self.pos = np.full(n_cells, -1, dtype=np.int32)  # -1: empty
        self.seqs = np.zeros(n_cells, dtype=np.uint64)  # bit s: belongs to sequence s
        self._head = 0  # where the search for the next cells begins
        self._n_used = 0  # cells in use
        self.used_max = 0  # cells up to the last one in use
        self.in_order = n_seq_max == 1  # every cell in use has its index as its position
        self._first = 0  # with a window: the lowest position of one sequence; -1 if there are gaps, or several

    @property
    def is_whole(self) -> bool:
        """Return whether the first cells hold one sequence from its beginning, in order, and the others nothing."""
        return self.in_order and self._n_used == self.used_max

    @property
    def n_kv(self) -> int:
        """Return how many cells, padded, the batch stored last must look at."""
        return -(-self.used_max // N_PAD) * N_PAD

    def find_slot(self, n_tokens: int) -> np.ndarray:
        """Return the cells for n_tokens more tokens, int64, in the order of the tokens.

        Raises: ContextFullError.
        """
        head = self._head
        if self._n_used == self.used_max == head and head + n_tokens <= self.n_cells:  # no gaps: nothing to search
            return np.arange(head, head + n_tokens, dtype=np.int64)
        usable = self.pos < 0
        if self.window is not None:
            usable |= self._out_of_sight(self.window)
        free = np.flatnonzero(usable)
        if free.size < n_tokens:
            raise ContextFullError(f"{n_tokens} more tokens do not fit: {free.size} of {self.n_cells} cells are free")
        start = 0 if head > self._n_used + 2 * n_tokens else int(np.searchsorted(free, head))
        return np.concatenate((free[start:], free[:start]))[:n_tokens]

    def _out_of_sight(self, window: Window) -> np.ndarray:
        """Return bool [n_cells]: whether no token that follows its one sequence can see what a cell holds."""
        hidden = np.zeros(self.n_cells, dtype=bool)
        for seq_id in range(self.n_seq_max):
            bit = np.uint64(1 << seq_id)
            own = self.seqs & bit != 0
            if own.any():
                hidden |= (self.seqs == bit) & ~window.sees(self.pos, int(self.pos[own].max()) + 1)
        return hidden

    def store(self, cells: np.ndarray, pos: np.ndarray, seq_id: np.ndarray) -> None:
        """Mark cells that find_slot() returned as holding positions `pos` of sequences `seq_id`."""
        overwritten = [] if self.window is None else self._overwritten(cells)
        self.pos[cells] = pos
        self.seqs[cells] = self._bits(seq_id)
        for bit, last in overwritten:  # what is left of a sequence has no gaps
            self._remove((self.seqs & bit != 0) & (self.pos <= last), bit)
        if self.window is not None:
            self._count()
        else:
            self._n_used += len(cells)
            self.used_max = max(self.used_max, int(cells[-1]) + 1)
            if self.in_order:
                self.in_order = int(pos[0]) == int(cells[0]) and (len(pos) == 1 or np.array_equal(pos, cells))
        self._head = int(cells[-1]) + 1

    def _overwritten(self, cells: np.ndarray) -> list[tuple[np.uint64, int]]:
        """Return the bit and the highest position of each sequence that has tokens in these cells."""
        taken = cells[self.pos[cells] >= 0]
        bits = self.seqs[taken]
        return [(bit, int(self.pos[taken[bits == bit]].max())) for bit in np.unique(bits)]

    def next_cell(self, pos: int) -> int:
        """Return the cell for one token at `pos` after all others of one sequence, if it need not be searched, else -1.

        It is that of find_slot(): the one after the last, and in a window that has moved the one of the first position.
        """
        if self.in_order and self._n_used == self.used_max == self._head == pos < self.n_cells:
            return pos
        if self.window is None or self._first < 0 or pos != self._first + self._n_used:
            return -1
        cell = self._head
        if cell == self.n_cells or cell > self._n_used + 2:
            cell = 0
        old = int(self.pos[cell])
        return cell if old < 0 or (old == self._first and old < self.window.first(pos)) else -1

    def store_next(self, cell: int, pos: int) -> None:
        """Mark the cell that next_cell() returned as holding `pos`."""
        if self.pos[cell] >= 0:
            self._first += 1
        else:
            self._n_used += 1
        self.pos[cell], self.seqs[cell] = pos, 1
        self._head = cell + 1
        self.used_max = max(self.used_max, self._head)
        self.in_order = self.in_order and cell == pos

    def sees_last(self, pos: int) -> bool:
        """Return whether the token at `pos`, stored last, sees the cells of the last positions, up to its own."""
        return self.is_whole and (self.window is None or not self.window.is_chunked or pos < self.window.n)

    def seen(self, pos: int, n_kv: int) -> np.ndarray:
        """Return bool [n_kv]: the cells that the token at `pos`, the last of one sequence in a window, sees."""
        assert self.window is not None  # for mypy: without one, cells are whole
        return self.pos[:n_kv] >= self.window.first(pos)

    def _bits(self, seq_id: np.ndarray) -> np.ndarray:
        return _FIRST if self.n_seq_max == 1 else np.left_shift(_FIRST, seq_id.astype(np.uint64))

    def _count(self) -> None:
        used = np.flatnonzero(self.pos >= 0)
        self._n_used = used.size
        self.used_max = int(used[-1]) + 1 if used.size else 0
        pos = self.pos[used]
        self.in_order = self.n_seq_max == 1 and np.array_equal(pos, used)
        if self.window is not None:
            first = int(pos.min()) if used.size else 0
            gaps = used.size and int(pos.max()) - first + 1 != used.size
            self._first = -1 if gaps or self.n_seq_max > 1 else first

    def release(self, cells: np.ndarray) -> None:
        """Mark cells as empty, the next ones to be used."""
        self.pos[cells] = -1
        self.seqs[cells] = 0
        self._count()
        self._head = int(cells[0])

    def _remove(self, hit: np.ndarray, bit: np.uint64) -> None:
        self.seqs[hit] &= ~bit
        self.pos[self.seqs == 0] = -1

    def _hit(self, seq_id: int, p0: int, p1: int | None) -> np.ndarray:
        hit = (self.seqs & np.uint64(1 << seq_id) != 0) & (self.pos >= p0)
        return hit if p1 is None else hit & (self.pos < p1)

    def seq_rm(self, seq_id: int, p0: int = 0, p1: int | None = None) -> None:
        """Remove positions p0 to p1 - 1 (to the end if None) of a sequence."""
        used = self.pos >= 0
        self._remove(self._hit(seq_id, p0, p1), np.uint64(1 << seq_id))
        emptied = np.flatnonzero(used & (self.pos < 0))
        self._count()
        if emptied.size:
            self._head = min(self._head, int(emptied[0])) if self._n_used else 0

    def seq_cp(self, source: int, target: int, p0: int = 0, p1: int | None = None) -> None:
        """Let sequence `target` share the cells of positions p0 to p1 - 1 of `source`; nothing is copied."""
        self.seqs[self._hit(source, p0, p1)] |= np.uint64(1 << target)

    def holds(self, n_past: int) -> bool:
        """Return whether all that position n_past of sequence 0 can see is there."""
        if self.window is None:
            return True
        first = self.window.first(n_past)
        here = (self.seqs & _FIRST != 0) & (self.pos >= first) & (self.pos < n_past)
        return int(here.sum()) == n_past - first

    def mask(self, pos: np.ndarray, seq_id: np.ndarray, n_kv: int) -> np.ndarray:
        """Return bool [n_tokens, n_kv]: each token sees the cells of its sequence up to its own position."""
        cells, pos = self.pos[:n_kv], pos[:, None]
        visible = cells <= pos
        visible &= (self.seqs[:n_kv] & self._bits(seq_id)[:, None]) != 0
        if self.window is not None:
            visible &= self.window.sees(cells, pos)
        return visible

    def take(self, source: Cells) -> None:
        """Become, empty as they are, what other cells are."""
        n = source.used_max
        self.pos[:n], self.seqs[:n] = source.pos[:n], source.seqs[:n]
        self._head, self._n_used, self.used_max = source._head, source._n_used, n
        self.in_order, self._first = source.in_order, source._first


def pad(n: int) -> int:
    """Return n cells, padded to as many as there can be."""
    return -(-max(n, 1) // N_PAD) * N_PAD
