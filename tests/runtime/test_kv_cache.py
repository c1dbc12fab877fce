"""The KV cache's cells, and several sequences in one batch."""

import dataclasses

import numpy as np
import pytest
from reference import Reference
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.errors import AllocError, ClosedError, ContextFullError, ParameterError
from pyggml_adapt.ggml import Type
from pyggml_adapt.runtime.batch import UBatch, split
from pyggml_adapt.runtime.kv_cache import KVCache


@pytest.fixture(scope="module")
def host(tiny_gguf):
    with pga.Host(tiny_gguf(), n_threads=1) as host:
        yield host


@pytest.fixture
def hp(host):
    return hp_of(host)


def hp_of(host):
    with host.session(n_ctx=1) as session:
        return session._model.hp


def store(cache, pos, seq_id):
    cells = cache.find_slot(len(pos))
    cache.store(cells, np.array(pos, np.int32), np.array(seq_id, np.int64))
    return cells.tolist()


def test_cells_are_given_out_and_taken_back(hp):
    cache = KVCache(hp, 20, n_seq_max=3)
    assert (cache.n_ctx, cache.n_cells, cache.used_max) == (20, 256, 0)
    assert store(cache, range(4), [0, 0, 0, 0]) == [0, 1, 2, 3]
    assert store(cache, range(2), [2, 2]) == [4, 5]
    cache.seq_rm(0, 1, 3)
    assert cache.pos[:6].tolist() == [0, -1, -1, 3, 0, 1]
    assert store(cache, [7, 8, 9], [1, 1, 1]) == [1, 2, 6]
    assert cache.used_max == 7
    cache.seq_rm(1)
    cache.seq_rm(2)
    assert cache.pos[:7].tolist() == [0, -1, -1, 3, -1, -1, -1]
    assert cache.used_max == 4


def test_n_kv_is_padded(hp):
    cache = KVCache(hp, 600)
    assert cache.n_cells == 768
    for n, want in ((1, 256), (255, 256), (1, 512), (256, 768)):
        cache.store(cache.find_slot(n), np.arange(n, dtype=np.int32), np.zeros(n, np.int64))
        assert cache.n_kv == want
    with pytest.raises(ContextFullError, match=r"^256 more tokens do not fit: 255 of 768 cells are free$"):
        cache.find_slot(256)


def test_mask(hp):
    cache = KVCache(hp, 20, n_seq_max=2)
    store(cache, [0, 1, 0, 2], [0, 0, 1, 0])
    mask = cache.mask(np.array([1, 2, 5], np.int32), np.array([0, 0, 1], np.int64), 256)
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
def test_mask_of_one_token_of_one_sequence(hp, steps, seen):
    cache = KVCache(hp, 20)
    for pos in steps:
        store(cache, pos, [0] * len(pos))
    mask = cache.mask(np.array([2], np.int32), np.zeros(1, np.int64), 256)
    assert (mask.shape, np.flatnonzero(mask).tolist()) == ((1, 256), seen)


def test_mask_after_a_gap_and_after_it_was_filled(hp):
    cache, pos, seq_id = KVCache(hp, 20), np.array([5], np.int32), np.zeros(1, np.int64)
    store(cache, range(6), [0] * 6)
    cache.seq_rm(0, 1, 3)
    assert np.flatnonzero(cache.mask(pos, seq_id, 256)).tolist() == [0, 3, 4, 5]
    assert store(cache, [7, 1], [0, 0]) == [1, 2]
    assert np.flatnonzero(cache.mask(pos, seq_id, 256)).tolist() == [0, 2, 3, 4, 5]
    cache.seq_rm(0)
    assert store(cache, range(6), [0] * 6) == list(range(6))
    assert np.flatnonzero(cache.mask(pos, seq_id, 256)).tolist() == list(range(6))


