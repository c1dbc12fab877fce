"""Threadpools: sizes, masks, priorities, sharing, pausing, lifetime."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from pyggml_adapt.errors import BackendError, BusyError, ClosedError, ParameterError
from pyggml_adapt.ggml import Backend, CGraph, Context, Device, GAllocr, SchedPriority, Threadpool, Type, ops

X = np.arange(12, dtype="f").reshape(3, 4)
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


class Graph:
    def __init__(self, op=ops.silu):
        self.ctx = Context(Context.size_for(8, 8))
        self.graph = CGraph(self.ctx, 8)
        self.x = self.ctx.new_tensor(Type.F32, (4, 3)).set_input()
        self.out = self.graph.expand(op(self.ctx, self.x).set_output())
        self.allocr = GAllocr(Device.cpu().buffer_type)
        self.allocr.alloc_graph(self.graph)

    def compute(self, backend):
        self.x.set_data(X)
        self.graph.compute(backend)
        np.testing.assert_allclose(self.out.to_numpy(), X / (1 + np.exp(-X)), rtol=1e-5)


def test_a_pool_for_two_backends():
    pool, g = Threadpool(2), Graph()
    backends = [Backend(threadpool=pool) for _ in range(2)]
    assert [each.n_threads for each in backends] == [2, 2]
    assert backends[0].threadpool is pool
    assert repr(pool) == "<Threadpool of 2 threads, NORMAL>"
    for _ in range(3):
        for each in backends:
            g.compute(each)
    backends[0].close()
    g.compute(backends[1])
    pool.close()
    pool.close()
    assert repr(pool) == "<Threadpool, closed>"
    with pytest.raises(ClosedError, match=r"^Threadpool is closed$"):
        g.compute(backends[1])
    with pytest.raises(ClosedError, match=r"^Threadpool is closed$"):
        Backend(threadpool=pool)
    for use in (pool.pause, pool.resume):
        with pytest.raises(ClosedError, match=r"^Threadpool is closed$"):
            use()


def test_a_backend_has_a_pool_of_its_own(backend):
    with Backend(n_threads=2) as other:
        assert other.threadpool.n_threads == 2
        Graph().compute(other)
    assert backend.threadpool is not other.threadpool


def test_masks():
    """The thread that computes is put back where it was."""
    before = os.sched_getaffinity(0), os.sched_getscheduler(0)
    for strict in (False, True):
        for prio in (SchedPriority.NORMAL, SchedPriority.LOW):
            pool = Threadpool(2, cpumask=CPUS[:1], strict_cpu=strict, prio=prio, poll=0)
            assert (pool.cpumask, pool.prio, pool.poll, pool.strict_cpu) == ({CPUS[0]}, prio, 0, strict)
            assert repr(pool) == f"<Threadpool of 2 threads on processors [{CPUS[0]}], {prio.name}>"
            Graph().compute(Backend(threadpool=pool))
            assert (os.sched_getaffinity(0), os.sched_getscheduler(0)) == before


def test_pausing():
    pool, g = Threadpool(2, paused=True), Graph()
    backend = Backend(threadpool=pool)
    g.compute(backend)
    for _ in range(3):
        pool.pause()
        pool.pause()
        g.compute(backend)
        pool.pause()
        pool.resume()
        g.compute(backend)
        pool.resume()


@pytest.mark.parametrize("n", [0, -1, 513, 1 << 40])
def test_sizes(n):
    with pytest.raises(BackendError, match=rf"^n_threads must be 1 to 512, not {n}$"):
        Threadpool(n)


def test_preconditions():
    with pytest.raises(ParameterError, match=r"^cpumask names no processor$"):
        Threadpool(1, cpumask=[])
    absent = max(CPUS) + 1
    for cpu in (absent, -1, 600, 1 << 40):
        with pytest.raises(ParameterError, match=rf"^cpumask: this process may not run on processor {cpu}, only on \["):
            Threadpool(1, cpumask=[cpu])
    for poll in (-1, 101, 1 << 40):
        with pytest.raises(ParameterError, match=rf"^poll must be 0 to 100, not {poll}$"):
            Threadpool(1, poll=poll)
    for wrong in ({"n_threads": 1.5}, {"poll": 0.5}, {"cpumask": "0"}, {"cpumask": [0.5]}):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            Threadpool(**{"n_threads": 1, **wrong})
    with pytest.raises(TypeError, match="is not an acceptable base type"):
        type("Derived", (Threadpool,), {})
    with pytest.raises(ValueError, match="is not a valid"):
        Threadpool(1, prio=9)
    with pytest.raises(BackendError, match=r"^n_threads are those of the threadpool: give one of them$"):
        Backend(n_threads=1, threadpool=Threadpool(1))
    with pytest.raises(TypeError):
        Backend(threadpool=3)


def test_a_priority_that_takes_rights():
    """Without the right it is refused; ggml would go on, with lines on stderr."""
    try:
        pool = Threadpool(1, prio=SchedPriority.HIGH)
    except BackendError as exc:
        assert str(exc).startswith("prio: this process may not have threads of priority HIGH: ")
    else:
        Graph().compute(Backend(threadpool=pool))
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_pool_that_is_busy():
    """Backends take turns: while one computes, the other cannot, and the pool can be neither closed nor paused."""
    pool, entered, leave = Threadpool(1), threading.Event(), threading.Event()
    first, second = Backend(threadpool=pool), Backend(threadpool=pool)

    def wait(dst, a):
        entered.set()
        leave.wait(10)

    slow, quick = Graph(lambda ctx, x: ops.map_custom1(ctx, x, wait)), Graph()
    thread = threading.Thread(target=slow.graph.compute, args=(first,))
    thread.start()
    entered.wait(10)
    for use in (lambda: quick.graph.compute(second), pool.close, pool.pause, pool.resume):
        with pytest.raises(BusyError, match=r"^Threadpool is in use by a computation that has not ended$"):
            use()
    leave.set()
    thread.join()
    quick.compute(second)
    pool.close()


def test_lifetimes(python):
    python("""
        import gc, itertools
        from pyggml_adapt.ggml import ops
        for k, order in enumerate(itertools.product(range(2), range(3))):
            pool = Threadpool(2)
            backend = Backend(threadpool=pool)
            if order[0]:
                del pool
            if order[1] == 1:
                backend.close()
            elif order[1] == 2:
                del backend
            gc.collect()
        for _ in range(50):
            Backend(n_threads=2)
            Threadpool(2).pause()
        """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_wait_for_threads(python):
    """It has none of the parent's: what would wait for them says so, and one thread goes on."""
    out = python("""
        import os, signal
        def graph():
            ctx = Context(Context.size_for(8, 8))
            graph = CGraph(ctx, 8)
            x = ctx.new_tensor(Type.F32, (4096, 64)).set_input()
            out = graph.expand(ops.silu(ctx, x).set_output())
            allocr = GAllocr(Device.cpu().buffer_type)
            allocr.alloc_graph(graph)
            x.set_data(bytes(x.nbytes))
            return graph, allocr
        one, two, (each, allocr) = Backend(n_threads=1), Backend(n_threads=2), graph()
        each.compute(one)
        each.compute(two)
        child = os.fork()
        if not child:
            signal.alarm(20)
            try:
                each.compute(two)
            except (BackendError, ClosedError) as exc:
                print(type(exc).__name__)
            each.compute(one)
            two.close()
            two.threadpool.close()
            print("end", flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        each.compute(two)
        """)
    assert out.split() in (["BackendError", "end"], ["ClosedError", "end"])
