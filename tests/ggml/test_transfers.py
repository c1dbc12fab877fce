"""Bytes in and out of tensors: pieces, copies, asynchronous transfers; whole Contexts in one buffer; devices."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import (
    AllocError,
    BackendError,
    BusyError,
    ClosedError,
    DTypeError,
    FileAccessError,
    ShapeError,
)
from pyggml_adapt.ggml import (
    Backend,
    Buffer,
    BufferUsage,
    CGraph,
    Context,
    Device,
    Event,
    GAllocr,
    Tensor,
    Type,
    ops,
)

X = np.arange(12, dtype="f").reshape(3, 4)


@pytest.fixture
def ctx():
    return Context(Context.size_for(32))


@pytest.fixture
def pair(ctx):
    a, b = (ctx.new_tensor(Type.F32, (4, 3), name) for name in "ab")
    ctx.alloc_tensors(Device.cpu().buffer_type)
    a.set_data(X)
    b.memset(0)
    return a, b


def readonly(ctx):
    array = X.copy()
    array.flags.writeable = False
    return Tensor.from_numpy(ctx, array, "r")


def test_alloc_tensors(ctx):
    a, b = ctx.new_tensor(Type.F32, (4,)), ctx.new_tensor(Type.Q8_0, (32,))
    view = ops.view(ctx, a, (2,))
    with ctx.alloc_tensors(Device.cpu().buffer_type) as buffer:
        assert a.is_allocated and b.is_allocated
        a.set_data(X[0])
        assert view.to_numpy().tolist() == [0, 1]
        assert buffer.nbytes >= 16 + 34
        array = a.to_numpy()
        with pytest.raises(BusyError, match=r"^Buffer cannot be closed: 1 array"):
            buffer.close()
        del array
        with pytest.raises(ShapeError, match=r"^alloc_tensors: no tensor of the Context needs memory$"):
            ctx.alloc_tensors(Device.cpu().buffer_type)
        c = ctx.new_tensor(Type.F32, (4,))
        ctx.alloc_tensors(Device.cpu().buffer_type).close()
    with pytest.raises(ClosedError):
        a.to_numpy()
    with pytest.raises(ClosedError):
        c.to_numpy()


def test_alloc_tensors_preconditions(ctx):
    with pytest.raises(ShapeError, match=r"^alloc_tensors: no tensor of the Context needs memory$"):
        ctx.alloc_tensors(Device.cpu().buffer_type)
    with pytest.raises(TypeError):
        ctx.alloc_tensors(None)
    other = Context(Context.size_for(4))
    view = ops.view(other, ctx.new_tensor(Type.F32, (4,)), (2,))
    view.name = "v"
    other.new_tensor(Type.F32, (4,))
    with pytest.raises(ShapeError, match=r"^alloc_tensors: 'v' is a view of a tensor without data$"):
        other.alloc_tensors(Device.cpu().buffer_type)
    huge = Context(Context.size_for(4))
    huge.new_tensor(Type.F32, (1 << 20, 1 << 20))
    with pytest.raises(AllocError, match=r"^no memory for \d+ bytes of CPU memory"):
        huge.alloc_tensors(Device.cpu().buffer_type)
    ctx.close()
    with pytest.raises(ClosedError, match=r"^Context is closed$"):
        ctx.alloc_tensors(Device.cpu().buffer_type)


def test_memset(ctx, pair):
    a, _ = pair
    a.memset(255, 4, 4)
    assert np.isnan(a.to_numpy()[0, 1]) and a.to_numpy()[0, 2] == 2
    a.memset(0, 16)
    assert a.to_numpy()[1:].sum() == 0
    a.memset(1, 48)
    for offset, size in ((49, None), (0, 49), (1 << 63, 1 << 63)):
        with pytest.raises(ShapeError, match=r"^tensor 'a' has 48 bytes, not"):
            a.memset(0, offset, size)
    with pytest.raises(OverflowError):
        a.memset(256)
    with pytest.raises(DTypeError, match=r"^tensor 'r' is in a read-only mapping$"):
        readonly(ctx).memset(0)
    with pytest.raises(ClosedError, match="has no data"):
        ctx.new_tensor(Type.F32, (4,)).memset(0)


def test_pieces(ctx, pair):
    """A column of the tensor, from every second number of the buffer."""
    _, b = pair
    b.set_2d(np.arange(5, dtype="f"), 8, 4, 3, 16, 8)
    assert b.to_numpy()[:, 2].tolist() == [0, 2, 4]
    assert b.to_numpy()[:, [0, 1, 3]].sum() == 0
    out = np.full(5, 7, "f")
    assert b.get_2d(out, 8, 4, 3, 16, 8) is out
    assert out.tolist() == [0, 7, 2, 7, 4]
    b.set_2d(b"", 0, 0, 5, 8, 0)
    b.set_2d(b"", 1 << 60, 4, 0, 1 << 63, 1 << 63)
    far = (1 << 64) - 1
    for args in ((12, 4, 3, 20, 4), (49, 0, 1, 0, 0), (0, 4, 2, far, 4), (far, far, far, far, far)):
        with pytest.raises(ShapeError, match=r"^tensor 'b': \d+ pieces end at byte \d+ of 48 of the tensor$"):
            b.set_2d(bytes(48), *args)
        with pytest.raises(ShapeError, match=r"of the tensor$"):
            b.get_2d(bytearray(48), *args)
    with pytest.raises(ShapeError, match=r"^tensor 'b': 3 pieces end at byte 12 of 8 of the buffer$"):
        b.set_2d(bytes(8), 0, 4, 3, 4, 4)
    with pytest.raises(BufferError):
        b.get_2d(bytes(8), 0, 4, 2, 4, 4)
    with pytest.raises(DTypeError, match="read-only"):
        readonly(ctx).set_2d(bytes(8), 0, 4, 2, 4, 4)


def test_copies(ctx, pair):
    a, b = pair
    b.copy_from(a)
    np.testing.assert_array_equal(b.to_numpy(), X)
    a.copy_from(a)
    b.memset(0)
    ops.view(ctx, b, (4,)).copy_from(ops.view(ctx, a, (4,), (), 32))
    np.testing.assert_array_equal(b.to_numpy()[0], X[2])
    t = ops.transpose(ctx, a)
    t.copy_from(ops.transpose(ctx, b))
    np.testing.assert_array_equal(a.to_numpy(), b.to_numpy())
    with pytest.raises(ShapeError, match=r"differ in type, shape or strides$"):
        b.copy_from(t)
    with pytest.raises(ShapeError, match=r"^copy: between the elements of .* are others$"):
        ops.view(ctx, a, (2, 3), (16,)).copy_from(ops.view(ctx, b, (2, 3), (16,)))
    with pytest.raises(ShapeError, match=r"overlap$"):
        ops.view(ctx, a, (4,)).copy_from(ops.view(ctx, a, (4,), (), 4))
    with pytest.raises(DTypeError, match="read-only"):
        readonly(ctx).copy_from(a)
    with pytest.raises(ClosedError, match="has no data"):
        ctx.new_tensor(Type.F32, (4, 3)).copy_from(a)
    a.copy_from(readonly(ctx))


def test_async(ctx, pair, backend):
    a, b = pair
    backend.set_async(b, X * 2)
    out = np.zeros(4, "f")
    assert backend.get_async(b, out, 16) is out
    backend.copy_async(b, a)
    backend.synchronize()
    assert out.tolist() == [8, 10, 12, 14]
    np.testing.assert_array_equal(a.to_numpy(), X * 2)
    for use in (
        lambda: backend.set_async(a, bytes(49)),
        lambda: backend.get_async(a, bytearray(4), 45),
        lambda: backend.copy_async(a, ops.view(ctx, b, (4,))),
    ):
        with pytest.raises(ShapeError):
            use()
    with pytest.raises(BufferError):
        backend.get_async(a, b"1234")
    with pytest.raises(DTypeError, match="read-only"):
        backend.set_async(readonly(ctx), X)
    with pytest.raises(DTypeError, match="read-only"):
        backend.copy_async(a, readonly(ctx))
    with Backend(n_threads=1) as other:
        backend.copy_async(a, b, other)
    for use in (lambda: other.set_async(a, X), other.synchronize, lambda: backend.copy_async(a, b, other)):
        with pytest.raises(ClosedError, match=r"^Backend is closed$"):
            use()
    ctx.close()
    with pytest.raises(ClosedError):
        backend.set_async(a, X)


def test_compute_async(backend):
    ctx = Context(Context.size_for(8, 8))
    graph, allocr = CGraph(ctx, 8), GAllocr(Device.cpu().buffer_type)
    x = ctx.new_tensor(Type.F32, (4, 3)).set_input()
    y = graph.expand(ops.scale(ctx, x, 2.0).set_output())
    allocr.reserve(graph)
    assert allocr.nbytes >= 48 and not x.is_allocated
    allocr.alloc_graph(graph)
    with pytest.raises(BackendError, match=r"^reserve: this allocator serves a graph already$"):
        allocr.reserve(graph)
    x.set_data(X)
    graph.compute_async(backend)
    backend.synchronize()
    np.testing.assert_array_equal(y.to_numpy(), X * 2)
    ctx.close()
    with pytest.raises(ClosedError):
        graph.compute_async(backend)


def test_buffers(ctx):
    buffer = Buffer.allocate(Device.cpu().buffer_type, 64)
    a = ctx.new_tensor(Type.F32, (4,))
    buffer.place(a, 0)
    buffer.clear(255)
    assert np.isnan(a.to_numpy()).all()
    buffer.clear()
    assert a.to_numpy().tolist() == [0] * 4
    assert (buffer.name, buffer.usage, buffer.buffer_type.name) == ("CPU", BufferUsage.ANY, "CPU")
    buffer.usage = BufferUsage.WEIGHTS
    assert buffer.usage is BufferUsage.WEIGHTS
    for bad in (3, -1):
        with pytest.raises(ValueError, match="is not a valid BufferUsage"):
            buffer.usage = bad
    with pytest.raises(DTypeError, match=r"^clear: the buffer is a read-only mapping$"):
        Buffer.from_mapping(bytes(64)).clear()
    buffer.close()
    for use in (buffer.clear, lambda: buffer.name, lambda: buffer.usage, lambda: buffer.buffer_type):
        with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
            use()


def test_devices(ctx, tmp_path):
    cpu = Device.by_name("CPU")
    assert cpu.name == "CPU" and Device.by_name("none") is None
    props = cpu.props
    assert [props[each] for each in ("name", "async", "events", "buffer_from_host_ptr")] == ["CPU", False, False, True]
    assert props["memory_total"] >= props["memory_free"] > 0
    assert cpu.host_buffer_type is None
    x = ctx.new_tensor(Type.F32, (4,))
    node = ops.silu(ctx, x)
    assert cpu.supports_op(node) and not cpu.offload_op(node)
    with Backend(n_threads=1) as backend:
        assert backend.supports_op(node) and not backend.offload_op(node)
        assert backend.supports_buft(cpu.buffer_type) and cpu.supports_buft(cpu.buffer_type)
    buft = cpu.buffer_type
    assert buft.max_size >= 1 << 40 and buft.alloc_size(x) == 16
    assert buft.device is None  # ggml says so of the CPU's memory
    with pytest.raises(BackendError, match=r"^device CPU has no events$"):
        Event(cpu)
    with pytest.raises(FileAccessError, match=r"absent.so: no such file or directory$"):
        Device.load(tmp_path / "absent.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(BackendError, match=r"text.so: no backend of ggml"):
        Device.load(tmp_path / "text.so")
    Device.load(tmp_path)  # has none either, which ggml does not tell


def test_pieces_that_do_not_advance():
    """ggml would count them, one by one and without the GIL."""
    t = Tensor.from_numpy(Context(Context.size_for(1)), np.zeros(4, "f"))
    t.set_2d(b"", 0, 0, 1 << 60, 0, 0)
    with pytest.raises(ShapeError, match=r"^tensor '': pieces of 4 bytes overlap, 0 and 0 bytes apart$"):
        t.set_2d(b"abcd", 0, 4, 1 << 60, 0, 0)


def test_a_tensor_that_is_none():
    for use in (lambda t: t.set_data(b""), lambda t: t.get_data(bytearray()), lambda t: t.memset(0)):
        with pytest.raises(ClosedError, match=r"^the Context of this Tensor is closed$"):
            use(Tensor.__new__(Tensor))


def test_a_size_that_changes():
    class Size:
        n = 0

        def __index__(self):
            Size.n += 1
            return 4 if Size.n == 1 else 1 << 36

        __int__ = __index__

    t = Tensor.from_numpy(Context(Context.size_for(1)), np.zeros(4, "f"))
    t.memset(1, 0, Size())
    assert t.to_numpy().view("u1").sum() == 4
