"""Schedulers beyond one graph on one backend: reset, reserve, assignments, the eval callback, waiting."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from pyggml_adapt.errors import AllocError, BackendError, BusyError, ClosedError, ComputeAborted, DTypeError, ShapeError
from pyggml_adapt.ggml import Backend, Buffer, CGraph, Context, Sched, Tensor, Type, ops

X = np.arange(4, dtype="f")


class Chain:
    """A graph of n scale nodes in a Context of its own: the last is 2 ** n times x."""

    def __init__(self, n=3, ne=(4,)):
        self.ctx = Context(Context.size_for(32, 32))
        self.graph = CGraph(self.ctx, 32)
        self.x = cur = self.ctx.new_tensor(Type.F32, ne, "x").set_input()
        self.nodes = []
        for i in range(n):
            cur = ops.scale(self.ctx, cur, 2.0)
            cur.name = f"s{i}"
            self.nodes.append(cur)
        self.graph.expand(cur.set_output())


@pytest.fixture
def sched(backend):
    return Sched([backend], 64)


def run(sched, chain):
    chain.x.set_data(X)
    sched.compute(chain.graph)
    return chain.nodes[-1].to_numpy().copy().tolist()


def test_one_graph_after_another(sched):
    sched.reserve(Chain(8, (4,)).graph)
    gc.collect()
    for n in (1, 5, 3):
        chain = Chain(n)
        sched.alloc_graph(chain.graph)
        for _ in range(2):
            assert run(sched, chain) == (X * 2**n).tolist()
        with pytest.raises(BackendError, match=r"^alloc_graph: this scheduler serves a graph already, see reset\(\)$"):
            sched.alloc_graph(Chain().graph)
        with pytest.raises(BackendError, match=r"^reset: close the Context of the scheduler's graph first$"):
            sched.reset()
        kept = chain.nodes[-1].to_numpy()
        chain.ctx.close()
        with pytest.raises(BusyError, match=r"^Sched cannot be reset: 1 array\(s\) still show its memory$"):
            sched.reset()
        del kept
        sched.reset()
        with pytest.raises(ClosedError):
            sched.compute(chain.graph)


def test_a_context_that_is_gone_is_closed(sched):
    chain = Chain()
    sched.alloc_graph(chain.graph)
    del chain
    gc.collect()
    sched.reset()
    chain = Chain()
    sched.alloc_graph(chain.graph)
    assert run(sched, chain) == (X * 8).tolist()


def test_reserve(sched, backend):
    chain = Chain(ne=(1000,))
    assert sched.get_buffer_size(backend) == 0
    sched.reserve(chain.graph)
    assert sched.get_buffer_size(backend) >= 4000
    assert not chain.x.is_allocated
    sched.alloc_graph(chain.graph)
    assert chain.x.is_allocated
    with pytest.raises(BackendError, match=r"^reserve: this scheduler serves a graph already"):
        sched.reserve(chain.graph)
    with pytest.raises(BackendError, match=r"is none of the scheduler's$"):
        sched.get_buffer_size(Backend(n_threads=1))
    assert sched.n_copies == 1


def test_several_backends(backend):
    """After reserve() on several backends the graph may hold the scheduler's copies: its Context must go."""
    backends = [Backend(n_threads=1), backend]
    sched = Sched(backends, 64)
    chain = Chain()
    sched.reserve(chain.graph)
    with pytest.raises(BackendError, match=r"^alloc_graph: close the Context of the graph that the scheduler had"):
        sched.alloc_graph(Chain().graph)
    chain.ctx.close()
    chain = Chain(3)
    for node, each in zip(chain.nodes, (backends[0], backends[1], backends[0]), strict=True):
        sched.set_tensor_backend(node, each)
    sched.alloc_graph(chain.graph)
    for node in chain.nodes:  # ggml takes the first backend of those with the same memory
        assert sched.get_tensor_backend(node) is backends[0]
    assert sched.n_splits == 1
    assert run(sched, chain) == (X * 8).tolist()


