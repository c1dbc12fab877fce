"""What others do to tensors while a graph computes with them: custom ops and eval callbacks, or another thread."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pyggml_adapt.errors import (
    BusyError,
    ClosedError,
    DTypeError,
    GGMLError,
    IndexRangeError,
    ParameterError,
    ShapeError,
)
from pyggml_adapt.ggml import (
    Backend,
    Buffer,
    CGraph,
    Context,
    Device,
    GAllocr,
    GraphPlan,
    OpHint,
    Prec,
    RopeType,
    Sched,
    Slots,
    Tensor,
    TensorTable,
    Type,
    ops,
)

ROWS = np.arange(12, dtype="f").reshape(4, 3)


class Picking:
    """Rows of a table, picked by indices in an array, after a custom op that calls `meanwhile`."""

    def __init__(self, meanwhile=None):
        self.meanwhile = meanwhile or (lambda: None)
        self.ids = np.array([2, 0], "i")
        self.table = ROWS.copy()
        self.ctx = Context(Context.size_for(64, 64))
        self.graph = CGraph(self.ctx, 64)
        self.leaf = Tensor.from_numpy(self.ctx, self.ids, "ids")
        rows = ops.map_custom1(self.ctx, Tensor.from_numpy(self.ctx, self.table), self.copy, 1)
        rows.name = "rows"
        self.picked = ops.get_rows(self.ctx, rows, self.leaf).set_output()
        self.graph.expand(self.picked)
        self.rows = rows

    def copy(self, dst, src):
        dst[:] = src
        self.meanwhile()

    def alloc(self):
        self.allocr = GAllocr(Device.cpu().buffer_type)
        self.allocr.alloc_graph(self.graph)
        return self


def compute(g, backend):
    g.alloc().graph.compute(backend)


def plan(g, backend):
    g.alloc()
    GraphPlan(backend, g.graph).compute()


def schedule(g, backend):
    g.sched = Sched([backend])
    g.sched.alloc_graph(g.graph)
    g.sched.compute(g.graph)


HOW = [compute, plan, schedule]


@pytest.mark.parametrize("how", HOW)
def test_indices_are_read_when_a_computation_starts(backend, how):
    g = Picking()

    def meanwhile():
        g.ids[:] = 1 << 30
        assert g.picked.src[1].name == "ids" and g.graph.node(-1).src[1].ne == (2, 1, 1, 1)

    g.meanwhile = meanwhile
    how(g, backend)
    assert g.picked.to_numpy().tolist() == ROWS[[2, 0]].tolist()
    with pytest.raises(IndexRangeError, match=rf"^tensor 'ids' picks row {1 << 30} of 4, at position 0$"):
        g.graph.compute(backend) if how is not schedule else g.sched.compute(g.graph)
    g.ids[:], g.meanwhile = 3, lambda: None
    g.graph.compute(backend) if how is not schedule else g.sched.compute(g.graph)
    assert g.picked.to_numpy().tolist() == ROWS[[3, 3]].tolist()


def test_indices_behind_views_and_copies(backend):
    """Of a view with gaps, and through a copy that the graph makes of them."""
    ctx, graph = Context(Context.size_for(64, 64)), None
    graph = CGraph(ctx, 64)
    memory = np.array([3, 99, 1, -5], "i")
    leaf = Tensor.from_numpy(ctx, memory, "ids")
    spread = ops.view(ctx, leaf, (1, 2), (8,))
    flat = ops.reshape(ctx, ops.cont(ctx, spread), 2)
    table = Tensor.from_numpy(ctx, ROWS.copy())
    outs = [
        graph.expand(ops.get_rows(ctx, table, ids).set_output()) for ids in (ops.view(ctx, leaf, (1,), (), 8), flat)
    ]
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    graph.compute(backend)
    assert [out.to_numpy().tolist() for out in outs] == [[*ROWS[[1]].tolist()[0]], ROWS[[3, 1]].tolist()]
    memory[2] = 4
    with pytest.raises(IndexRangeError, match=r"picks row 4 of 4, at position [01]$"):
        graph.compute(backend)


@pytest.mark.parametrize("how", HOW)
def test_nobody_else_writes_what_is_computed_with(backend, how):
    g, raised = Picking(), []

    def meanwhile():
        for write in (
            lambda: g.rows.set_data(ROWS),
            lambda: g.leaf.set_data(g.ids),
            lambda: g.rows.memset(255),
            lambda: g.ctx.set_data((g.leaf,), (g.ids,)),
            lambda: g.rows.copy_from(g.rows),
        ):
            with pytest.raises(BusyError, match=r"^tensor '(rows|ids)' cannot be written: a computation uses its mem"):
                write()
            raised.append(write)

    g.meanwhile = meanwhile
    how(g, backend)
    assert len(raised) == 5
    g.rows.set_data(ROWS)


def test_what_needs_the_graph_still(backend):
    """Graphs and Contexts that share nodes with one that computes."""
    g, raised = Picking(), []
    other = Context(Context.size_for(64, 256))
    graph = g.alloc().graph.dup(other)
    outer = CGraph(other, 64)
    more = ops.scale(other, g.picked, 2.0)

    def meanwhile():
        for use in (
            lambda: g.graph.expand(g.picked),
            lambda: graph.compute(backend),
            lambda: outer.expand(more),
            g.graph.clear,
        ):
            with pytest.raises(BusyError, match=r"^Context is in use by a computation that has not ended$"):
                use()
            raised.append(use)

    g.meanwhile = meanwhile
    g.graph.compute(backend)
    g.meanwhile = lambda: None
    assert len(raised) == 4
    outer.expand(more)
    graph.compute(backend)
    assert g.picked.to_numpy().tolist() == ROWS[[2, 0]].tolist()


def test_eval_callbacks_see_the_graph_as_it_is(backend):
    g, seen = Picking(), []

    def look(tensor, ask):
        if not ask and tensor.op == "GET_ROWS":
            seen.append((tensor.src[1].name, tensor.src[1].to_numpy().tolist(), repr(tensor.src[1])))
        return True

    sched = Sched([backend])
    sched.alloc_graph(g.graph)
    sched.eval_callback = look
    sched.compute(g.graph)
    assert seen == [("ids", [2, 0], "<Tensor 'ids' I32 [2, 1, 1, 1], 8 bytes of CPU_Mapped>")]


class Doubling:
    def __init__(self, memory):
        self.ctx = Context(Context.size_for(64, 64))
        self.graph = CGraph(self.ctx, 64)
        self.x = Tensor.from_numpy(self.ctx, memory, "x")
        self.out = self.graph.expand(ops.scale(self.ctx, self.x, 2.0).set_output())
        self.allocr = GAllocr(Device.cpu().buffer_type)
        self.allocr.alloc_graph(self.graph)


def test_a_result_in_the_memory_of_an_operand(backend):
    memory = np.arange(8, dtype="f")
    g = Doubling(memory)
    for k in (1, 2):
        g.graph.compute(backend, result=g.out, out=memory)
        assert memory.tolist() == (np.arange(8) * 2**k).tolist()


def test_a_result_in_the_memory_of_the_indices(backend):
    g = Picking()
    ids = np.zeros(6, "i")
    ids[:2] = [3, 1]
    ctx = Context(Context.size_for(8, 8))
    graph = CGraph(ctx, 8)
    leaf = ops.view(ctx, Tensor.from_numpy(ctx, ids), (2,))
    out = graph.expand(ops.get_rows(ctx, Tensor.from_numpy(ctx, g.table), leaf).set_output())
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    graph.compute(backend, result=out, out=ids)
    assert ids.view("f").tolist() == ROWS[[3, 1]].ravel().tolist()


def test_a_result_without_a_place_for_it(backend):
    g = Doubling(np.zeros(4, "f"))
    for options in ({"result": g.out}, {"out": np.zeros(4, "f")}):
        with pytest.raises(ParameterError, match=r"^compute: result and out are given both, or none of them$"):
            g.graph.compute(backend, **options)


def test_a_leaf_alone_has_no_result_to_compute(backend):
    """A parameter is a node that no op computes: its bytes are copied."""
    ctx = Context(Context.size_for(8, 8))
    graph, data = CGraph(ctx, 8), np.arange(4, dtype="f")
    x = Tensor.from_numpy(ctx, data).set_param()
    graph.expand(x)
    out = np.zeros(4, "f")
    graph.compute(backend, result=x, out=out)
    assert out.tolist() == data.tolist()


def test_looking_at_a_result_from_another_thread(python):
    """The tensor shows its own memory, whoever wants the bytes elsewhere."""
    python("""
        import threading
        from pyggml_adapt.ggml import ops
        ctx = Context(Context.size_for(64, 64))
        graph = CGraph(ctx, 64)
        x = Tensor.from_numpy(ctx, np.ones((256, 256), 'f'))
        y = graph.expand(ops.mul_mat(ctx, x, x).set_output())
        allocr = GAllocr(Device.cpu().buffer_type)
        allocr.alloc_graph(graph)
        first = y.to_numpy()
        address, stop, n = first.ctypes.data, threading.Event(), 0
        def look():
            global n
            while not stop.is_set():
                seen = graph.node(-1).to_numpy()
                assert seen.ctypes.data == y.to_numpy().ctypes.data == address
                n += float(seen[0, 0]) == 0
        thread = threading.Thread(target=look)
        thread.start()
        backend = Backend(n_threads=1)
        for i in range(300):
            out = np.empty((256, 256), 'f')
            graph.compute(backend, result=y, out=out)
            assert out[0, 0] == 256
        stop.set()
        thread.join()
        """)


def slotted(source):
    ctx = Context(Context.size_for(64, 64))
    graph = CGraph(ctx, 64)
    slots = Slots(graph)
    leaf = slots.add(source)
    out = graph.expand(ops.scale(ctx, leaf, 1.0).set_output())
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    return slots, leaf, out


def source(value):
    ctx = Context(Context.size_for(1))
    tensor = ctx.new_tensor(Type.F32, (4,), "w")
    buffer = Buffer.allocate(Device.cpu().buffer_type, 64)
    buffer.place(tensor, 0)
    tensor.set_data(np.full(4, value, "f"))
    return tensor, buffer


def test_views_of_slots_that_are_not_in_the_graph(backend):
    (a, memory), (b, _) = source(1), source(2)
    slots, leaf, _ = slotted(a)
    other = Context(Context.size_for(64, 64))
    views = [ops.view(ctx, leaf, (2,), (), 8) for ctx in (slots.graph.ctx, other)]
    graph = CGraph(other, 64)
    out = graph.expand(ops.scale(other, views[1], 10.0).set_output())
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    slots.seal()
    graph.compute(backend)
    assert out.to_numpy().tolist() == [10, 10]
    slots.bind(TensorTable([b]))
    memory.close()
    assert [view.to_numpy().tolist() for view in views] == [[2, 2]] * 2
    views[0].set_data(np.array([5], "f"), 4)
    assert b.to_numpy().tolist() == [2, 2, 2, 5]
    graph.compute(backend)
    assert out.to_numpy().tolist() == [20, 50]


def test_asking_about_nodes_that_show_views_of_slots(backend):
    """ggml looks at the memory of operands; that of the view was freed when the slot was pointed elsewhere."""
    (a, memory), (b, _) = source(1), source(2)
    slots, leaf, _ = slotted(a)
    slots.seal()
    ctx = Context(Context.size_for(64, 64))
    graph = CGraph(ctx, 64)
    view = graph.expand(ops.view(ctx, leaf, (2,), (), 8))
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    out = ops.scale(ctx, view, 10.0)
    graph = CGraph(ctx, 64)
    graph.expand(out)
    slots.bind(TensorTable([b]))
    memory.close()
    sched = Sched([backend])
    assert backend.supports_op(out)
    assert not backend.offload_op(out)
    sched.set_tensor_backend(out, backend)
    sched.alloc_graph(graph)
    sched.compute(graph)
    assert out.to_numpy().tolist() == [20, 20]


def test_transfers_into_what_is_computed_with(backend):
    """By tensors of other Contexts, of which the graph knows nothing, and by a backend that is idle."""
    (a, memory), idle, found = source(1), Backend(n_threads=1), []
    twin = Context(Context.size_for(1)).new_tensor(Type.F32, (4,), "twin")
    memory.place(twin, 0)
    b = Tensor.from_numpy(Context(Context.size_for(1)), np.full(4, 2, "f"))

    def write(out, array):
        for transfer in (lambda: idle.set_async(twin, np.zeros(4, "f")), lambda: idle.copy_async(b, twin)):
            try:
                transfer()
            except BusyError as exc:
                found.append(str(exc))
        idle.get_async(twin, out)

    ctx = Context(Context.size_for(8, 8))
    graph = CGraph(ctx, 8)
    out = graph.expand(ops.add(ctx, ops.map_custom1(ctx, a, write), a).set_output())
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    graph.compute(backend)
    assert found == ["tensor 'twin' cannot be written: a computation uses its memory"] * 2
    assert out.to_numpy().tolist() == [2] * 4
    idle.set_async(twin, np.zeros(4, "f"))
    assert a.to_numpy().tolist() == [0] * 4


def test_a_slot_is_no_source(backend):
    slots, leaf, _ = slotted(source(1)[0])
    slots.seal()
    for tensor in (leaf, ops.view(slots.graph.ctx, leaf, (2,))):
        for use in (lambda tensor=tensor: TensorTable([tensor]), lambda tensor=tensor: slotted(tensor)):
            with pytest.raises(GGMLError, match=r"^tensor .* is a slot, or a view of one: what it shows can change$"):
                use()


def test_written_leaves_in_the_memory_of_nodes(backend):
    """An array that shows a node's memory can be another tensor's data, but what a graph writes has one name."""
    g = Doubling(np.zeros(4, "f"))
    alias = Tensor.from_numpy(g.ctx, g.out.to_numpy(), "alias")
    graph = CGraph(g.ctx, 64)
    graph.expand(g.out)
    graph.expand(ops.cpy(g.ctx, g.x, alias))
    with pytest.raises(ShapeError, match=r"^tensor 'alias' is written, and lies in the memory of 'node_0', which is c"):
        graph.compute(backend)


def written_slot():
    """Return Slots of one that the graph writes, the allocator of the graph, and a function that makes sources."""
    ctx, n = Context(Context.size_for(64, 64)), 4
    graph = CGraph(ctx, 64)
    slots = Slots(graph)

    def new_source():
        home = Context(Context.size_for(1))
        return home, Tensor.from_numpy(home, np.zeros(n, "i"))

    leaf = slots.add(new_source()[1])
    order = ops.argsort(ctx, Tensor.from_numpy(ctx, np.ones(n, "f")), 0)
    graph.expand(order.set_output())
    graph.expand(ops.cpy(ctx, order, leaf))
    return slots, GAllocr(Device.cpu().buffer_type), order, new_source


def test_a_written_slot_of_a_graph_that_is_allocated_later():
    slots, allocr, order, new_source = written_slot()
    slots.seal()
    allocr.alloc_graph(slots.graph)
    with pytest.raises(ShapeError, match=r"^Slots.bind: tensor 'node_0' is in memory of the graph's nodes, and the g"):
        slots.bind(TensorTable([order]))
    home, one = new_source()
    slots.bind(TensorTable([one]))
    home.close()
    slots.bind(TensorTable([new_source()[1]]))  # what it was bound to need not be there
    allocr.close()
    with pytest.raises(ClosedError, match=r"^GAllocr is closed$"):
        slots.bind(TensorTable([new_source()[1]]))


def test_a_written_slot_in_the_memory_of_nodes(backend):
    ctx = Context(Context.size_for(64, 64))
    graph = CGraph(ctx, 64)
    slots = Slots(graph)
    a, _ = source(1)
    leaf = slots.add(a)
    out = graph.expand(ops.scale(ctx, leaf, 3.0).set_output())
    graph.expand(ops.cpy(ctx, out, leaf))
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    slots.seal()
    alias = Tensor.from_numpy(Context(Context.size_for(1)), out.to_numpy(), "alias")
    with pytest.raises(ShapeError, match=r"^Slots.bind: tensor 'alias' is in memory of the graph's nodes, and the gra"):
        slots.bind(TensorTable([alias]))
    graph.compute(backend)
    assert a.to_numpy().tolist() == [3] * 4


def test_deep_graphs_on_a_small_stack(python):
    python("""
        import threading
        from pyggml_adapt.ggml import ops
        n = 30_000
        ctx = Context(Context.size_for(2 * n, 32768))
        graph, x = CGraph(ctx, 32768), Tensor.from_numpy(ctx, np.ones(1, 'f'))
        y = x
        for i in range(n):
            y = ops.add(ctx, x, y) if i % 2 else ops.scale(ctx, y, 0.5)
        done = []
        def build():
            graph.expand(y.set_output())
            graph.expand(ops.neg(ctx, y).set_output())
            done.append(len(graph))
        threading.stack_size(256 << 10)
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        assert done == [n + 1], done
        GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
        graph.compute(Backend(n_threads=1))
        assert abs(float(y.to_numpy()[0]) - 2) < 1e-6
        """)


def test_deep_graphs_have_ggml_s_order():
    """Operands are added one by one, where ggml would have visited them."""

    orders = []
    for n_idle in (0, 3000):
        ctx = Context(Context.size_for(5000, 4096))
        graph = CGraph(ctx, 4096)
        x = y = ctx.new_tensor(Type.F32, (4,), "x")
        for _ in range(n_idle):
            ctx.new_tensor(Type.F32, (1,))
        for _ in range(40):
            a, b = ops.scale(ctx, y, 2.0), ops.neg(ctx, x)
            y = ops.add(ctx, ops.mul(ctx, a, b), a)
            graph.expand(ops.sqr(ctx, b))
        graph.expand(y)
        orders.append([(node.name, node.op, [each.name for each in node.src]) for node in graph])
    assert orders[0] == orders[1] and len(orders[0]) == 200


@pytest.mark.parametrize("kind", [Context, Buffer, Tensor, CGraph, Sched, GAllocr, Slots, TensorTable, GraphPlan])
def test_classes_that_cannot_be_derived_from(kind):
    """What they say of themselves is what C code relies on."""
    with pytest.raises(TypeError, match=r"is not an acceptable base type$"):
        type("Derived", (kind,), {})


def test_two_threads_with_one_graph(backend):
    """Either computes, or is told that the other does."""
    g, errors = Picking().alloc(), []

    def work():
        for _ in range(200):
            try:
                g.graph.compute(backend)
            except BusyError:
                pass
            except (ClosedError, IndexRangeError) as exc:
                errors.append(exc)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    g.graph.compute(backend)
    assert g.picked.to_numpy().tolist() == ROWS[[2, 0]].tolist()


def test_marks_and_hints(backend):
    """ggml looks at them while it computes."""
    g = Picking()
    product, q = ops.mul_mat(g.ctx, g.rows, g.rows), g.ctx.new_tensor(Type.F32, (8, 1))
    attention = ops.flash_attn_ext(g.ctx, q, q, q, None, 1.0)
    turned = ops.rope(g.ctx, q, Tensor.from_numpy(g.ctx, np.zeros(1, "i")), 4, RopeType.NORMAL)
    loss = ops.sum(g.ctx, g.picked)
    raised = []

    def meanwhile():
        for use in (
            lambda: g.picked.set_output(),
            lambda: g.leaf.set_input(),
            lambda: g.leaf.set_param(),
            lambda: loss.set_loss(),
            lambda: ops.mul_mat_set_hint(product, OpHint.NONE),
            lambda: ops.prec_set_acc(product, Prec.F32),
            lambda: ops.prec_set_src(product, Prec.F16, 1),
            lambda: ops.rope_set_offset(turned, 2),
            lambda: ops.flash_attn_ext_set_n_kv_max(attention, 1),
        ):
            with pytest.raises(BusyError, match=r"^Context is in use by a computation that has not ended$"):
                use()
            raised.append(use)

    g.meanwhile = meanwhile
    g.alloc().graph.compute(backend)
    assert len(raised) == 9


def test_allocating_a_graph_of_nodes_that_are_computed(backend):
    """It would take the indices that these compute with meanwhile for the graph's."""
    g, raised = Picking(), []
    graph = g.alloc().graph.dup(Context(Context.size_for(64, 256)))
    scheds = Sched([backend]), Sched([backend])

    def meanwhile():
        for use in (
            lambda: scheds[0].alloc_graph(graph),
            lambda: scheds[1].reserve(graph),
            lambda: GAllocr(Device.cpu().buffer_type).alloc_graph(graph),
        ):
            with pytest.raises(BusyError, match=r"^Context is in use by a computation that has not ended$"):
                use()
            raised.append(use)

    g.meanwhile = meanwhile
    g.graph.compute(backend)
    assert len(raised) == 3