def test_shared_cells(hp):
    cache = KVCache(hp, 20, n_seq_max=64)
    store(cache, [0, 1, 2], [0, 0, 0])
    cache.seq_cp(0, 63, 0, 2)
    mask = cache.mask(np.array([9, 9], np.int32), np.array([0, 63], np.int64), 3)
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    cache.seq_rm(0)
    assert cache.pos[:3].tolist() == [0, 1, -1]  # the copy still uses the first two
    cache.seq_rm(63, 1)
    assert cache.pos[:3].tolist() == [0, -1, -1]


def test_nbytes(hp):
    cache = KVCache(hp, 300, type_k=Type.F16, type_v=Type.Q8_0)
    assert cache.nbytes == hp.n_layer * 512 * (hp.n_embd_k_gqa * 2 + hp.n_embd_v_gqa // 32 * 34)
    assert cache.nbytes == sum(t.nbytes for t in (*cache.k_l, *cache.v_l))


def test_close(hp):
    cache = KVCache(hp, 20)
    tensor = cache.k_l[0]
    cache.close()
    cache.close()
    with pytest.raises(ClosedError, match="closed"):
        tensor.to_numpy()


@pytest.mark.parametrize(("options", "message"), [
    ({"type_k": Type.Q4_K}, "type_k = Q4_K is not one of F32, F16, BF16, Q8_0, Q4_0"),
    ({"type_v": Type.I32}, "type_v = I32 is not one of F32, F16, BF16, Q8_0, Q4_0"),
    ({"type_v": Type.Q8_0, "flash_attn": False}, "type_v = Q8_0 needs flash attention"),
    ({"n_seq_max": 0}, "n_seq_max = 0 is not from 1 to 64"),
    ({"n_seq_max": 65}, "n_seq_max = 65 is not from 1 to 64"),
])  # fmt: skip
def test_caches_that_cannot_be(hp, options, message):
    with pytest.raises(ParameterError, match=f"^{message}$"):
        KVCache(hp, 20, **options)


@pytest.mark.parametrize("n_embd_head", [1 << 24, 1 << 40])
def test_caches_that_do_not_fit_into_memory(hp, n_embd_head):
    hp = dataclasses.replace(hp, n_embd_head_k=n_embd_head, n_embd_head_v=n_embd_head, n_layer=512)
    message = r"^no memory for a KV cache of \d{15,} bytes: use a smaller n_ctx than 1000000, or a smaller type$"
    with pytest.raises(AllocError, match=message):
        KVCache(hp, 1000000)


def test_quantised_cache_needs_whole_blocks(tiny_gguf):
    with pga.Host(tiny_gguf(head_dim=48), n_threads=1, type_k="q8_0") as host:
        with pytest.raises(ParameterError, match=r"^type_k = Q8_0 needs heads that are a multiple of 32, not 48$"):
            host.session(n_ctx=8)


def evaluate(host, cache, tokens, pos, seq_id, out_ids):
    """Return the logits of one batch, through the engine."""
    arrays = [np.array(x, t) for x, t in ((tokens, np.int32), (pos, np.int32), (seq_id, np.int64), (out_ids, np.int32))]
    with host.session(n_ctx=1) as session:
        out = np.empty((len(out_ids), session.n_vocab), np.float32)
        host._engine.eval(session._model, session._weights, cache, UBatch(cache, *arrays), out)
    return out


@pytest.mark.parametrize("flash_attn", [True, False])
def test_two_sequences_in_one_batch(tiny_gguf, flash_attn):
    """As llama.cpp with a unified cache: prompts of both in one batch, then a token of each at a time."""
    path = tiny_gguf(type="Q8_0")
    a, b = random_ids(30, seed=1), random_ids(21, seed=2)
    steps = [(a[:12] + b[:9], [*range(12), *range(9)], [0] * 12 + [1] * 9)]
    steps += [([a[12 + i], b[9 + i]], [12 + i, 9 + i], [0, 1]) for i in range(8)]
    steps += [(b[17:] + a[20:], [*range(17, 21), *range(20, 30)], [1] * 4 + [0] * 10)]
    options = {"n_threads": 1, "flash_attn": flash_attn}
    with Reference(path, n_seq_max=2, **options) as reference, pga.Host(path, **options) as host:
        cache = KVCache(hp_of(host), 512, n_seq_max=2, flash_attn=flash_attn)
        for tokens, pos, seq_id in steps:
            out_ids = range(len(tokens))
            want = reference.decode(tokens, pos, seq_id, out_ids)
            np.testing.assert_array_equal(evaluate(host, cache, tokens, pos, seq_id, out_ids), want)
        with host.session(n_ctx=512) as session:  # and as each alone, but for the order of sums over more cells
            for ids, row in ((a, -1), (b, 3)):
                session.rewind(0)
                alone = session.eval(ids)
                assert ((alone - want[row]) ** 2).sum() / (alone**2).sum() < 1e-5
        cache.close()


def test_cells_that_were_freed_are_used_again(host, hp):
    """Sequence 1 is removed and replaced: what it left in its cells is never read."""
    cache = KVCache(hp, 256, n_seq_max=2)
    fresh = KVCache(hp, 256, n_seq_max=2)
    a, b, c = (random_ids(8, seed=seed) for seed in (1, 2, 3))
    for each in (cache, fresh):
        evaluate(host, each, a, range(8), [0] * 8, [7])
    evaluate(host, cache, b, range(8), [1] * 8, [7])
    cache.seq_rm(1)
    got = evaluate(host, cache, c, range(8), [1] * 8, range(8))
    np.testing.assert_array_equal(got, evaluate(host, fresh, c, range(8), [1] * 8, range(8)))


@pytest.mark.parametrize(("type_k", "type_v", "flash_attn"), [
    ("F16", "F16", True), ("F16", "F16", False), ("F32", "BF16", False), ("Q8_0", "Q4_0", True),
])  # fmt: skip
def test_copy(hp, type_k, type_v, flash_attn):
    """The first tokens of the first layers, byte for byte, also into a cache of another size; nothing else."""
    options = {"type_k": Type[type_k], "type_v": Type[type_v], "flash_attn": flash_attn}
    source, cache = KVCache(hp, 256, **options), KVCache(hp, 300, **options)
    rng = np.random.default_rng(0)
    for tensor in (*source.k_l, *source.v_l):
        tensor.set_data(rng.integers(1, 256, tensor.nbytes, dtype=np.uint8))
    n, (k, v) = 20, (Type[type_k].row_size(hp.n_embd_k_gqa), Type[type_v].row_size(hp.n_embd_v_gqa))
    assert cache.copy(source, n, 1) == n * (k + v)
    assert (cache.used_max, hp.n_layer) == (0, 2)

    def rows(cache, il):
        shape = (hp.n_embd_v_gqa, cache.n_cells, -1) if not flash_attn else (cache.n_cells, -1)
        v_bytes = cache.v_l[il].get_data(np.empty(cache.v_l[il].nbytes, np.uint8)).reshape(shape)
        k_bytes = cache.k_l[il].get_data(np.empty(cache.k_l[il].nbytes, np.uint8)).reshape(cache.n_cells, -1)
        return k_bytes, v_bytes if flash_attn else v_bytes.swapaxes(0, 1)

    for ours, theirs in zip(rows(cache, 0), rows(source, 0), strict=True):
        np.testing.assert_array_equal(ours[:n], theirs[:n])
        assert not ours[n:].any()
    assert not any(each.any() for each in rows(cache, 1))
    source.close()
    with pytest.raises(ClosedError, match="closed"):
        cache.copy(source, n, 1)


def test_split():
    tokens = np.arange(10, dtype=np.int32)
    pieces = [(t.tolist(), p.tolist(), o.tolist()) for t, p, o in split(tokens, 5, 6, 4, all_logits=False)]
    assert pieces == [
        ([0, 1, 2, 3], [5, 6, 7, 8], []),
        ([4, 5], [9, 10], []),  # the end of the first batch
        ([6, 7, 8, 9], [11, 12, 13, 14], [3]),
    ]
    assert [o.tolist() for *_, o in split(tokens, 0, 6, 4, all_logits=True)] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]
