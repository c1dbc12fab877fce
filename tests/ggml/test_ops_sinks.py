"""Attention sinks: a further logit of each head, in both forms of attention, as weights and as slots."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import ClosedError
from pyggml_adapt.ggml import Buffer, Context, Device, Slots, TensorTable, Type, dequantize, ops, quantize

RNG = np.random.default_rng(11)
N_HEAD, N_HEAD_KV, D = 4, 2, 32
SINKS = np.array([-1.5, 0.0, 2.0, 30.0], "f")


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def softmax(x, sinks):
    """Return the softmax of x [..., n_head, n_tokens, n_kv] with one more logit in each row, less that one's share."""
    whole = np.concatenate([x, np.broadcast_to(sinks[:, None, None], (*x.shape[:-1], 1))], axis=-1).astype("d")
    e = np.exp(whole - whole.max(axis=-1, keepdims=True))
    return (e / e.sum(axis=-1, keepdims=True))[..., :-1]


def random_mask(n_tokens, n_kv):
    """Return an F16 mask that hides about half of the cells, and all of them from the last token."""
    mask = np.where(RNG.random((1, n_tokens, n_kv)) < 0.5, -np.inf, 0).astype("e")
    mask[:, -1] = -np.inf
    return mask


def attention(q, k, v, mask, sinks, scale=D**-0.5):
    k, v = (each.repeat(len(q) // len(each), axis=0) for each in (k, v))
    return (softmax(q @ k.swapaxes(1, 2) * scale + mask.astype("f"), sinks) @ v).transpose(1, 0, 2)


def flash(ctx, q, k, v, mask, sinks):
    return ops.flash_attn_ext(ctx, q, k, v, mask, D**-0.5, sinks=sinks)


def by_soft_max(ctx, q, k, v, mask, sinks):
    """Return attention as models build it without flash attention."""
    kq = ops.soft_max_ext(ctx, ops.mul_mat(ctx, k, q), mask, D**-0.5, sinks=sinks)
    v = ops.cont(ctx, ops.transpose(ctx, v))
    return ops.cont(ctx, ops.permute(ctx, ops.mul_mat(ctx, v, kq), 0, 2, 1, 3))


@pytest.mark.parametrize("dtype", ["f", "e"])
def test_soft_max_ext(calc, dtype):
    x, mask = normal(2, N_HEAD, 3, 8), random_mask(3, 8).astype(dtype)
    out = calc(lambda ctx, a, m, s: ops.soft_max_ext(ctx, a, m, 0.25, sinks=s), x, mask, SINKS)
    np.testing.assert_allclose(out, softmax(x * 0.25 + mask.astype("f"), SINKS), rtol=1e-4, atol=1e-6)
    assert not out[:, :, -1].any()
    out = calc(lambda ctx, a, s: ops.soft_max_ext(ctx, a, None, 2.0, sinks=s), x, SINKS)
    np.testing.assert_allclose(out, softmax(x * 2, SINKS), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_tokens, n_kv", [(1, 96), (1, 600), (3, 96), (70, 96)])  # each another way of the kernel's
@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.Q8_0], ids=lambda type: type.name)
def test_flash_attn_ext(calc, type, n_tokens, n_kv):
    q, k, v = normal(N_HEAD, n_tokens, D), normal(N_HEAD_KV, n_kv, D), normal(N_HEAD_KV, n_kv, D)
    mask = random_mask(n_tokens + 1, n_kv)[:, :-1] if n_tokens == 1 else random_mask(n_tokens, n_kv)
    out = calc(flash, q, (k, type), (v, type), mask, SINKS)
    exact = attention(q, *(dequantize(quantize(t, type), type, D).reshape(t.shape) for t in (k, v)), mask, SINKS)
    error = ((out - exact) ** 2).sum() / (exact**2).sum()
    # F16 and quantised K round Q to 11 or 8 bits, and F16 V is summed in F16
    assert error < {Type.F32: 1e-10, Type.F16: 2e-5}.get(type, 3e-4)
    if n_tokens > 1:
        assert not out[-1].any()  # nothing but the sinks is seen there


def test_flash_attn_ext_without_mask(calc):
    q, k, v = normal(N_HEAD, 3, D), normal(N_HEAD_KV, 8, D), normal(N_HEAD_KV, 8, D)
    out = calc(lambda ctx, q, k, v, s: flash(ctx, q, k, v, None, s), q, k, v, SINKS)
    np.testing.assert_allclose(out, attention(q, k, v, np.zeros(1, "f"), SINKS), rtol=1e-3, atol=1e-5)


def test_sinks_far_below_change_nothing(calc):
    q, k, v = normal(N_HEAD, 3, D), normal(N_HEAD_KV, 8, D), normal(N_HEAD_KV, 8, D)
    mask = np.zeros((1, 3, 8), "e")
    for op in (flash, by_soft_max):
        with_sinks = calc(op, q, k, v, mask, np.full(N_HEAD, -1e4, "f"))
        without = calc(lambda ctx, *t, op=op: op(ctx, *t, None), q, k, v, mask)
        np.testing.assert_array_equal(with_sinks, without)


def placed(array):
    """Return a tensor of a new Context that holds the array, F32, in a new Buffer, and the Buffer."""
    ctx = Context(Context.size_for(1))
    buffer = Buffer.allocate(Device.cpu().buffer_type, 4096)
    t = ctx.new_tensor(Type.F32, array.shape[::-1], "attn_sinks.weight")
    buffer.place(t, 0)
    t.set_data(array)
    return t, buffer


@pytest.mark.parametrize("op", [flash, by_soft_max])
@pytest.mark.parametrize("is_view", [False, True])
def test_slots(bench, op, is_view):
    """Bound to other tables a graph computes with other sinks, whether these are a slot or a view of one."""
    inputs = [normal(N_HEAD, 3, D), normal(N_HEAD_KV, 8, D), normal(N_HEAD_KV, 8, D), np.zeros((1, 3, 8), "e")]
    leaves = [bench.leaf(each) for each in inputs]
    values = [np.concatenate([normal(N_HEAD), SINKS + i]) if is_view else SINKS + i for i in range(3)]
    sources = [placed(each)[0] for each in values]
    slots = Slots(bench.graph)
    sinks = slots.add(sources[0])
    if is_view:
        sinks = ops.view(bench.ctx, sinks, (N_HEAD,), (), 4 * N_HEAD)
    out = op(bench.ctx, *leaves, sinks)
    bench.compute(out)
    slots.seal()
    tables = [TensorTable([each]) for each in sources]
    for i in (0, 1, 2, 0, 2):
        slots.bind(tables[i])
        for leaf, data in zip(leaves, inputs, strict=True):  # the allocator gives their memory away once they are read
            leaf.set_data(data)
        bench.graph.compute(bench.backend)
        expected = attention(*inputs, SINKS + i)
        np.testing.assert_allclose(out.to_numpy().reshape(expected.shape), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("op", [flash, by_soft_max])
def test_sinks_are_seen_as_operands(bench, op):
    leaves = [bench.leaf(each) for each in (normal(N_HEAD, 3, D), normal(N_HEAD_KV, 8, D), normal(N_HEAD_KV, 8, D))]
    leaves.append(bench.leaf(np.zeros((1, 3, 8), "e")))
    other = Context(Context.size_for(1))
    bench.graph.expand(op(bench.ctx, *leaves, other.new_tensor(Type.F32, (N_HEAD,), "attn_sinks.weight")))
    with pytest.raises(ClosedError, match=r"^tensor 'attn_sinks.weight' of another Context has no data$"):
        bench.allocr.alloc_graph(bench.graph)


@pytest.mark.parametrize("op", [flash, by_soft_max])
def test_closed_sinks(bench, op):
    q, k, v = normal(N_HEAD, 3, D), normal(N_HEAD_KV, 8, D), normal(N_HEAD_KV, 8, D)
    sinks, buffer = placed(SINKS)
    bench.compute(op(bench.ctx, *(bench.leaf(each) for each in (q, k, v, np.zeros((1, 3, 8), "e"))), sinks))
    buffer.close()
    with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
        bench.graph.compute(bench.backend)