@pytest.mark.parametrize("how", ["graph", "sched"])
def test_a_graph_that_writes_where_another_computes(backend, how):
    """As a slot that was pointed there does."""
    order = ops.argsort((g := Picking()).ctx, Tensor.from_numpy(g.ctx, np.arange(4, dtype="f")), 0)
    g.graph.expand(order)
    g.alloc()
    ctx = Context(Context.size_for(64, 64))
    graph = CGraph(ctx, 64)
    slots = Slots(graph)
    leaf = slots.add(Tensor.from_numpy(Context(Context.size_for(1)), np.zeros(4, "i")))
    graph.expand(ops.cpy(ctx, Tensor.from_numpy(ctx, np.full(4, 1 << 28, "i")), leaf))
    sched, own = Sched([Backend(n_threads=1)]), Backend(n_threads=1)
    if how == "sched":
        sched.alloc_graph(graph)
    else:
        GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    slots.seal()
    raised = []

    def meanwhile():
        slots.bind(TensorTable([order]))
        with pytest.raises(BusyError, match=r"^compute: the graph writes into memory of a GAllocr that another comput"):
            sched.compute(graph) if how == "sched" else graph.compute(own)
        raised.append(how)

    g.meanwhile = meanwhile
    g.graph.compute(backend)
    assert raised == [how]
    assert order.to_numpy().tolist() == [0, 1, 2, 3]
    sched.compute(graph) if how == "sched" else graph.compute(own)
    assert order.to_numpy().tolist() == [1 << 28] * 4


