"""Context and Tensor: shapes, data, and who keeps whom alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

from pyggml_adapt.errors import AllocError, ClosedError, DTypeError, ParameterError, ShapeError
from pyggml_adapt.ggml import (
    Backend,
    Buffer,
    CGraph,
    Context,
    Device,
    Sched,
    Tensor,
    Threadpool,
    Type,
    ops,
)


@pytest.fixture
def ctx():
    with Context(Context.size_for(32)) as ctx:
        yield ctx


@pytest.fixture
def buffer():
    with Buffer.allocate(Device.cpu().buffer_type, 1 << 16, clear=True) as buffer:
        yield buffer


def test_new_tensor(ctx):
    t = ctx.new_tensor(Type.F16, (4, 3), "w")
    assert (t.name, t.type, t.op, t.ctx) == ("w", Type.F16, "NONE", ctx)
    assert t.ne == (4, 3, 1, 1)
    assert t.nb == (2, 8, 24, 24)
    assert t.nbytes == 24
    assert t.is_contiguous
    assert not t.is_transposed
    assert not t.is_allocated
    assert repr(t) == "<Tensor 'w' F16 [4, 3, 1, 1], no data>"
    t.name = "ü" * 31
    assert t.name == "ü" * 31
    u = ops.transpose(ctx, t)
    assert (u.op, u.is_transposed, u.is_contiguous) == ("TRANSPOSE", True, False)


def test_names_that_ggml_cannot_hold(ctx):
    t = ctx.new_tensor(Type.F32, (1,), "t")

    def rename(name):
        t.name = name

    for name, why in (("a\0b", "has a NUL"), ("\ud800", "is no UTF-8")):
        for use in (ctx.tensor, rename, lambda name: ctx.new_tensor(Type.F32, (1,), name)):
            with pytest.raises(ParameterError) as caught:
                use(name)
            assert str(caught.value) == f"tensor name {name!r} {why}"
    assert t.name == "t"


INTEGERS = {
    "mem_size": lambda ctx, n: Context(n).mem_size,
    "ne": lambda ctx, n: ctx.new_tensor(Type.F32, (n, 3)).ne,
    "graph": lambda ctx, n: CGraph(ctx, n).size,
    "sched": lambda ctx, n: Sched([Backend()], n).graph_size,
    "n_threads": lambda ctx, n: Threadpool(n).n_threads,
    "top_k": lambda ctx, n: ops.top_k(ctx, ctx.new_tensor(Type.F32, (4, 3)), n).ne,
    "view": lambda ctx, n: ops.view(ctx, ctx.new_tensor(Type.F32, (4, 3)), (n,)).ne,
    "buffer": lambda ctx, n: Buffer.allocate(Device.cpu().buffer_type, n).nbytes,
}


@pytest.mark.parametrize("call", INTEGERS.values(), ids=INTEGERS)
def test_integers_are_not_cut(ctx, call):
    """A C integer is made of what Python takes for an index, not of whatever int() takes."""
    for value in (2, np.int64(2), np.uint8(2), np.array(2), True):
        call(ctx, value)
    for value in (2.5, 2.0, np.float32(2), "2"):
        with pytest.raises(TypeError, match="integer"):
            call(ctx, value)


@pytest.mark.parametrize(
    "ne, message",
    [
        ((), "new_tensor: 0 dimensions, not 1 to 4"),
        ((1,) * 5, "new_tensor: 5 dimensions, not 1 to 4"),
        ((-1,), "new_tensor: impossible shape [-1]"),
        ((1 << 31, 1 << 31), f"new_tensor: impossible shape {[1 << 31, 1 << 31]}"),
        ((1 << 63,), f"new_tensor: impossible shape {[1 << 63]}"),
        ((0, 1 << 62), f"new_tensor: impossible shape {[0, 1 << 62]}"),
    ],
)
def test_impossible_shapes(ctx, ne, message):
    with pytest.raises(ShapeError) as caught:
        ctx.new_tensor(Type.F32, ne)
    assert str(caught.value) == message


def test_new_tensor_preconditions(ctx):
    with pytest.raises(ShapeError, match=r"^new_tensor: ne0 = 33 is not a multiple of Q8_0's block size$"):
        ctx.new_tensor(Type.Q8_0, (33,))
    with pytest.raises(ShapeError, match=r"^tensor name 'x+' has 64 bytes; ggml takes 63$"):
        ctx.new_tensor(Type.F32, (1,), "x" * 64)
    with pytest.raises(ValueError, match=r"is not a valid Type"):
        ctx.new_tensor(4, (1,))
    with pytest.raises(TypeError):
        ctx.new_tensor(Type.F32, ("a",))


@pytest.mark.parametrize("size", [0, 1, 100])
def test_tiny_contexts_are_full(size):
    with pytest.raises(AllocError, match=rf"^Context of {size} bytes is full: 0 bytes are used$"):
        Context(size).new_tensor(Type.F32, (1,))


def test_a_context_larger_than_memory():
    with pytest.raises(AllocError, match=rf"^Context: no memory for {1 << 62} bytes of tensor metadata$"):
        Context(1 << 62)


def test_data(ctx, buffer):
    t = ctx.new_tensor(Type.F32, (4, 3), "t")
    x = np.arange(12, dtype="f").reshape(3, 4)
    buffer.place(t, 256)
    t.set_data(x)
    np.testing.assert_array_equal(t.to_numpy(), x)
    t.set_data(b"\0" * 16, 16)
    x[1] = 0
    out = np.empty(8, "f")
    assert t.get_data(out, 16) is out
    np.testing.assert_array_equal(out, x.ravel()[4:])
    row = ops.view(ctx, t, (4,), (), 32)  # made after its base was placed
    row.set_data(np.full(4, 7, "f"))
    np.testing.assert_array_equal(t.to_numpy()[2], np.full(4, 7, "f"))
    np.testing.assert_array_equal(row.to_numpy(), np.full(4, 7, "f"))


def test_several_tensors_are_set_together(ctx, buffer):
    a, b = ctx.new_tensor(Type.I32, (2,), "a"), ctx.new_tensor(Type.F32, (3,), "b")
    buffer.place(a, 0)
    buffer.place(b, 4096)
    ctx.set_data((a, b), (np.array([4, 5], np.int32), memoryview(np.array([1, 2, 3], np.float32))))
    assert (a.to_numpy().tolist(), b.to_numpy().tolist()) == ([4, 5], [1.0, 2.0, 3.0])
    with pytest.raises(ShapeError, match=r"^set_data: 1 buffers for 2 tensors$"):
        ctx.set_data((a, b), (bytes(8),))
    with pytest.raises(ShapeError, match=r"^tensor 'b' has 12 bytes, not 16 at offset 0$"):
        ctx.set_data((a, b), (bytes(8), bytes(16)))
    with pytest.raises(ClosedError, match=r"^tensor 'c' has no data: it is not allocated$"):
        ctx.set_data((ctx.new_tensor(Type.I32, (1,), "c"),), (bytes(4),))
    with pytest.raises(TypeError):
        ctx.set_data((a, None), (bytes(8), bytes(4)))
    other = Context(Context.size_for(1))
    with pytest.raises(ShapeError, match=r"^set_data: <Tensor 'a' .*> belongs to another Context$"):
        other.set_data((a,), (bytes(8),))
    buffer.close()
    with pytest.raises(ClosedError, match="closed"):
        ctx.set_data((a,), (bytes(8),))


@pytest.mark.parametrize(
    "code, type",
    [
        ("f", Type.F32),
        ("e", Type.F16),
        ("d", Type.F64),
        ("b", Type.I8),
        ("h", Type.I16),
        ("i", Type.I32),
        ("q", Type.I64),
    ],
)
def test_to_numpy_types(ctx, buffer, code, type):
    t, x = ctx.new_tensor(type, (3, 2)), np.arange(6, dtype=code).reshape(2, 3)
    buffer.place(t, 0)
    t.set_data(x)
    assert t.to_numpy().dtype == x.dtype
    np.testing.assert_array_equal(t.to_numpy(), x)


def test_to_numpy_of_blocks(ctx, buffer):
    t = ctx.new_tensor(Type.Q8_0, (64, 3))
    buffer.place(t, 0)
    assert t.to_numpy().shape == (3, 68)
    assert t.to_numpy().dtype == np.uint8


def test_data_preconditions(ctx, buffer):
    t = ctx.new_tensor(Type.F32, (4, 3), "t")
    with pytest.raises(ClosedError, match=r"^tensor 't' has no data: it is not allocated$"):
        t.set_data(b"")
    with pytest.raises(ClosedError, match=r"^tensor 't' has no data: it is not allocated$"):
        t.to_numpy()
    buffer.place(t, 0)
    for offset, n in ((0, 49), (48, 1), (49, 0), ((1 << 64) - 1, 2)):
        with pytest.raises(ShapeError, match=rf"^tensor 't' has 48 bytes, not {n} at offset {offset}$"):
            t.set_data(b"\0" * n, offset)
        with pytest.raises(ShapeError, match=rf"^tensor 't' has 48 bytes, not {n} at offset {offset}$"):
            t.get_data(bytearray(n), offset)
    with pytest.raises(BufferError):
        t.get_data(b"\0" * 4)
    with pytest.raises((BufferError, ValueError)):
        t.set_data(np.zeros((4, 6), "f")[:, ::2])


def test_read_only_mapping(ctx, python):
    backing = np.zeros(64 + 64, "u1")
    start = -backing.ctypes.data % 64
    view = memoryview(backing)[start : start + 64].toreadonly()
    with Buffer.from_mapping(view) as buffer:
        t = ctx.new_tensor(Type.F32, (4,), "t")
        buffer.place(t, 0)
        with pytest.raises(DTypeError, match=r"^tensor 't' is in a read-only mapping$"):
            t.set_data(b"\0")
        with pytest.raises(DTypeError, match=r"is in a read-only mapping$"):
            ops.view(ctx, t, (2,)).set_data(b"\0")
    python("""
        import mmap
        ctx = Context(Context.size_for(8, 8))
        buffer = Buffer.from_mapping(mmap.mmap(-1, 4096, prot=mmap.PROT_READ))
        t, ids = ctx.new_tensor(Type.F32, (4, 3)), ctx.new_tensor(Type.I32, (1,)).set_input()
        buffer.place(t, 0)
        try:
            t.set_data(b"x")
        except DTypeError:
            pass
        graph, backend = CGraph(ctx, 8), Backend(n_threads=1)
        graph.expand(ops.set_rows(ctx, t, ctx.new_tensor(Type.F32, (4, 1)).set_input(), ids))
        allocr = GAllocr(backend.device.buffer_type)
        allocr.alloc_graph(graph)
        ids.set_data(np.zeros(1, "i"))
        try:
            graph.compute(backend)
        except DTypeError as exc:
            assert "is in a read-only mapping" in str(exc), exc
        else:
            raise SystemExit("written to a read-only mapping")
        """)


def test_views_keep_their_owners_alive(buffer):
    ctx = Context(Context.size_for(4))
    t = ctx.new_tensor(Type.F32, (4,))
    own = Buffer.allocate(Device.cpu().buffer_type, 64, clear=True)
    own.place(t, 0)
    ctx_ref, own_ref = weakref.ref(ctx), weakref.ref(own)
    del ctx, own
    gc.collect()
    assert t.to_numpy().tolist() == [0, 0, 0, 0]
    assert ctx_ref() is t.ctx
    del t
    gc.collect()
    assert ctx_ref() is own_ref() is None


def test_an_op_keeps_its_operands_alive():
    other = Context(Context.size_for(4))
    ctx = Context(Context.size_for(4))
    result = ops.scale(ctx, other.new_tensor(Type.F32, (4,)), 2)
    ref = weakref.ref(other)
    del other
    gc.collect()
    assert ref() is not None
    del result, ctx
    gc.collect()
    assert ref() is None


def test_contexts_that_use_each_other_are_collected():
    a, b = Context(Context.size_for(4)), Context(Context.size_for(4))
    ops.scale(b, ops.scale(a, ops.scale(b, a.new_tensor(Type.F32, (4,)), 2), 2), 2)
    ref = weakref.ref(a)
    del a, b
    gc.collect()
    assert ref() is None


def test_closed(ctx, buffer):
    t = ctx.new_tensor(Type.F32, (4,), "t")
    buffer.place(t, 0)
    buffer.close()
    with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
        t.to_numpy()
    with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
        t.set_data(b"")
    ctx.close()
    ctx.close()
    assert ctx.closed
    assert repr(t) == "<Tensor of a closed Context>"
    for use in (
        lambda: t.ne,
        lambda: t.name,
        lambda: t.op,
        lambda: t.to_numpy(),
        lambda: t.set_input(),
        lambda: t.type,
    ):
        with pytest.raises(ClosedError, match=r"^the Context of this Tensor is closed$"):
            use()
    with pytest.raises(ClosedError, match=r"^Context is closed$"):
        ctx.new_tensor(Type.F32, (4,))
    with pytest.raises(ClosedError, match=r"^Context is closed$"), ctx:
        pass


def test_a_view_whose_base_was_closed(ctx):
    other = Context(Context.size_for(4))
    base = other.new_tensor(Type.F32, (4,))
    Buffer.allocate(Device.cpu().buffer_type, 64, clear=True).place(base, 0)
    view = ops.view(ctx, base, (2,))
    other.close()
    with pytest.raises(ClosedError, match=r"^Context is closed$"):
        view.to_numpy()


def test_views_cannot_be_made_by_hand():
    with pytest.raises(TypeError, match=r"^tensors come from Context.new_tensor or from an op$"):
        Tensor()
    stray = Tensor.__new__(Tensor)
    with pytest.raises(ClosedError, match=r"^the Context of this Tensor is closed$"):
        stray.ne
    assert repr(stray) == "<Tensor of a closed Context>"


def test_owners_cannot_be_copied(ctx):
    for each in (ctx, ctx.new_tensor(Type.F32, (1,)), Device.cpu()):
        with pytest.raises(TypeError):
            copy.copy(each)
        with pytest.raises(TypeError):
            pickle.dumps(each)


def test_memory_stays_flat(python):
    out = python("""
        import resource
        backend = Backend(n_threads=1)
        def cycle():
            ctx = Context(Context.size_for(64, 64))
            x, graph = ctx.new_tensor(Type.F32, (64, 64)).set_input(), CGraph(ctx, 64)
            graph.expand(ops.silu(ctx, x))
            allocr = GAllocr(backend.device.buffer_type)
            allocr.alloc_graph(graph)
            x.set_data(np.ones((64, 64), "f"))
            graph.compute(backend)
            buffer = Buffer.allocate(backend.device.buffer_type, 1 << 16, clear=True)
            with Context(Context.size_for(2)) as other:
                buffer.place(other.new_tensor(Type.F32, (64,)), 0)
            return TensorTable([x])
        def rss():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()
        for _ in range(100):
            cycle()
        before = rss()
        for _ in range(1000):
            cycle()
        print((rss() - before) // 1024)
        """)
    assert int(out) < 512  # KiB; 1,000 leaked contexts would be 40 MiB
