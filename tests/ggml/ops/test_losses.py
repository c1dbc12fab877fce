"""The loss of classifiers, its gradient, and the optimisers' steps, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Buffer, Type, ops

RNG = np.random.default_rng(67)
F32 = {"rtol": 1e-5, "atol": 1e-6}  # sums of up to 40 elements in F32, and its exp and log


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def softmax(x):
    e = np.exp(x.astype("d") - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def loss(a, b):
    return -(b * np.log(softmax(a))).sum(axis=-1).mean()


SHAPES = [(1,), (40,), (3, 7), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_loss(calc, shape):
    a, b = normal(*shape) * 5, softmax(normal(*shape)).astype("f")
    np.testing.assert_allclose(calc(ops.cross_entropy_loss, a, b), [loss(a, b)], **F32)


def test_cross_entropy_loss_of_views(calc):
    a, b = normal(3, 9), softmax(normal(3, 7)).astype("f")
    out = calc(lambda ctx, a, b: ops.cross_entropy_loss(ctx, ops.view(ctx, a, (7, 3), a.nb[1:2], 4), b), a, b)
    np.testing.assert_allclose(out, [loss(a[:, 1:8], b)], **F32)


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_loss_back(calc, shape):
    a, b, grad = normal(*shape) * 5, softmax(normal(*shape)).astype("f"), np.array([1.7], "f")
    expected = (softmax(a) - b) * grad / (a.size / shape[-1])
    np.testing.assert_allclose(calc(ops.cross_entropy_loss_back, grad, a, b), expected, **F32)


def test_cross_entropy_loss_back_by_differences(calc):
    a, b = normal(2, 5), softmax(normal(2, 5)).astype("f")
    out, step = calc(ops.cross_entropy_loss_back, np.array([1.0], "f"), a, b), 1e-6
    for at in np.ndindex(a.shape):
        up, down = a.astype("d"), a.astype("d")
        up[at] += step
        down[at] -= step
        np.testing.assert_allclose(out[at], (loss(up, b) - loss(down, b)) / (2 * step), rtol=1e-4, atol=1e-6)


class Steps:
    """Leaves in memory of their own, so that what a step writes can be read."""

    def __init__(self, bench):
        self.bench, self.buffers = bench, []

    def leaf(self, array):
        tensor = self.bench.ctx.new_tensor(Type.F32, array.shape[::-1])
        self.buffers.append(Buffer.allocate(self.bench.backend.device.buffer_type, tensor.nbytes))
        self.buffers[-1].place(tensor, 0)
        tensor.set_data(np.ascontiguousarray(array, "f"))
        return tensor


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 4, 5)])
def test_opt_step_adamw(bench, shape):
    w, g, m, v = normal(*shape), normal(*shape), normal(*shape), normal(*shape) ** 2
    alpha, beta1, beta2, eps, decay, i = 0.01, 0.9, 0.99, 1e-6, 0.1, 3
    params = np.array([alpha, beta1, beta2, eps, decay, 1 / (1 - beta1**i), 1 / (1 - beta2**i)])
    steps = Steps(bench)
    leaves = [steps.leaf(each) for each in (w, g, m, v, params)]
    leaves[0].set_param()
    bench.graph.expand(ops.opt_step_adamw(bench.ctx, *leaves))
    bench.graph.compute(bench.backend)
    m, v = beta1 * m.astype("d") + (1 - beta1) * g, beta2 * v.astype("d") + (1 - beta2) * g**2.0
    w = w * (1 - alpha * decay) - alpha * (m * params[5]) / (np.sqrt(v * params[6]) + eps)
    for leaf, expected in zip((leaves[0], leaves[2], leaves[3]), (w, m, v), strict=True):
        np.testing.assert_allclose(leaf.to_numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(leaves[1].to_numpy(), g)


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 4, 5)])
def test_opt_step_sgd(bench, shape):
    w, g = normal(*shape), normal(*shape)
    steps = Steps(bench)
    leaves = [steps.leaf(each) for each in (w, g, np.array([0.1, 0.01]))]
    leaves[0].set_param()
    out = bench.graph.expand(ops.opt_step_sgd(bench.ctx, *leaves))
    bench.graph.compute(bench.backend)
    expected = w - 0.1 * (g + 0.01 * w.astype("d"))
    np.testing.assert_allclose(leaves[0].to_numpy(), expected, **F32)
    np.testing.assert_allclose(out.to_numpy(), expected, **F32)


def f32(*ne):
    return lambda ctx: ctx.new_tensor(Type.F32, ne)


def half(*ne):
    return lambda ctx: ctx.new_tensor(Type.F16, ne)


def param(*ne):
    return lambda ctx: ctx.new_tensor(Type.F32, ne).set_param()


def spread(ctx, a, b):
    """Call the loss with rows that are as far apart as ggml does not look at."""
    return ops.cross_entropy_loss(ctx, ops.view(ctx, a, (4, 1, 2), (4, 16)), ops.view(ctx, b, (4, 1, 2), (4, 16)))


def wide(ctx, a, grad, params):
    return ops.opt_step_sgd(ctx, a, ops.view(ctx, grad, (4, 3), grad.nb[1:2]), params)


@pytest.mark.parametrize(("op", "leaves", "error", "message"), [
    (ops.cross_entropy_loss, [f32(4), half(4)], DTypeError, "cross_entropy_loss: a must be F32"),
    (ops.cross_entropy_loss, [f32(4), f32(5)], ShapeError, r"shapes differ \(a \[4, 1, 1, 1\], b \[5, 1, 1, 1\]\)"),
    (ops.cross_entropy_loss, [f32(4, 0), f32(4, 0)], ShapeError, "cross_entropy_loss: an operand is empty or too"),
    (spread, [f32(4, 2), f32(4, 2)], ShapeError, "the rows of a must lie at one distance"),
    (ops.cross_entropy_loss_back, [f32(2), f32(4), f32(4)], ShapeError, "a is not one number"),
    (ops.cross_entropy_loss_back, [half(1), f32(4), f32(4)], DTypeError, "cross_entropy_loss_back: a must be F32"),
    (ops.cross_entropy_loss_back, [f32(1), f32(4), f32(5)], ShapeError, "cross_entropy_loss_back: shapes differ"),
    (
        lambda ctx, a, b, c: ops.cross_entropy_loss_back(ctx, a, ops.view(ctx, b, (4, 3), b.nb[1:2]), c),
        [f32(1), f32(5, 3), f32(4, 3)],
        ShapeError,
        "cross_entropy_loss_back: the operands must be contiguous",
    ),
    (ops.opt_step_sgd, [f32(4), f32(4), f32(2)], ShapeError, "opt_step_sgd: tensor '' is not a parameter"),
    (ops.opt_step_sgd, [param(4), f32(5), f32(2)], ShapeError, "opt_step_sgd: shapes differ"),
    (ops.opt_step_sgd, [param(4), f32(4), f32(3)], ShapeError, "opt_step_sgd: params must be 2 contiguous numbers"),
    (ops.opt_step_sgd, [param(4), f32(4), half(2)], DTypeError, "opt_step_sgd: params must be F32"),
    (ops.opt_step_sgd, [param(4), half(4), f32(2)], DTypeError, "opt_step_sgd: all must be F32"),
    (wide, [param(4, 3), f32(5, 3), f32(2)], ShapeError, "opt_step_sgd: strides differ"),
    (ops.opt_step_adamw, [param(4)] + [f32(4)] * 3 + [f32(6)], ShapeError, "params must be 7 contiguous numbers"),
    (ops.opt_step_adamw, [param(4), f32(4), f32(4), f32(3), f32(7)], ShapeError, "opt_step_adamw: shapes differ"),
])  # fmt: skip
def test_refused(bench, op, leaves, error, message):
    with pytest.raises(error, match=message):
        op(bench.ctx, *(leaf(bench.ctx) for leaf in leaves))