def test_set_tensor_backend_preconditions(sched, backend):
    chain = Chain()
    view = ops.view(chain.ctx, chain.x, (2,))
    view.name = "v"
    with pytest.raises(ShapeError, match=r"^set_tensor_backend: tensor 'v' is a view$"):
        sched.set_tensor_backend(view, backend)
    with pytest.raises(BackendError, match=r"is none of the scheduler's$"):
        sched.set_tensor_backend(chain.x, Backend(n_threads=1))
    with pytest.raises(BackendError, match=r"^get_tensor_backend: tensor 'x' is not in the scheduler's graph$"):
        sched.get_tensor_backend(chain.x)
    sched.set_tensor_backend(chain.x, backend)
    sched.alloc_graph(chain.graph)
    assert sched.get_tensor_backend(chain.x) is backend
    with pytest.raises(BackendError, match=r"^set_tensor_backend: this scheduler serves a graph already"):
        sched.set_tensor_backend(chain.x, backend)
    small = Sched([backend], 2)
    other = Chain()
    for node in other.nodes[:2]:
        small.set_tensor_backend(node, backend)
    with pytest.raises(AllocError, match=r"^2 nodes are assigned for a scheduler of 2$"):
        small.set_tensor_backend(other.x, backend)


def test_eval_callback(sched):
    chain, seen = Chain(), []

    def show(tensor, ask):
        if not ask:
            seen.append((tensor.name, tensor.to_numpy().copy().tolist()))
        return tensor.name != "s1"

    sched.eval_callback = show
    assert sched.eval_callback is show
    sched.alloc_graph(chain.graph)
    assert run(sched, chain) == (X * 8).tolist()
    assert seen == [("s0", (X * 2).tolist()), ("s2", (X * 8).tolist())]
    sched.eval_callback = None
    run(sched, chain)
    assert len(seen) == 2
    with pytest.raises(DTypeError, match=r"^eval_callback must be callable, not a int$"):
        sched.eval_callback = 3


class Broken(Exception):
    pass


@pytest.mark.parametrize("fail_on_ask", [True, False])
def test_exceptions_in_the_eval_callback(sched, backend, fail_on_ask):
    chain, seen = Chain(), []

    def show(tensor, ask):
        if not ask:
            seen.append(tensor.name)
        if ask == fail_on_ask and tensor.name == "s1":
            raise Broken(tensor.name)
        return True

    sched.alloc_graph(chain.graph)
    for _ in range(2):
        seen.clear()
        sched.eval_callback = show
        with pytest.raises(Broken, match=r"^s1$"):
            run(sched, chain)
        assert seen == (["s0"] if fail_on_ask else ["s0", "s1"])
        sched.eval_callback = None
        assert not backend.abort_flag
        assert run(sched, chain) == (X * 8).tolist()


def test_the_eval_callback_stops(sched):
    chain, seen = Chain(), []
    sched.eval_callback = lambda tensor, ask: True if ask else seen.append(tensor.name) is not None
    sched.alloc_graph(chain.graph)
    with pytest.raises(ComputeAborted, match=r"^sched graph compute: stopped by its eval callback$"):
        run(sched, chain)
    assert seen == ["s0"]


def test_what_the_eval_callback_must_not_do(sched):
    chain, errors = Chain(), []

    def misuse(tensor, ask):
        for each in (chain.ctx.close, sched.close, sched.reset, lambda: sched.compute(chain.graph)):
            try:
                each()
            except (BusyError, BackendError) as exc:
                errors.append(exc)
        try:
            sched.eval_callback = None
        except BusyError as exc:
            errors.append(exc)

    sched.eval_callback = misuse
    sched.alloc_graph(chain.graph)
    run(sched, chain)
    assert len(errors) == 5 * 3


def test_compute_async(sched, backend):
    chain = Chain()
    sched.alloc_graph(chain.graph)
    chain.x.set_data(X)
    sched.compute_async(chain.graph)
    for use in (chain.ctx.close, sched.close, lambda: sched.compute(chain.graph)):
        with pytest.raises(BusyError, match=r"is in use by a computation that has not ended$"):
            use()
    sched.synchronize()
    assert chain.nodes[-1].to_numpy().tolist() == (X * 8).tolist()
    sched.synchronize()
    assert run(sched, chain) == (X * 8).tolist()
    chain.ctx.close()
    sched.close()