def test_a_slot_that_shows_a_node_of_its_graph(backend):
    """Were it written, nobody would know what the node holds."""
    ctx = Context(Context.size_for(64, 128))
    order = ops.argsort(ctx, Tensor.from_numpy(ctx, np.arange(4, dtype="f")), 0)
    first, graph = CGraph(ctx, 64), CGraph(ctx, 64)
    first.expand(order.set_output())
    GAllocr(Device.cpu().buffer_type).alloc_graph(first)
    slots = Slots(graph)
    leaf = slots.add(order)
    graph.expand(order)
    graph.expand(ops.cpy(ctx, Tensor.from_numpy(ctx, np.full(4, 1 << 28, "i")), leaf))
    GAllocr(Device.cpu().buffer_type).alloc_graph(graph)
    slots.seal()
    with pytest.raises(ShapeError, match=r"^tensor '.*' is written, and lies in the memory of 'node_0', which is comp"):
        graph.compute(backend)


def test_a_tensor_that_is_placed_while_others_are_written():
    """The buffer, a read-only one, was not there when owners were looked at."""
    ctx = Context(Context.size_for(4))
    large, small = ctx.new_tensor(Type.I8, (1 << 25,)), ctx.new_tensor(Type.F32, (4,))
    Buffer.allocate(Device.cpu().buffer_type, large.nbytes).place(large, 0)
    readonly, data = Buffer.from_mapping(bytes(64)), np.zeros(1 << 25, "b")
    going = threading.Event()
    other = threading.Thread(target=lambda: going.wait() and readonly.place(small, 0))
    other.start()
    going.set()  # the other runs as soon as the GIL is free, which it is while data is copied
    with pytest.raises((BusyError, DTypeError), match=r"was placed in a buffer after this call had|read-only mapping$"):
        ctx.set_data((*[large] * 20, small), (*[data] * 20, np.ones(4, "f")))
    other.join()
