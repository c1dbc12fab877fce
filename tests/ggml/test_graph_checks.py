"""What a graph refuses to compute: writing into mappings, and indices that cannot be checked."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, IndexRangeError, ShapeError
from pyggml_adapt.ggml import Buffer, CGraph, Context, Device, GAllocr, Slots, Tensor, TensorTable, Type, ops


class Graph:
    def __init__(self, size=64):
        self.ctx = Context(Context.size_for(size, size))
        self.graph = CGraph(self.ctx, size)
        self.allocr = GAllocr(Device.cpu().buffer_type)

    def leaf(self, *ne, type=Type.F32):
        return self.ctx.new_tensor(type, ne).set_input()

    def compute(self, backend, *outs):
        for out in outs:
            self.graph.expand(out.set_output())
        self.allocr.alloc_graph(self.graph)
        self.graph.compute(backend)


@pytest.fixture
def g():
    return Graph()


IN_PLACE = {
    "cpy": lambda ctx, w, x: ops.cpy(ctx, x, w),
    "scale": lambda ctx, w, x: ops.map_custom1_inplace(ctx, w, lambda dst, a: None),
    "a view": lambda ctx, w, x: ops.cpy(ctx, ops.view(ctx, x, (2,)), ops.view(ctx, w, (2,))),
    "a view of a view": lambda ctx, w, x: ops.cpy(
        ctx, ops.view(ctx, x, (1,)), ops.view(ctx, ops.view(ctx, w, (2,)), (1,))
    ),
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_nothing_is_written_into_a_mapping(g, backend, how):
    readonly = np.zeros(4, "f")
    readonly.flags.writeable = False
    w = Tensor.from_numpy(g.ctx, readonly, "w")
    with pytest.raises(DTypeError, match=r"tensor 'w' is in a read-only mapping$"):
        g.compute(backend, IN_PLACE[how](g.ctx, w, g.leaf(4)))
    g, writable = Graph(), np.zeros(4, "f")
    g.compute(backend, IN_PLACE[how](g.ctx, Tensor.from_numpy(g.ctx, writable), g.leaf(4)))


def test_where_a_node_cannot_be_placed(g):
    """What allocates graphs knows which memory is free meanwhile."""
    y = ops.silu(g.ctx, g.leaf(4))
    y.name = "y"
    with Buffer.allocate(Device.cpu().buffer_type, 64) as buffer:
        with pytest.raises(
            ShapeError, match=r"^place: tensor 'y' is computed by SILU: GAllocr, Sched or alloc_tensors"
        ):
            buffer.place(y, 0)
    owner, other = Context(Context.size_for(2)), Context(Context.size_for(1))
    owner.new_tensor(Type.F32, (4,))
    with pytest.raises(ShapeError, match=r"^place: the buffer is that of all tensors of a Context$"):
        owner.alloc_tensors(Device.cpu().buffer_type).place(other.new_tensor(Type.F32, (4,)), 0)


def test_a_slot_that_is_written(g, backend):
    """What a slot points at is looked at whenever it is bound."""
    other = Context(Context.size_for(2))
    readonly = np.zeros(4, "f")
    readonly.flags.writeable = False
    a, b = Tensor.from_numpy(other, np.zeros(4, "f"), "a"), Tensor.from_numpy(other, readonly, "b")
    slots = Slots(g.graph)
    g.graph.expand(ops.cpy(g.ctx, g.leaf(4), slots.add(a)).set_output())
    g.allocr.alloc_graph(g.graph)
    slots.seal()
    tables = [TensorTable([each]) for each in (a, b)]
    for _ in range(2):
        slots.bind(tables[0])
        g.graph.compute(backend)
        with pytest.raises(DTypeError, match=r"^Slots.bind: tensor 'b' is in a read-only mapping, and the graph wri"):
            slots.bind(tables[1])


def pick(g, ids, n=4):
    return ops.get_rows(g.ctx, g.leaf(8, n), ids)


COMPUTED = {
    "argsort": (lambda ctx, x, ids: ops.argsort(ctx, x, 1), 4),
    "top_k": (lambda ctx, x, ids: ops.top_k(ctx, x, 2), 4),
    "a view": (lambda ctx, x, ids: ops.view(ctx, ops.argsort(ctx, x, 1), (2,), (), 4), 4),
    "cont": (lambda ctx, x, ids: ops.cont(ctx, ops.view(ctx, ops.argsort(ctx, x, 1), (2,))), 4),
    "argmax": (lambda ctx, x, ids: ops.argmax(ctx, ops.reshape(ctx, x, 4, 1)), 4),
    "reshape": (lambda ctx, x, ids: ops.reshape(ctx, ops.argsort(ctx, x, 1), 4, 1), 4),
}


@pytest.mark.parametrize("how", [each for each in COMPUTED if hasattr(ops, each) or " " in each or each == "reshape"])
def test_indices_that_are_computed(backend, how):
    """They pass if they are positions in rows that are no longer than there are rows to pick."""
    make, n = COMPUTED[how]
    g = Graph()
    x = g.leaf(4)
    out = pick(g, make(g.ctx, x, None), n)
    g.graph.expand(out.set_output())
    g.allocr.alloc_graph(g.graph)
    x.set_data(np.array([3, 1, 2, 0], "f"))
    g.graph.compute(backend)
    g = Graph()
    message = rf"^get_rows: the indices '.*' are computed by \w+, and may not be from 0 to {n - 2}$"
    with pytest.raises(IndexRangeError, match=message):
        g.compute(backend, pick(g, make(g.ctx, g.leaf(4), None), n - 1))


def test_indices_that_were_copied(g, backend):
    """The leaf that they come from is looked at."""
    ids = g.leaf(3, type=Type.I32)
    ids.name = "ids"
    out = pick(g, ops.cont(g.ctx, ops.cont(g.ctx, ids)))
    g.graph.expand(out.set_output())
    g.allocr.alloc_graph(g.graph)
    ids.set_data(np.array([0, 3, 1], "i"))
    g.graph.compute(backend)
    ids.set_data(np.array([0, 4, 1], "i"))
    with pytest.raises(IndexRangeError, match=r"^tensor 'ids' picks row 4 of 4, at position 1$"):
        g.graph.compute(backend)


def test_indices_that_other_nodes_write(g, backend):
    ids, other = g.leaf(3, type=Type.I32), g.leaf(3, type=Type.I32)
    ids.name = "ids"
    g.graph.expand(ops.cpy(g.ctx, other, ids))
    with pytest.raises(IndexRangeError, match=r"^get_rows: the indices 'ids' are computed by NONE, and may not"):
        g.compute(backend, pick(g, ids))


def test_indices_through_the_copy_itself(g, backend):
    ids, other = g.leaf(3, type=Type.I32), g.leaf(3, type=Type.I32)
    other.name = "other"
    out = pick(g, ops.cpy(g.ctx, other, ids))
    g.graph.expand(out.set_output())
    g.allocr.alloc_graph(g.graph)
    other.set_data(np.array([0, 3, -1], "i"))
    with pytest.raises(IndexRangeError, match=r"^tensor 'other' picks row -1 of 4, at position 2$"):
        g.graph.compute(backend)
    other.set_data(np.array([0, 3, 1], "i"))
    g.graph.compute(backend)


def test_indices_that_a_function_computes(g, backend):
    ids = ops.custom_4d(g.ctx, Type.I32, (3,), (), lambda dst: None)
    with pytest.raises(IndexRangeError, match=r"are computed by CUSTOM, and may not be from 0 to 3$"):
        g.compute(backend, pick(g, ids))


def test_indices_in_memory_that_another_leaf_shows(g, backend):
    memory = np.zeros(4, "i")
    ids = Tensor.from_numpy(g.ctx, memory, "ids")
    same = Tensor.from_numpy(g.ctx, memory[1:].view("f"), "same")
    g.graph.expand(ops.cpy(g.ctx, g.leaf(3), same))
    with pytest.raises(IndexRangeError, match=r"^get_rows: the indices 'ids' are computed by NONE"):
        g.compute(backend, pick(g, ids))


def test_rows_that_were_picked_by_rows(g, backend):
    """Integers that get_rows looks up may be anything."""
    table, ids = g.leaf(1, 8, type=Type.I32), g.leaf(3, type=Type.I32)
    looked_up = ops.reshape(g.ctx, ops.get_rows(g.ctx, table, ids), 3)
    with pytest.raises(IndexRangeError, match=r"are computed by GET_ROWS"):
        g.compute(backend, pick(g, looked_up))


def test_nan_does_not_make_indices_of_argsort_leave_the_range(python):
    """Rows of up to 16 elements are sorted without a search for a sentinel."""
    python("""
        from pyggml_adapt.ggml import ops
        ctx = Context(Context.size_for(16, 16))
        graph, x = CGraph(ctx, 16), ctx.new_tensor(Type.F32, (16, 100)).set_input()
        out = graph.expand(ops.argsort(ctx, x, 1).set_output())
        allocr = GAllocr(Device.cpu().buffer_type)
        allocr.alloc_graph(graph)
        data = np.random.default_rng(0).normal(size=(100, 16)).astype('f')
        data[np.random.default_rng(1).random((100, 16)) < 0.3] = np.nan
        x.set_data(data)
        with Backend(n_threads=1) as backend:
            graph.compute(backend)
        assert np.array_equal(np.sort(out.to_numpy(), axis=1), np.tile(np.arange(16), (100, 1)))
        """)
