"""Cells: which positions the KV cache holds, and where the next tokens go."""

import numpy as np
import pytest

from pyggml_adapt.engine.kv_cells import Cells
from pyggml_adapt.errors import ContextFullError
from pyggml_adapt.graph.hparams import Window


def store(cells, pos, seq_id):
    slot = cells.find_slot(len(pos))
    cells.store(slot, np.array(pos, np.int32), np.array(seq_id, np.int64))
    return slot.tolist()


def test_cells_are_given_out_and_taken_back():
    cells = Cells(256, 3)
    assert store(cells, range(4), [0, 0, 0, 0]) == [0, 1, 2, 3]
    assert store(cells, range(2), [2, 2]) == [4, 5]
    cells.seq_rm(0, 1, 3)
    assert cells.pos[:6].tolist() == [0, -1, -1, 3, 0, 1]
    assert store(cells, [7, 8, 9], [1, 1, 1]) == [1, 2, 6]
    assert cells.used_max == 7
    cells.seq_rm(1)
    cells.seq_rm(2)
    assert cells.pos[:7].tolist() == [0, -1, -1, 3, -1, -1, -1]
    assert cells.used_max == 4


def test_n_kv_is_padded():
    cells = Cells(768)
    for n, want in ((1, 256), (255, 256), (1, 512), (256, 768)):
        cells.store(cells.find_slot(n), np.arange(n, dtype=np.int32), np.zeros(n, np.int64))
        assert cells.n_kv == want
    with pytest.raises(ContextFullError, match=r"^256 more tokens do not fit: 255 of 768 cells are free$"):
        cells.find_slot(256)


def test_mask():
    cells = Cells(256, 2)
    store(cells, [0, 1, 0, 2], [0, 0, 1, 0])
    mask = cells.mask(np.array([1, 2, 5], np.int32), np.array([0, 0, 1], np.int64), 256)
    assert mask.shape == (3, 256)
    assert mask[:, :4].tolist() == [[True, True, False, False], [True, True, False, True], [False, False, True, False]]
    assert not mask[:, 4:].any()


@pytest.mark.parametrize(("steps", "seen"), [
    ([[0, 1, 2]], [0, 1, 2]),
    ([[0, 1, 2], [3], [4]], [0, 1, 2]),
    ([[1, 0, 2]], [0, 1, 2]),
    ([[0, 1], [3, 2]], [0, 1, 3]),
    ([[5, 6, 1]], [2]),
])  # fmt: skip
def test_mask_of_one_token_of_one_sequence(steps, seen):
    cells = Cells(256)
    for pos in steps:
        store(cells, pos, [0] * len(pos))
    mask = cells.mask(np.array([2], np.int32), np.zeros(1, np.int64), 256)
    assert (mask.shape, np.flatnonzero(mask).tolist()) == ((1, 256), seen)


def test_mask_after_a_gap_and_after_it_was_filled():
    cells, pos, seq_id = Cells(256), np.array([5], np.int32), np.zeros(1, np.int64)
    store(cells, range(6), [0] * 6)
    cells.seq_rm(0, 1, 3)
    assert np.flatnonzero(cells.mask(pos, seq_id, 256)).tolist() == [0, 3, 4, 5]
    assert store(cells, [7, 1], [0, 0]) == [1, 2]
    assert np.flatnonzero(cells.mask(pos, seq_id, 256)).tolist() == [0, 2, 3, 4, 5]
    cells.seq_rm(0)
    assert store(cells, range(6), [0] * 6) == list(range(6))
    assert np.flatnonzero(cells.mask(pos, seq_id, 256)).tolist() == list(range(6))


def test_shared_cells():
    cells = Cells(256, 64)
    store(cells, [0, 1, 2], [0, 0, 0])
    cells.seq_cp(0, 63, 0, 2)
    mask = cells.mask(np.array([9, 9], np.int32), np.array([0, 63], np.int64), 3)
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    cells.seq_rm(0)
    assert cells.pos[:3].tolist() == [0, 1, -1]  # the copy still uses the first two
    cells.seq_rm(63, 1)
    assert cells.pos[:3].tolist() == [0, -1, -1]


STANDARD, CHUNKED = Window(10), Window(10, is_chunked=True)


