"""Owners closed and objects let go where ggml still looks: what fuzz_life.py found, in the fewest calls."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import AllocError, BackendError, ClosedError, ShapeError
from pyggml_adapt.ggml import (
    Buffer,
    CGraph,
    Context,
    Device,
    GAllocr,
    Sched,
    Slots,
    Tensor,
    TensorTable,
    Type,
    ops,
)

CLOSED = r"^Context is closed$"


def contexts(n):
    return [Context(Context.size_for(64, 64)) for _ in range(n)]


def leaf(ctx, *ne):
    return ctx.new_tensor(Type.F32, ne or (4,))


def test_only_leaves_are_inputs():
    (ctx,) = contexts(1)
    with pytest.raises(ShapeError, match=r"^set_input: tensor '' is computed by NEG$"):
        ops.neg(ctx, leaf(ctx)).set_input()


@pytest.mark.parametrize("how", ["alloc_tensors", "allocr", "sched"])
def test_an_empty_tensor_in_an_empty_buffer(backend, how):
    """It needs no memory, and the others get theirs."""
    (ctx,) = contexts(1)
    empty, full = Tensor.from_numpy(ctx, np.ones((0, 4), "f")), leaf(ctx)
    if how == "alloc_tensors":
        ctx.alloc_tensors(Device.cpu().buffer_type)
        full.set_data(np.ones(4, "f"))
    else:
        graph = CGraph(ctx, 8)
        outs = [graph.expand(ops.neg(ctx, each).set_output()) for each in (empty, full)]
        allocate = GAllocr(backend.device.buffer_type) if how == "allocr" else Sched([backend])
        allocate.alloc_graph(graph)
        full.set_data(np.ones(4, "f"))
        graph.compute(backend) if how == "allocr" else allocate.compute(graph)
        assert [out.to_numpy().tolist() for out in outs] == [[], [-1.0] * 4]
    assert empty.to_numpy().shape == (0, 4)


def test_a_scheduler_let_go_before_it_was_synchronized(python):
    """The garbage collector must not free its backends first."""
    python("""
        import gc
        from pyggml_adapt.ggml import ops
        def go():
            ctx, backend = Context(Context.size_for(8, 8)), Backend(n_threads=1)
            graph = CGraph(ctx, 8)
            graph.expand(ops.neg(ctx, ctx.new_tensor(Type.F32, (4,))))
            sched = Sched([backend])
            sched.alloc_graph(graph)
            sched.compute_async(graph)
        for i in range(20):
            go()
        gc.collect()
        """)


def test_views_of_tensors_that_are_gone():
    one, two = contexts(2)
    view = ops.view_tensor(two, leaf(one))
    one.close()
    assert repr(view) == "<Tensor of a closed Context>"
    for use in (view.set_output, lambda: ops.add_inplace(two, view, view), lambda: view.ne, lambda: ops.neg(two, view)):
        with pytest.raises(ClosedError, match=CLOSED):
            use()


def test_parameters_are_nodes():
    (ctx,) = contexts(1)
    a, b = leaf(ctx).set_param(), leaf(ctx).set_param()
    with pytest.raises(AllocError, match=r"^a graph of 2 nodes is too small for '' and its operands$"):
        CGraph(ctx, 2).expand(ops.add(ctx, a, b))


@pytest.mark.parametrize("how", ["expand", "dup"])
def test_leaves_without_nodes_count(how):
    (ctx,) = contexts(1)
    graph = CGraph(ctx, 1)
    graph.expand(leaf(ctx))
    graph = graph if how == "expand" else graph.dup()
    with pytest.raises(AllocError, match=r"^a graph of 1 nodes is too small"):
        graph.expand(leaf(ctx))
    graph.clear()
    graph.expand(leaf(ctx))


def test_sealing_slots_of_a_graph_whose_nodes_are_gone():
    one, two = contexts(2)
    graph = CGraph(one, 8)
    graph.expand(ops.neg(one, leaf(one)))
    slots = Slots(graph.dup(two))
    one.close()
    with pytest.raises(ClosedError, match=CLOSED):
        slots.seal()


def test_binding_slots_of_a_graph_whose_nodes_are_gone():
    weights, one, two = contexts(3)
    a, b = (Tensor.from_numpy(weights, np.ones(4, "f")) for _ in range(2))
    theirs = CGraph(two, 8)
    slots = Slots(theirs)
    view = ops.view_tensor(one, slots.add(a))
    ours = CGraph(one, 8)
    ours.expand(ops.neg(one, view))
    ours.cpy(theirs)
    slots.seal()
    one.close()
    with pytest.raises(ClosedError, match=CLOSED):
        slots.bind(TensorTable([b]))


def test_binding_slots_of_a_graph_that_was_built_again():
    weights, ctx = contexts(2)
    a, b = (Tensor.from_numpy(weights, np.ones(4, "f")) for _ in range(2))
    graph = CGraph(ctx, 8)
    slots = Slots(graph)
    graph.expand(ops.neg(ctx, slots.add(a)))
    slots.seal()
    graph.clear()
    graph.expand(ops.neg(ctx, leaf(ctx)))
    with pytest.raises(BackendError, match=r"or the graph has changed since$"):
        slots.bind(TensorTable([b]))


def test_a_leaf_that_no_node_reads():
    """It is allocated as the others, by an owner that is known."""
    home, other = contexts(2)
    graph = CGraph(home, 8)
    lone = graph.expand(leaf(home))
    with pytest.raises(ClosedError, match=r"^tensor 'leaf_0' of another Context has no data$"):
        GAllocr(Device.cpu().buffer_type).alloc_graph(graph.dup(other))
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    lone.set_data(np.ones(4, "f"))
    assert lone.to_numpy().tolist() == [1] * 4


def test_assigning_a_node_whose_operand_is_gone(backend):
    ctx, buffer = contexts(1)[0], Buffer.allocate(Device.cpu().buffer_type, 4096)
    buffer.place(operand := leaf(ctx), 0)
    node = ops.neg(ctx, operand)
    assert backend.supports_op(node)
    buffer.close()
    for use in (lambda: Sched([backend]).set_tensor_backend(node, backend), lambda: backend.supports_op(node)):
        with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
            use()


def test_a_graph_closed_while_it_is_drawn(tmp_path):
    (ctx,) = contexts(1)
    graph = CGraph(ctx, 8)
    graph.expand(ops.neg(ctx, leaf(ctx)))

    class Path:
        def __fspath__(self):
            ctx.close()
            return str(tmp_path / "graph.dot")

    with pytest.raises(ClosedError, match=CLOSED):
        graph.dump_dot(Path())
