"""Custom ops: what the Python function is given, what it raises, how long it lives."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from pyggml_adapt.errors import BusyError, DTypeError, ShapeError
from pyggml_adapt.ggml import Backend, Buffer, CGraph, Context, Device, GAllocr, GraphPlan, Sched, Type, ops

X = np.arange(12, dtype="f").reshape(3, 4)


def test_map_custom(bench):
    a, b, c = (bench.leaf(X + k) for k in range(3))

    def f1(dst, a):
        dst[:] = np.sin(a)

    def f2(dst, a, b):
        dst[:] = a * b

    def f3(dst, a, b, c):
        dst[:] = a + b - c

    ctx = bench.ctx
    outs = bench.compute(ops.map_custom1(ctx, a, f1), ops.map_custom2(ctx, a, b, f2), ops.map_custom3(ctx, a, b, c, f3))
    np.testing.assert_array_equal(outs[0], np.sin(X))
    np.testing.assert_array_equal(outs[1], X * (X + 1))
    np.testing.assert_array_equal(outs[2], X + (X + 1) - (X + 2))


def test_in_place(bench):
    ctx = bench.ctx

    def double(dst, a, *rest):
        assert np.shares_memory(dst, a)
        dst *= 2
        for each in rest:
            dst += each

    b = bench.leaf(X)
    outs = [
        ops.map_custom1_inplace(ctx, bench.leaf(X), double),
        ops.map_custom2_inplace(ctx, bench.leaf(X), b, double),
        ops.map_custom3_inplace(ctx, bench.leaf(X), b, b, double),
        ops.custom_inplace(ctx, bench.leaf(X), [b, b, b], double),
    ]
    for k, out in enumerate(bench.compute(*outs)):
        np.testing.assert_array_equal(out, X * (2 + k))


def test_custom_4d(bench):
    """Any shape and type, of no operands up to 9; those without a NumPy type come as bytes, transposed ones strided."""
    seen = []

    def fill(dst, *args):
        seen.append([(each.dtype.char, each.shape, each.flags.writeable) for each in (dst, *args)])
        dst[:] = sum(each.T.astype("f").sum() for each in args) if args else 7

    q = bench.leaf(np.ones((2, 32), "f"), Type.Q8_0)
    t = ops.transpose(bench.ctx, bench.leaf(X))
    outs = [
        ops.custom_4d(bench.ctx, Type.I32, (5,), (), fill),
        ops.custom_4d(bench.ctx, Type.F32, (2, 3, 2), (q, t), fill),
        ops.custom_4d(bench.ctx, Type.F32, (1,), [t] * 9, fill),
    ]
    a, b, c = bench.compute(*outs)
    assert a.tolist() == [7] * 5
    assert b.shape == (2, 3, 2)
    assert c.tolist() == [9 * X.sum()]
    assert seen[0] == [("i", (5,), True)]
    assert seen[1] == [("f", (2, 3, 2), True), ("B", (2, 34), False), ("f", (4, 3), False)]


def test_preconditions(bench):
    ctx, a = bench.ctx, bench.leaf(X)
    with pytest.raises(DTypeError, match=r"^map_custom1: fun must be callable, not a int$"):
        ops.map_custom1(ctx, a, 3)
    for n in (0, -2):
        with pytest.raises(ShapeError, match=rf"^map_custom1: n_tasks = {n}, not 1 or more, or -1 for one on each"):
            ops.map_custom1(ctx, a, print, n_tasks=n)
    with pytest.raises(ShapeError, match=r"^custom_4d: 10 operands, at most 9"):
        ops.custom_4d(ctx, Type.F32, (1,), [a] * 10, print)
    with pytest.raises(ShapeError, match=r"^custom_inplace: 9 operands, at most 8"):
        ops.custom_inplace(ctx, a, [a] * 9, print)
    with pytest.raises(TypeError):
        ops.custom_4d(ctx, Type.F32, (1,), [a, None], print)
    with pytest.raises(ShapeError, match="block size"):
        ops.custom_4d(ctx, Type.Q8_0, (33,), [], print)
    with pytest.raises(ShapeError, match="impossible shape"):
        ops.custom_4d(ctx, Type.F32, (-1,), [], print)
    q = ops.transpose(ctx, bench.leaf(np.ones((32, 32), "f"), Type.BF16))
    with pytest.raises(ShapeError, match="must be contiguous"):
        ops.map_custom1(ctx, q, print)


class Broken(Exception):
    pass


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("how", ["compute", "sched", "plan"])
def test_exceptions_stop_the_computation(n_threads, how):
    ctx = Context(Context.size_for(16, 16))
    graph, backend, called = CGraph(ctx, 16), Backend(n_threads=n_threads), []
    healthy = []

    def fail(dst, a, *task):
        if not healthy:
            raise Broken("no")
        dst[:] = a

    def after(dst, a, *task):
        called.append(1)
        dst[:] = a + 1

    x = ctx.new_tensor(Type.F32, (4, 3)).set_input()
    out = graph.expand(ops.map_custom1(ctx, ops.map_custom1(ctx, x, fail, n_tasks=-1), after).set_output())
    owner = Sched([backend]) if how == "sched" else GAllocr(Device.cpu().buffer_type)
    owner.alloc_graph(graph)
    compute = {"compute": lambda: graph.compute(backend), "sched": lambda: owner.compute(graph)}.get(how)
    if compute is None:
        compute = GraphPlan(backend, graph).compute
    for _ in range(3):
        x.set_data(X)
        with pytest.raises(Broken, match=r"^no$"):
            compute()
        assert not called
        assert not backend.abort_flag
    healthy.append(1)
    x.set_data(X)
    compute()
    np.testing.assert_array_equal(out.to_numpy(), X + 1)
    assert called == [1]


def test_tasks():
    """Each task does its part, at most as many as there are threads; one by default, whatever the threads."""
    seen = []

    def part(dst, a, ith, nth):
        seen.append((ith, nth))
        dst[ith::nth] = a[ith::nth] * 2

    ctx = Context(Context.size_for(16, 16))
    graph = CGraph(ctx, 16)
    x = ctx.new_tensor(Type.F32, (4, 3)).set_input()
    outs = [graph.expand(ops.map_custom1(ctx, x, part, n_tasks=n).set_output()) for n in (-1, 2, 100)]
    single = graph.expand(ops.map_custom1(ctx, x, lambda dst, a: seen.append("one")).set_output())
    allocr = GAllocr(Device.cpu().buffer_type)
    allocr.alloc_graph(graph)
    x.set_data(X)
    graph.compute(Backend(n_threads=3))
    for out in outs:
        np.testing.assert_array_equal(out.to_numpy(), X * 2)
    assert seen.count("one") == 1 and sorted(seen[:-1]) == sorted([(i, 3) for i in range(3)] * 2 + [(0, 2), (1, 2)])
    assert single.is_allocated


def test_the_context_keeps_the_function_alive(bench):
    class Fill:
        def __call__(self, dst, a):
            dst[:] = 5

    fill = Fill()
    ref = weakref.ref(fill)
    out = ops.map_custom1(bench.ctx, bench.leaf(X), fill)
    del fill
    gc.collect()
    assert bench.compute(out)[0].tolist() == [[5.0] * 4] * 3
    bench.ctx.close()
    bench.graph = None
    gc.collect()
    assert ref() is None


def test_a_node_of_another_context(backend):
    other = Context(Context.size_for(4))
    x = other.new_tensor(Type.F32, (4, 3))
    node = ops.map_custom1(other, x, lambda dst, a: np.copyto(dst, a + 1))
    memory = other.alloc_tensors(Device.cpu().buffer_type)
    x.set_data(X)
    ctx = Context(Context.size_for(8, 8))
    graph = CGraph(ctx, 8)
    out = graph.expand(ops.scale(ctx, node, 2.0).set_output())
    allocr = GAllocr(Device.cpu().buffer_type)
    allocr.alloc_graph(graph)
    graph.compute(backend)
    np.testing.assert_array_equal(out.to_numpy(), (X + 1) * 2)
    assert memory.nbytes >= 96


def test_arrays_that_are_kept_keep_the_memory(bench):
    kept = []
    out = ops.map_custom1(bench.ctx, bench.leaf(X), lambda dst, a: (np.copyto(dst, a), kept.append(dst)))
    bench.compute(out)
    with pytest.raises(BusyError, match="array"):
        bench.allocr.close()
    np.testing.assert_array_equal(kept[0], X)
    kept.clear()
    bench.ctx.close()
    bench.allocr.close()


def test_what_a_function_must_not_do(backend):
    """What is computed with cannot be closed, nor computed with again, nor grow."""
    ctx = Context(Context.size_for(16, 16))
    graph, allocr = CGraph(ctx, 16), GAllocr(Device.cpu().buffer_type)
    errors = []

    def misuse(dst, a):
        for each in (ctx.close, allocr.close, lambda: graph.compute(backend), lambda: graph.expand(x), graph.clear):
            try:
                each()
            except BusyError as exc:
                errors.append(exc)

    x = ctx.new_tensor(Type.F32, (4,)).set_input()
    graph.expand(ops.map_custom1(ctx, x, misuse))
    allocr.alloc_graph(graph)
    graph.compute(backend)
    assert len(errors) == 5


def test_a_result_that_is_wanted_elsewhere(bench):
    out = ops.map_custom1(bench.ctx, bench.leaf(X), lambda dst, a: np.copyto(dst, a * 3))
    bench.compute(out)
    bench._fill[0][0].set_data(X)
    into = np.zeros_like(X)
    bench.graph.compute(bench.backend, out, into)
    np.testing.assert_array_equal(into, X * 3)


def test_in_place_into_a_mapping(bench):
    leaf = bench.ctx.new_tensor(Type.F32, (4,), "w")
    Buffer.from_mapping(bytes(64)).place(leaf, 0)
    out = ops.map_custom1_inplace(bench.ctx, leaf, lambda dst, a: None)
    with pytest.raises(DTypeError, match=r"tensor 'w' is in a read-only mapping$"):
        bench.compute(ops.scale(bench.ctx, out, 1.0))


def test_threads_at_once():
    """Two threads with backends and graphs of their own: the functions take turns."""
    results, errors = [], []

    def work(k):
        try:
            ctx = Context(Context.size_for(8, 8))
            graph, allocr = CGraph(ctx, 8), GAllocr(Device.cpu().buffer_type)
            x = ctx.new_tensor(Type.F32, (4, 3)).set_input()
            out = graph.expand(ops.map_custom1(ctx, x, lambda dst, a: np.copyto(dst, a * k)).set_output())
            allocr.alloc_graph(graph)
            with Backend(n_threads=1) as backend:
                for _ in range(50):
                    x.set_data(X)
                    graph.compute(backend)
                results.append(np.array_equal(out.to_numpy(), X * k))
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (results, errors) == ([True] * 3, [])


def test_keyboard_interrupts_and_exits_come_out(bench):
    def leave(dst, a):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        bench.compute(ops.map_custom1(bench.ctx, bench.leaf(X), leave))
