"""The KV cache's cells, and several sequences in one batch."""

import dataclasses

import numpy as np
import pytest
from reference import Reference
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine.batch import UBatch, split
from pyggml_adapt.engine.kv_cache import KVCache
from pyggml_adapt.errors import AllocError, ClosedError, ParameterError
from pyggml_adapt.ggml import Type


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


def test_nbytes(hp):
    cache = KVCache(hp, 300, type_k=Type.F16, type_v=Type.Q8_0)
    assert cache.nbytes == hp.n_layer * 512 * (hp.n_embd_k_gqa * 2 + hp.n_embd_v_gqa // 32 * 34)
    assert cache.nbytes == sum(t.nbytes for t in (*cache.k_l.values(), *cache.v_l.values()))


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
    for tensor in (*source.k_l.values(), *source.v_l.values()):
        tensor.set_data(rng.integers(1, 256, tensor.nbytes, dtype=np.uint8))
    n, (k, v) = 20, (Type[type_k].row_size(hp.n_embd_k_gqa), Type[type_v].row_size(hp.n_embd_v_gqa))
    assert cache.copy(source, n, 1) == n * (k + v)
    assert (cache.n_kv, hp.n_layer) == ((0,), 2)

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
    pieces = [(t.tolist(), p.tolist(), o.tolist()) for t, p, o in split(tokens, 5, 6, 4, 1)]
    assert pieces == [
        ([0, 1, 2, 3], [5, 6, 7, 8], []),
        ([4, 5], [9, 10], []),  # the end of the first batch
        ([6, 7, 8, 9], [11, 12, 13, 14], [3]),
    ]
    assert [o.tolist() for *_, o in split(tokens, 0, 6, 4, 10)] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]
    assert [o.tolist() for *_, o in split(tokens, 0, 6, 4, 5)] == [[], [1], [0, 1, 2, 3]]
    assert [o.tolist() for *_, o in split(tokens, 0, 6, 4, 0)] == [[], [], []]