@pytest.mark.parametrize(("window", "pos", "seen"), [
    (STANDARD, 0, [0]), (STANDARD, 9, range(10)), (STANDARD, 10, range(1, 11)), (STANDARD, 29, range(20, 30)),
    (CHUNKED, 0, [0]), (CHUNKED, 9, range(10)), (CHUNKED, 10, [10]), (CHUNKED, 29, range(20, 30)),
])  # fmt: skip
def test_mask_of_a_window(window, pos, seen):
    cells = Cells(256, window=window)
    store(cells, range(30), [0] * 30)
    mask = cells.mask(np.array([pos], np.int32), np.zeros(1, np.int64), 256)
    assert np.flatnonzero(mask).tolist() == list(seen)
    assert window.first(pos) == min(seen)


@pytest.mark.parametrize("window", [STANDARD, CHUNKED], ids=["standard", "chunked"])
def test_cells_out_of_sight_are_used_again(window):
    """Whatever the pieces, every token finds all that it may see, and no more cells are used than there are."""
    cells, rng, n = Cells(32, window=window), np.random.default_rng(0), 0
    while n < 500:
        pos = np.arange(n, n + rng.integers(1, 22), dtype=np.int32)
        store(cells, pos, [0] * len(pos))
        mask = cells.mask(pos, np.zeros(len(pos), np.int64), 32)
        for i, row in zip(pos, mask, strict=True):
            assert sorted(cells.pos[row].tolist()) == list(range(window.first(int(i)), i + 1))
        n += len(pos)
        assert cells.holds(n)


def test_a_window_without_room():
    cells = Cells(32, window=STANDARD)
    store(cells, range(32), [0] * 32)
    with pytest.raises(ContextFullError, match=r"^24 more tokens do not fit: 23 of 32 cells are free$"):
        cells.find_slot(24)
    assert store(cells, range(32, 55), [0] * 23) == list(range(23))


def test_what_a_window_still_holds():
    cells = Cells(32, window=STANDARD)
    store(cells, range(30), [0] * 30)
    assert all(cells.holds(n) for n in range(31)) and cells.is_whole
    store(cells, range(30, 40), [0] * 10)  # eight of them over positions 0 to 7
    assert [n for n in range(41) if not cells.holds(n)] == list(range(1, 17))
    assert not cells.is_whole
    cells.seq_rm(0)
    assert cells.is_whole and store(cells, range(3), [0] * 3) == [0, 1, 2]


def test_a_window_of_several_sequences():
    """Cells that two sequences share are not taken; positions before those that were overwritten go too."""
    cells = Cells(32, 2, STANDARD)
    store(cells, range(20), [0] * 20)
    cells.seq_cp(0, 1, 0, 5)
    assert store(cells, range(20, 32), [0] * 12) == list(range(20, 32))
    assert store(cells, [32, 33], [0, 0]) == [5, 6]
    assert cells.pos[:8].tolist() == [0, 1, 2, 3, 4, 32, 33, 7]
    assert cells.seqs[:8].tolist() == [2, 2, 2, 2, 2, 1, 1, 1]  # positions 0 to 4 are no longer the first sequence's


@pytest.mark.parametrize("window", [None, STANDARD, CHUNKED, Window(1), Window(30)])
def test_a_step_takes_the_cell_that_a_search_finds(window):
    """Where next_cell() has an answer it is find_slot()'s, and everything afterwards is the same."""
    rng, n_answers = np.random.default_rng(1), 0
    steps, searches = (Cells(300 if window is None else 48, window=window) for _ in range(2))
    pos = 0
    while pos < 280:
        n = int(rng.integers(2, 18)) if rng.random() < 0.05 else 1
        each = np.arange(pos, pos + n, dtype=np.int32)
        found = searches.find_slot(n)
        searches.store(found, each, np.zeros(n, np.int64))
        cell = steps.next_cell(pos) if n == 1 else -1
        if cell >= 0:
            assert found.tolist() == [cell]
            steps.store_next(cell, pos)
            n_answers += 1
            seen = searches.mask(each, np.zeros(1, np.int64), 48)[0]
            assert steps.sees_last(pos) or np.array_equal(seen, steps.seen(pos, 48))
        else:
            steps.store(steps.find_slot(n), each, np.zeros(n, np.int64))
        pos += n
        if rng.random() < 0.03 and steps.holds(pos - 4):
            pos -= 4
            for cells in (steps, searches):
                cells.seq_rm(0, pos)
        for name in ("pos", "seqs"):
            np.testing.assert_array_equal(getattr(steps, name), getattr(searches, name))
        for name in ("n_kv", "used_max", "in_order", "is_whole"):
            assert getattr(steps, name) == getattr(searches, name)
    assert n_answers > 100