def test_leaves_and_losses_that_no_node_reads(backend):
    """They count, as ggml keeps a place for each."""
    ctx = Context(Context.size_for(1000, 1000))
    graph = CGraph(ctx, 500)
    leaves = [graph.expand(Tensor.from_numpy(ctx, np.array(X))) for _ in range(200)]
    graph.expand(ops.sqr(ctx, leaves[0]))
    with pytest.raises(AllocError, match=r"^a graph of 201 nodes and leaves for a scheduler of 100$"):
        Sched([backend], 100).alloc_graph(graph)
    graph = CGraph(Context(4 * Context.size_for(2000, 2000)), 2000, grads=True)
    w, constant = (Tensor.from_numpy(graph.ctx, np.array(X)) for _ in range(2))
    for each in (w.set_param(), *[constant] * 100):
        graph.expand(ops.sum(graph.ctx, each).set_loss())
    graph.build_backward()
    with pytest.raises(AllocError, match=r"nodes and leaves for a scheduler of 110$"):
        Sched([backend], 110).alloc_graph(graph)


def test_a_graph_without_nodes(sched):
    for use in (sched.reserve, sched.alloc_graph):
        with pytest.raises(ShapeError, match=r"the graph has no nodes$"):
            use(CGraph(Context(Context.size_for(0, 8)), 8))


def test_what_nobody_waited_for(backend):
    """It ends with the scheduler, and lets go of what it used."""
    chain, other = Chain(), Context(Context.size_for(8, 8))
    graph = CGraph(other, 8)
    graph.expand(ops.scale(other, Tensor.from_numpy(chain.ctx, np.array(X)), 2.0))
    sched = Sched([backend])
    sched.alloc_graph(graph)
    sched.compute_async(graph)
    with pytest.raises(BusyError, match=r"^Context is in use by a computation that has not ended$"):
        chain.ctx.close()
    del sched, graph, other
    gc.collect()
    chain.ctx.close()


def test_a_leaf_that_is_seen_through_a_view_only(sched):
    """It need not be marked as an input; nor need one that no node uses."""
    ctx = Context(Context.size_for(8, 8))
    graph = CGraph(ctx, 8)
    alone = graph.expand(ctx.new_tensor(Type.F32, (4,)))
    x = ctx.new_tensor(Type.F32, (4,))
    y = graph.expand(ops.scale(ctx, ops.reshape(ctx, x, 2, 2), 2.0).set_output())
    sched.reserve(graph)
    sched.alloc_graph(graph)
    x.set_data(X)
    sched.compute(graph)
    assert alone.is_allocated
    assert y.to_numpy().ravel().tolist() == (X * 2).tolist()


def test_writing_into_a_mapping(sched):
    chain = Chain(1)
    w = chain.ctx.new_tensor(Type.F32, (4,), "w")
    Buffer.from_mapping(bytes(64)).place(w, 0)
    chain.graph.expand(ops.cpy(chain.ctx, chain.nodes[-1], w))
    with pytest.raises(DTypeError, match=r"tensor 'w' is in a read-only mapping$"):
        sched.alloc_graph(chain.graph)


def test_every_order_of_closing(python):
    python("""
        import itertools
        from pyggml_adapt.ggml import ops
        for order in itertools.permutations(range(3)):
            for use in (False, True):
                backend = Backend(n_threads=1)
                sched = Sched([backend], 16)
                ctx = Context(Context.size_for(8, 8))
                graph = CGraph(ctx, 8)
                x = ctx.new_tensor(Type.F32, (4,)).set_input()
                y = graph.expand(ops.silu(ctx, x).set_output())
                sched.eval_callback = lambda t, ask: True
                sched.alloc_graph(graph)
                x.set_data(np.ones(4, 'f'))
                if use:
                    sched.compute(graph)
                owners = [backend, sched, ctx]
                for i in order:
                    owners[i].close()
                    for each in (lambda: sched.compute(graph), lambda: graph.compute(backend), y.to_numpy, sched.reset,
                                 lambda: sched.get_tensor_backend(y), sched.synchronize, lambda: graph.dup(),
                                 lambda: graph.to_dot()):
                        try:
                            each()
                        except GGMLError:
                            pass
        """)
