"""Many threads: closing what another uses is refused or seen as closed, and never a crash."""

import threading
import time

import numpy as np
import pytest
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.errors import AdaptorError, BusyError, ClosedError


def together(*functions):
    """Run functions on a thread each and return what they raised, None if nothing."""
    raised = [None] * len(functions)

    def call(i):
        try:
            functions[i]()
        except BaseException as exc:
            raised[i] = exc

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def test_closing_a_session_that_another_thread_uses(tiny_gguf):
    """The user sees ClosedError at most; the closer BusyError, and may try again."""
    with pga.Host(tiny_gguf(), n_threads=1) as host:
        for round in range(30):
            session = host.session(n_ctx=512)
            started = threading.Event()

            def use(session=session, started=started):
                started.set()
                while True:
                    session.rewind(0)
                    session.eval(random_ids(40))

            def close(session=session, started=started, delay=round * 1e-4):
                started.wait()
                time.sleep(delay)
                while True:
                    try:
                        return session.close()
                    except BusyError:
                        time.sleep(0)

            used, closed = together(use, close)
            assert isinstance(used, ClosedError) and closed is None
        with host.session(n_ctx=512) as session:
            session.eval(random_ids(40))


def test_closing_a_host_that_other_threads_use(tiny_gguf):
    for round in range(10):
        host = pga.Host(tiny_gguf(), n_threads=1)
        started = threading.Barrier(3)

        def use(host=host, started=started):
            with host.session(n_ctx=512) as session:
                started.wait()
                while True:
                    session.rewind(0)
                    session.eval(random_ids(30))

        def close(host=host, started=started, delay=round * 3e-4):
            started.wait()
            time.sleep(delay)
            while True:
                try:
                    return host.close()
                except BusyError:
                    time.sleep(0)

        *used, closed = together(use, use, close)
        assert all(isinstance(exc, ClosedError) for exc in used)
        assert closed is None


def test_a_host_that_could_not_be_closed_goes_on(tiny_gguf, monkeypatch):
    def refuse():
        raise BusyError("in use")

    with pga.Host(tiny_gguf(), n_threads=1) as host:
        assert host.prefetch("base").result(60) == 0
        session = host.session(n_ctx=64)
        with monkeypatch.context() as patch:
            patch.setattr(session, "close", refuse)
            with pytest.raises(BusyError):
                host.close()
        assert host.prefetch("base").result(60) == 0
        assert session.eval([1]).size


def test_closing_a_host_that_builds_graphs(tiny_gguf):
    """A graph is allocated over a session's cache, which must not go meanwhile."""
    path = tiny_gguf(n_embd=64, n_ff=96, n_head=2, n_head_kv=1)
    for round in range(80):
        host = pga.Host(path, n_threads=1)

        def evaluate(host=host, n=round % 5):
            while True:
                for n_tokens in range(1 + n, 60):  # each another graph
                    session = host.session(n_ctx=64)
                    session.eval(random_ids(n_tokens))

        def close(host=host, delay=round * 3e-4):
            time.sleep(delay)
            while True:
                try:
                    return host.close()
                except BusyError:
                    time.sleep(0)

        *used, closed = together(evaluate, evaluate, close)
        assert closed is None
        assert all(isinstance(exc, ClosedError) for exc in used)


def test_unloading_while_another_thread_opens_sessions(tiny_gguf, split_models):
    models = {"base": tiny_gguf(), "code": tiny_gguf(changed={"attn": 1})}
    foundation, adaptors = split_models(models)
    outcomes = set()
    with pga.Host(foundation, adaptors, n_threads=1) as host:
        with host.session("code", n_ctx=64) as session:
            want = session.eval(random_ids(5))

        def use():
            for _ in range(150):
                try:
                    with host.session("code", n_ctx=64) as session:
                        np.testing.assert_array_equal(session.eval(random_ids(5)), want)
                except AdaptorError as exc:
                    outcomes.add(exc.code)

        def reload():
            for _ in range(150):
                try:
                    host.unload_adaptor("code")
                    host.load_adaptor("code", adaptors["code"])
                except AdaptorError as exc:
                    outcomes.add(exc.code)

        assert together(use, use, reload) == [None] * 3
    assert outcomes <= {"adaptor_not_found", "adaptor_in_use"}


def test_threads_that_share_a_session_take_turns(tiny_gguf):
    with pga.Host(tiny_gguf(), n_threads=1) as host, host.session(n_ctx=512) as session:

        def use(token):
            for _ in range(50):
                session.eval([token, token])

        assert together(lambda: use(5), lambda: use(7)) == [None, None]
        tokens = session.tokens
        assert len(tokens) == 200 and tokens[::2] == tokens[1::2]
        (cells,) = session._cache.parts
        assert cells.used_max == 200 and cells.pos[:200].tolist() == list(range(200))


def test_the_gil_is_free_while_ggml_computes(tiny_gguf):
    """Another thread goes on in the middle of an evaluation that takes a while."""
    path = tiny_gguf(n_embd=512, n_ff=1024, n_head=8, n_layer=4)
    with pga.Host(path, n_threads=1) as host, host.session(n_ctx=512) as session:
        session.eval(random_ids(500))
        session.rewind(0)
        ticks, done = [], threading.Event()

        def tick():
            while not done.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0.001)

        thread = threading.Thread(target=tick)
        thread.start()
        start = time.perf_counter()
        session.eval(random_ids(500))
        end = time.perf_counter()
        done.set()
        thread.join()
    assert sum(start < t < end for t in ticks) >= 5


@pytest.mark.parametrize("n_threads", [1, 2])
def test_hosts_beside_each_other(tiny_gguf, n_threads):
    """Two hosts in one process, each on its own thread, do not disturb each other."""
    paths = [tiny_gguf(), tiny_gguf(changed={"attn": 1})]
    with pga.Host(paths[0], n_threads=n_threads) as one, pga.Host(paths[1], n_threads=n_threads) as two:
        results = {0: [], 1: []}

        def use(host, i):
            for _ in range(5):
                with host.session(n_ctx=64) as session:
                    results[i].append(session.eval(random_ids(30)))

        assert together(lambda: use(one, 0), lambda: use(two, 1)) == [None, None]
    for rows in results.values():
        assert all(np.array_equal(row, rows[0]) for row in rows)
    assert not np.array_equal(results[0][0], results[1][0])
