"""The engine: graphs are built once per shape, kept, dropped, and bound to whatever is evaluated."""

import numpy as np
import pytest
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine import runner
from pyggml_adapt.errors import AllocError, ClosedError


@pytest.fixture
def built(monkeypatch):
    """Return the list of (n_tokens, n_outputs, n_kv) of every graph built."""
    shapes = []

    class Counted(runner.Program):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            shapes.append((options["n_tokens"], options["n_outputs"], options["n_kv"]))

    monkeypatch.setattr(runner, "Program", Counted)
    return shapes


@pytest.fixture
def host(tiny_gguf):
    with pga.Host(tiny_gguf(), n_threads=1, n_ubatch=32) as host:
        yield host


def test_a_graph_is_built_once_per_shape(host, built):
    with host.session(n_ctx=512) as one, host.session(n_ctx=512) as other:
        one.eval(random_ids(70))
        assert built == [(32, 0, (256,)), (6, 1, (256,))]
        other.eval(random_ids(70, seed=1))
        for token in random_ids(100):
            one.eval([token])
            other.eval([token])
        assert built[2:] == [(1, 1, (256,))]
        other.eval(random_ids(40), all_logits=True)
        assert built[3:] == [(32, 32, (256,)), (8, 8, (256,))]


def test_sessions_of_other_sizes_have_graphs_of_their_own(host, built):
    with host.session(n_ctx=256) as one, host.session(n_ctx=512) as other:
        one.eval([1])
        other.eval([1])
        assert built == [(1, 1, (256,))] * 2


def test_kept_graphs_are_few(host, built):
    with host.session(n_ctx=256) as session:
        for n in [*range(1, 31)] * 2:
            session.rewind(0)
            session.eval(random_ids(n))
    assert len(host._engine._programs) <= runner.MAX_GRAPHS
    assert len(built) == 60  # the one used longest ago leaves


def test_dropped_graphs_are_freed(host, monkeypatch):
    monkeypatch.setattr(runner, "MAX_GRAPHS", 2)
    with host.session(n_ctx=256) as session:
        sizes = []
        for n in [3, 4, 5] * 20:
            session.rewind(0)
            session.eval(random_ids(n))
            sizes.append(host.memory().compute)
    assert len(set(sizes[6:])) <= 3


def test_failed_graph_leaves_cache_and_engine_usable(host, monkeypatch):
    with host.session(n_ctx=256) as session:
        session.eval(random_ids(5))
        want = session.eval([9])
        session.rewind(5)

        def fail(*_):
            raise AllocError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(runner.Program, "run", fail)
            with pytest.raises(AllocError, match=r"^no memory$"):
                session.eval([9])
        assert session._cache.parts[0].used_max == 5 and session.n_past == 5
        np.testing.assert_array_equal(session.eval([9]), want)


def test_closed(host):
    with host.session(n_ctx=256) as session:
        session.eval([1])
        host._engine.close()
        host._engine.close()
        with pytest.raises(ClosedError, match="closed"):
            session.eval([1])


def test_kept_graphs_do_not_keep_closed_caches(host):
    for _ in range(5):
        session = host.session(n_ctx=256)
        session.eval([1])
        tensor = session._cache.k_l[0]
        session.close()
        with pytest.raises(ClosedError, match="closed"):
            tensor.to_numpy()
