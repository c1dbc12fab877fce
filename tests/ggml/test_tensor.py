"""Tensors as NumPy users meet them: arrays that show their memory, DLPack, operators, repr."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from pyggml_adapt.errors import BusyError, ClosedError, DTypeError, ShapeError
from pyggml_adapt.ggml import Backend, Buffer, CGraph, Context, Device, GAllocr, Tensor, Type, ops

X = np.arange(12, dtype="f").reshape(3, 4)


@pytest.fixture
def ctx():
    return Context(Context.size_for(64, 64))


def compute(backend: Backend, ctx: Context, *outs: Tensor) -> list[np.ndarray]:
    graph = CGraph(ctx, 64)
    for out in outs:
        graph.expand(out.set_output())
    GAllocr(backend.device.buffer_type).alloc_graph(graph)
    graph.compute(backend)
    return [out.to_numpy() for out in outs]


@pytest.mark.parametrize("code", "fedbhiq")
def test_from_numpy_shares_memory_both_ways(ctx, code):
    x = np.arange(6, dtype=code).reshape(2, 3)
    t = Tensor.from_numpy(ctx, x, "x")
    assert (t.name, t.ne, t.shape, t.nelements) == ("x", (3, 2, 1, 1), (2, 3), 6)
    y = t.to_numpy()
    assert y.dtype == x.dtype and np.shares_memory(x, y)
    x[1, 2] = 77
    assert y[1, 2] == 77
    y[0, 0] = 5
    assert x[0, 0] == 5


def test_an_array_at_any_address_can_be_shared(ctx):
    x = np.zeros(65, "f")
    for start in range(1, 9):
        t = Tensor.from_numpy(ctx, x[start:])
        t.set_data(np.full(65 - start, start, "f"))
        assert x[start] == x[64] == start and np.shares_memory(t.to_numpy(), x)
    assert x[0] == 0


def test_a_read_only_array_stays_read_only(ctx, backend):
    x = X.copy()
    x.flags.writeable = False
    t = Tensor.from_numpy(ctx, x, "x")
    assert repr(t) == "<Tensor 'x' F32 [4, 3, 1, 1], 48 bytes of CPU_Mapped, read-only>"
    y = t.to_numpy()
    assert not y.flags.writeable and np.shares_memory(x, y)
    with pytest.raises(ValueError, match="read-only"):
        y[0, 0] = 1
    with pytest.raises(DTypeError, match=r"^tensor 'x' is in a read-only mapping$"):
        t.set_data(X)
    with pytest.raises(BufferError, match=r"^tensor 'x' is in a read-only mapping$"):
        t.get_data(t)  # a tensor is no buffer to write into, if it is read-only
    assert compute(backend, ctx, t * 2.0)[0].tolist() == (X * 2).tolist()


def test_the_array_keeps_what_it_shows_alive():
    x, ctx = X.copy(), Context(Context.size_for(1))
    ref = weakref.ref(x)
    y = Tensor.from_numpy(ctx, x).to_numpy()
    del x, ctx
    gc.collect()
    assert ref() is not None and y.tolist() == X.tolist()
    del y
    gc.collect()
    assert ref() is None


def test_memory_that_an_array_shows_cannot_be_freed(ctx, backend):
    t = Tensor.from_numpy(ctx, X)
    graph = CGraph(ctx, 8)
    y = graph.expand(ops.scale(ctx, t, 3.0))
    allocr = GAllocr(backend.device.buffer_type)
    allocr.alloc_graph(graph)
    graph.compute(backend)
    shown, view = y.to_numpy(), memoryview(y)
    with pytest.raises(BusyError, match=r"^GAllocr cannot be closed: 2 array\(s\) still show its memory$"):
        allocr.close()
    view.release()
    ctx.close()  # the tensor is gone, the memory is not
    assert shown.tolist() == (X * 3).tolist()
    with pytest.raises(BusyError, match=r"1 array\(s\)"):
        allocr.close()
    del shown
    gc.collect()
    allocr.close()


def test_the_memory_of_a_buffer_that_was_placed_in(ctx):
    t = ctx.new_tensor(Type.F32, (4, 3), "t")
    with Buffer.allocate(Device.cpu().buffer_type, 64, clear=True) as buffer:
        buffer.place(t, 0)
        t.to_numpy()[1] = 2
        assert t.to_numpy().sum() == 8  # each array is gone at once
    with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
        t.to_numpy()
    assert repr(t) == "<Tensor 't' F32 [4, 3, 1, 1], data closed>"


def test_views_have_their_strides(ctx):
    t = Tensor.from_numpy(ctx, np.arange(24, dtype="f").reshape(2, 3, 4))
    x = t.to_numpy()
    np.testing.assert_array_equal(ops.transpose(ctx, t).to_numpy(), x.transpose(0, 2, 1))
    np.testing.assert_array_equal(ops.permute(ctx, t, 2, 0, 1, 3).to_numpy(), x.transpose(2, 0, 1))
    row = ops.view(ctx, t, (4, 2), (48,), 16)
    np.testing.assert_array_equal(row.to_numpy(), x[:, 1])
    row.to_numpy()[:] = 0
    assert x[:, 1].sum() == 0
    with pytest.raises(BufferError, match=r"contiguous$"):
        np.frombuffer(ops.transpose(ctx, t))


def test_blocks_come_as_bytes(ctx):
    t = ctx.new_tensor(Type.Q8_0, (64, 3))
    Buffer.allocate(Device.cpu().buffer_type, 256, clear=True).place(t, 0)
    assert (t.to_numpy().shape, t.to_numpy().dtype, t.shape) == ((3, 68), np.uint8, (3, 64))
    with pytest.raises(DTypeError, match=r"of type Q8_0 has no elements that DLPack knows$"):
        np.from_dlpack(t)


def test_blocks_whose_rows_are_not_contiguous(ctx):
    t = ctx.new_tensor(Type.BF16, (8, 4), "t")
    Buffer.allocate(Device.cpu().buffer_type, 64, clear=True).place(t, 0)
    with pytest.raises(
        ShapeError, match=r"^to_numpy: tensor 't \(transposed\)' of type BF16 has no contiguous rows; use"
    ):
        ops.transpose(ctx, t).to_numpy()
    with pytest.raises(BufferError, match=r"of type BF16 has no contiguous rows; use ops.cont first$"):
        memoryview(ops.transpose(ctx, t))


def test_buffer_protocol(ctx):
    t = Tensor.from_numpy(ctx, X.copy())
    with memoryview(t) as view:
        assert (view.shape, view.format, view.itemsize, view.nbytes, view.readonly) == ((3, 4), "f", 4, 48, False)
        assert view.tolist() == X.tolist()
    assert bytes(t) == X.tobytes()
    empty = ctx.new_tensor(Type.F32, (4,), "empty")
    with pytest.raises(ClosedError, match=r"^tensor 'empty' has no data: it is not allocated$"):
        memoryview(empty)


def test_dlpack(ctx):
    t = Tensor.from_numpy(ctx, X.copy())
    y = np.from_dlpack(t)
    assert np.shares_memory(y, t.to_numpy()) and t.__dlpack_device__() == (1, 0)
    back = Tensor.from_dlpack(ctx, t, "back")
    back.set_data(np.zeros(1, "f"))
    assert t.to_numpy()[0, 0] == 0 and back.name == "back"
    with pytest.raises((TypeError, AttributeError)):
        Tensor.from_dlpack(ctx, object())


def test_torch_shares_memory(ctx):
    torch = pytest.importorskip("torch")
    t = Tensor.from_numpy(ctx, X.copy())
    theirs = torch.from_dlpack(t)
    theirs[0, 0] = 99
    assert t.to_numpy()[0, 0] == 99
    ours = Tensor.from_dlpack(ctx, torch.arange(6).reshape(2, 3))
    assert ours.type == Type.I64 and ours.to_numpy().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "array, error, message",
    [
        ([1.0], DTypeError, "from_numpy: a NumPy array is needed, not a list"),
        (np.zeros(3, "c8"), DTypeError, "from_numpy: ggml has no type for complex64 arrays"),
        (np.zeros(3, ">f4"), DTypeError, "from_numpy: ggml has no type for >f4 arrays"),
        (np.zeros(3, "?"), DTypeError, "from_numpy: ggml has no type for bool arrays"),
        (X[:, ::2], ShapeError, "from_numpy: the array is not contiguous; use numpy.ascontiguousarray() first"),
        (
            np.zeros(13, "u1")[1:].view("f"),
            ShapeError,
            "from_numpy: the array is not aligned; use its copy() instead",
        ),
        (np.zeros((1, 1, 1, 1, 1), "f"), ShapeError, "from_numpy: 5 dimensions, not 0 to 4"),
    ],
)
def test_from_numpy_preconditions(ctx, array, error, message):
    with pytest.raises(error) as caught:
        Tensor.from_numpy(ctx, array)
    assert str(caught.value) == message


def test_scalars_and_empty_arrays(ctx):
    assert Tensor.from_numpy(ctx, np.array(3.5, "f")).to_numpy().tolist() == [3.5]
    assert Tensor.from_numpy(ctx, np.zeros((0, 4), "f")).to_numpy().shape == (0, 4)


def test_operators(ctx, backend):
    x, row = X - 5, np.array([1, 2, 4, 8], "f")
    a, b, w = Tensor.from_numpy(ctx, x), Tensor.from_numpy(ctx, row), Tensor.from_numpy(ctx, X[:2].copy())
    cases = [
        (a + b, x + row), (b + a, x + row), (a - b, x - row), (a * b, x * row), (b * a, x * row), (a / b, x / row),
        (a + 2, x + 2), (2 + a, x + 2), (a - 2, x - 2), (2 - a, 2 - x), (a * 3, x * 3), (3 * a, x * 3), (a / 4, x / 4),
        (-a, -x), (abs(a), abs(x)), (w @ a, x @ X[:2].T),
    ]  # fmt: skip
    for got, (_, want) in zip(compute(backend, ctx, *[case for case, _ in cases]), cases, strict=True):
        np.testing.assert_array_equal(got, want)  # small whole numbers: exact


def test_operators_say_no_like_numbers(ctx):
    a = Tensor.from_numpy(ctx, X)
    for wrong in (lambda: a + "1", lambda: a @ 2, lambda: 1 / a, lambda: a - None, lambda: [1] * a):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ZeroDivisionError):
        a / 0
    with pytest.raises(ShapeError, match=r"^mul_mat: ne0 differs \(a \[4, 3, 1, 1\], b \[3, 4, 1, 1\]\)$"):
        a @ Tensor.from_numpy(ctx, X.T.copy())


def test_the_result_lives_where_the_computed_operand_does():
    weights, work = Context(Context.size_for(2)), Context(Context.size_for(16))
    w, x = Tensor.from_numpy(weights, X), Tensor.from_numpy(work, X.copy())
    y = x * 2.0
    assert (w @ y).ctx is (y * w).ctx is (w + y).ctx is work
    assert (x + w).ctx is work


def test_operands_and_contents(ctx):
    a = Tensor.from_numpy(ctx, X, "a")
    b = ops.transpose(ctx, a)
    c = a @ a
    assert [each.name for each in c.src] == ["a", "a"] and a.src == ()
    assert b.view_src.name == "a" and a.view_src is None
    assert repr(b) == (
        "<Tensor 'a (transposed)' F32 [3, 4, 1, 1] = TRANSPOSE('a'), strides [16, 4, 48, 48], 48 bytes of CPU_Mapped>"
    )
    assert [each.name for each in ctx.tensors()][:2] == ["a", "a (transposed)"] and len(ctx.tensors()) == 3
    assert ctx.tensor("a").ne == a.ne and ctx.tensor("b") is None
    assert 0 < ctx.used_mem <= ctx.mem_size
