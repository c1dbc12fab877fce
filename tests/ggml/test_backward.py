"""Graphs as containers, copies of them, gradients, drawings."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import AllocError, BackendError, ClosedError, DTypeError, FileAccessError, ShapeError
from pyggml_adapt.ggml import CGraph, Context, Device, GAllocr, GraphPlan, OpHint, OpPool, RopeType, Tensor, Type, ops

X = np.arange(1, 13, dtype="f").reshape(3, 4) / 10


class Graph:
    def __init__(self, size=256, *, grads=True):
        self.ctx = Context(Context.size_for(2 * size, 4 * size))
        self.graph = CGraph(self.ctx, size, grads=grads)
        self.allocr = GAllocr(Device.cpu().buffer_type)
        self.values = []

    def leaf(self, array, *, param=False):
        t = self.ctx.new_tensor(Type.F32, array.shape[::-1]).set_input().set_output()
        self.values.append((t, array))
        return t.set_param() if param else t

    def backward(self, loss, backend):
        """Return (loss, gradients of the parameters), as NumPy arrays."""
        self.graph.expand(loss.set_loss().set_output())
        self.graph.build_backward()
        params = [t for t, _ in self.values if self.graph.grad(t) is not None]
        grads = [self.graph.grad(t).set_output() for t in params]
        self.allocr.alloc_graph(self.graph)
        for t, array in self.values:
            if t.is_allocated:
                t.set_data(np.ascontiguousarray(array))
        self.graph.reset()
        self.graph.compute(backend)
        return loss.to_numpy().item(), [ops_numpy(each) for each in grads]


def ops_numpy(t):
    return t.to_numpy().copy()


def differences(f, arrays, eps=1e-3):
    """Return the gradients of f by each array, by central differences in float64."""
    found = []
    for k, array in enumerate(arrays):
        grad = np.zeros(array.shape)
        for at in np.ndindex(array.shape):
            values = []
            for sign in (1, -1):
                moved = [each.astype("f8") for each in arrays]
                moved[k][at] += sign * eps
                values.append(f(*moved))
            grad[at] = (values[0] - values[1]) / (2 * eps)
        found.append(grad)
    return found


def test_a_graph_is_a_sequence():
    g = Graph()
    x = g.leaf(X)
    y = g.graph.expand(ops.silu(g.ctx, ops.silu(g.ctx, x)))
    assert len(g.graph) == 2
    assert [each.op for each in g.graph] == ["SILU", "SILU"]
    assert y.name == list(g.graph)[-1].name


def test_dup_cpy_clear(backend):
    g = Graph(grads=False)
    x = g.leaf(X)
    y = g.graph.expand(ops.scale(g.ctx, x, 3.0).set_output())
    dup = g.graph.dup()
    elsewhere = g.graph.dup(Context(Context.size_for(0, 300)))
    g.allocr.alloc_graph(g.graph)
    for graph in (g.graph, dup, elsewhere):
        x.set_data(X)
        graph.compute(backend)
        np.testing.assert_array_equal(y.to_numpy(), X * np.float32(3))
        assert (len(graph), graph.node(0).name) == (1, y.name)
    g.graph.clear()
    assert len(g.graph) == 0 and len(dup) == 1
    g.graph.compute(backend)
    dup.cpy(g.graph)
    dup.cpy(dup)
    assert len(g.graph) == 1
    with pytest.raises(ShapeError, match=r"^cpy: a graph of 8 nodes without gradients for one of 256$"):
        dup.cpy(CGraph(Context(Context.size_for(0, 8)), 8))
    with pytest.raises(AllocError, match="has no room for a graph of 256 nodes"):
        dup.dup(Context(100))
    g.ctx.close()
    for use in (elsewhere.dup, lambda: elsewhere.compute(backend), lambda: list(elsewhere), elsewhere.to_dot):
        with pytest.raises(ClosedError):
            use()


def test_a_plan(backend):
    g = Graph(grads=False)
    x = g.leaf(X)
    y = g.graph.expand(ops.scale(g.ctx, x, 3.0).set_output())
    with pytest.raises(ClosedError, match="is not allocated"):
        GraphPlan(backend, g.graph)
    g.allocr.alloc_graph(g.graph)
    plan = GraphPlan(backend, g.graph)
    for _ in range(3):
        x.set_data(X)
        plan.compute()
        np.testing.assert_array_equal(y.to_numpy(), X * np.float32(3))
    g.graph.clear()
    with pytest.raises(BackendError, match=r"^GraphPlan.compute: the graph has changed since the plan was made$"):
        plan.compute()
    g.ctx.close()
    with pytest.raises(ClosedError):
        plan.compute()
    plan.close()
    with pytest.raises(ClosedError, match=r"^GraphPlan is closed$"):
        plan.compute()


CASES = {
    "mul_mat": (lambda c, a, b: ops.mul_mat(c, a, b), lambda a, b: b @ a.T, [(5, 4), (3, 4)]),
    "add": (lambda c, a, b: ops.add(c, a, b), lambda a, b: a + b, [(3, 4), (4,)]),
    "sub": (lambda c, a, b: ops.sub(c, a, b), lambda a, b: a - b, [(3, 4), (3, 4)]),
    "mul": (lambda c, a, b: ops.mul(c, a, b), lambda a, b: a * b, [(3, 4), (1, 4)]),
    "div": (lambda c, a, b: ops.div(c, a, b), lambda a, b: a / b, [(3, 4), (3, 4)]),
    "silu": (lambda c, a: ops.silu(c, a), lambda a: a / (1 + np.exp(-a)), [(3, 4)]),
    "relu": (lambda c, a: ops.relu(c, a), lambda a: np.maximum(a, 0), [(3, 4)]),
    "exp": (lambda c, a: ops.exp(c, a), np.exp, [(3, 4)]),
    "sqr": (lambda c, a: ops.sqr(c, a), np.square, [(3, 4)]),
    "log": (lambda c, a: ops.log(c, a), np.log, [(3, 4)]),
    "soft_max": (
        lambda c, a: ops.soft_max(c, a),
        lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True),
        [(3, 4)],
    ),
    "rms_norm": (
        lambda c, a: ops.rms_norm(c, a, 1e-5),
        lambda a: a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-5),
        [(3, 4)],
    ),
    "transpose": (
        lambda c, a: ops.cont(c, ops.transpose(c, ops.reshape(c, a, 3, 4))),
        lambda a: a.reshape(4, 3).T,
        [(3, 4)],
    ),
    "view": (lambda c, a: ops.cont(c, ops.view(c, a, (2, 3), (16,), 4)), lambda a: a[:, 1:3], [(3, 4)]),
    "used twice": (lambda c, a: ops.mul(c, ops.sqr(c, a), a), lambda a: a**3, [(3, 4)]),
    "sqrt": (ops.sqrt, np.sqrt, [(3, 4)]),
    "sin": (ops.sin, np.sin, [(3, 4)]),
    "cos": (ops.cos, np.cos, [(3, 4)]),
    "abs": (ops.abs, np.abs, [(3, 4)]),
    "neg": (ops.neg, np.negative, [(3, 4)]),
    "expm1": (ops.expm1, np.expm1, [(3, 4)]),
    "softplus": (ops.softplus, lambda a: np.log1p(np.exp(a)), [(3, 4)]),
    "sgn, which is flat": (lambda c, a: ops.add(c, a, ops.sgn(c, a)), lambda a: a + np.sign(a), [(3, 4)]),
    "step, which is flat": (lambda c, a: ops.add(c, a, ops.step(c, a)), lambda a: a + (a > 0), [(3, 4)]),
    "swiglu_split": (ops.swiglu_split, lambda a, b: a / (1 + np.exp(-a)) * b, [(3, 4), (3, 4)]),
    "scale": (lambda c, a: ops.scale(c, a, 3.0), lambda a: 3 * a, [(3, 4)]),
    "dup": (ops.dup, lambda a: a, [(3, 4)]),
    "sum": (ops.sum, np.sum, [(3, 4)]),
    "sum_rows": (ops.sum_rows, lambda a: a.sum(-1, keepdims=True), [(3, 4)]),
    "mean": (ops.mean, lambda a: a.mean(-1, keepdims=True), [(1, 4)]),
    "repeat_4d": (lambda c, a: ops.repeat_4d(c, a, 8, 6, 1, 1), lambda a: np.tile(a, (2, 2)), [(3, 4)]),
    "repeat_back": (
        lambda c, a: ops.repeat_back(c, a, Tensor.from_numpy(c, X)),
        lambda a: a.reshape(2, 3, 2, 4).sum((0, 2)),
        [(6, 8)],
    ),
    "reshape and permute": (
        lambda c, a: ops.cont(c, ops.permute(c, ops.reshape(c, a, 2, 3, 2), 1, 2, 0, 3)),
        lambda a: a.reshape(2, 3, 2).transpose(1, 2, 0),
        [(3, 4)],
    ),
    "acc": (lambda c, a, b: ops.acc(c, a, b, 16, 48, 48, 4), lambda a, b: inside(a, a[:2, 1:3] + b), [(3, 4), (2, 2)]),
    "set": (lambda c, a, b: ops.set(c, a, b, 16, 48, 48, 4), lambda a, b: inside(a, b), [(3, 4), (2, 2)]),
    "get_rows": (
        lambda c, a: ops.get_rows(c, a, Tensor.from_numpy(c, np.array([2, 0, 2], "i"))),
        lambda a: a[[2, 0, 2]],
        [(3, 4)],
    ),
    "diag_mask_zero": (lambda c, a: ops.diag_mask_zero(c, a, 1), lambda a: np.tril(a, 1), [(3, 4)]),
    "diag_mask_inf": (
        lambda c, a: ops.soft_max(c, ops.diag_mask_inf(c, a, 0)),
        lambda a: softmax(np.where(np.tri(3, 4, dtype=bool), a, -np.inf)),
        [(3, 4)],
    ),
    "soft_max_ext": (
        lambda c, a: ops.soft_max_ext(c, a, Tensor.from_numpy(c, np.cos(X)), 0.7),
        lambda a: softmax(0.7 * a + np.cos(X)),
        [(3, 4)],
    ),
    "rope_ext": (
        lambda c, a: ops.rope_ext(c, a, positions(c), None, 4, RopeType.NEOX, 0, 1e4, 1.0, 0.0, 1.0, 0.0, 0.0),
        lambda a: rotated(a),
        [(3, 2, 4)],
    ),
    "pool_2d, mean": (
        lambda c, a: ops.pool_2d(c, a, OpPool.AVG, 2, 2, 2, 2, 0, 0),
        lambda a: a.reshape(2, 2, 2, 2).mean((1, 3)),
        [(4, 4)],
    ),
    "pool_2d, maximum": (
        lambda c, a: ops.pool_2d(c, a, OpPool.MAX, 2, 2, 2, 2, 0, 0),
        lambda a: a.reshape(2, 2, 2, 2).max((1, 3)),
        [(4, 4)],
    ),
    "im2col": (
        lambda c, a: ops.im2col(c, Tensor.from_numpy(c, X[None, None, :2, :2].copy()), a, 1, 1, 0, 0, 1, 1, True, 0),
        lambda a: np.array([[a[0, 0, i : i + 2, j : j + 2].ravel() for j in range(3)] for i in range(2)]),
        [(1, 1, 3, 4)],
    ),
    "cross_entropy_loss": (
        lambda c, a: ops.cross_entropy_loss(c, a, Tensor.from_numpy(c, softmax(X))),
        lambda a: -(softmax(X) * np.log(softmax(a))).sum() / 3,
        [(3, 4)],
    ),
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def inside(a, b):
    a = a.copy()
    a[:2, 1:3] = b
    return a


def positions(ctx):
    return Tensor.from_numpy(ctx, np.array([0, 1, 5], "i"))


def rotated(a):
    """Return heads with their two halves turned by the angles of positions 0, 1 and 5."""
    angle = np.array([0, 1, 5])[:, None, None] * np.array([1.0, 0.01])
    x, y = a[..., :2], a[..., 2:]
    return np.concatenate([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], -1)


def test_the_gradient_of_a_softmax_that_is_reshaped(backend):
    """Its result has no other reader, and ggml would put the gradient there while it still reads it."""
    g = Graph()
    w, y = g.leaf(X, param=True), X.cumsum(axis=1)
    out = ops.reshape(g.ctx, ops.soft_max(g.ctx, ops.scale(g.ctx, w, 2.0)), 12)
    _, (grad,) = g.backward(ops.sum(g.ctx, ops.mul(g.ctx, out, g.leaf(y.reshape(-1)))), backend)
    (expected,) = differences(lambda x: (softmax(2 * x) * y).sum(), [X])
    np.testing.assert_allclose(grad, expected, rtol=2e-3, atol=2e-3)


def test_the_gradient_of_a_view_of_infinite_numbers(backend):
    """It is 0 where the view does not look: ggml's zeros would be 0 times infinity."""
    g = Graph()
    scores = np.stack([X[:, :3], X[:, 1:]])
    w, mask = g.leaf(scores, param=True), np.triu(np.full((3, 3), -np.inf, "f"), 1)
    masked = ops.add(g.ctx, w, g.leaf(mask))
    head = ops.cont(g.ctx, ops.view(g.ctx, masked, (3, 3), (12,), 36))
    loss = ops.sum(g.ctx, ops.sqr(g.ctx, ops.soft_max(g.ctx, head)))
    _, (grad,) = g.backward(loss, backend)
    assert not grad[0].any()
    (expected,) = differences(lambda x: (softmax(np.where(mask < 0, -1e9, x)) ** 2).sum(), [scores[1]])
    np.testing.assert_allclose(grad[1], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_gradients(backend, case):
    """Against differences in float64: 2e-3 is what F32 leaves of a sum of a dozen terms of about 1."""
    build, f, shapes = CASES[case]
    rng = np.random.default_rng(3)
    arrays = [rng.uniform(0.5, 1.5, shape).astype("f") for shape in shapes]
    g = Graph()
    params = [g.leaf(each, param=True) for each in arrays]
    out = build(g.ctx, *params)
    weights = rng.uniform(0.5, 1.5, out.shape).astype("f")
    loss = ops.sum(g.ctx, ops.mul(g.ctx, out, g.leaf(weights)))

    def value(*arrays):
        return (f(*arrays) * weights).sum()

    got, grads = g.backward(loss, backend)
    assert got == pytest.approx(value(*arrays), rel=1e-5)
    assert len(grads) == len(arrays)
    for grad, expected in zip(grads, differences(value, arrays), strict=True):
        np.testing.assert_allclose(grad.reshape(expected.shape), expected, rtol=2e-3, atol=2e-3)


def test_backward_again_after_reset(backend):
    g = Graph()
    w = g.leaf(X, param=True)
    loss = ops.sum(g.ctx, ops.sqr(g.ctx, w))
    _, (grad,) = g.backward(loss, backend)
    np.testing.assert_allclose(grad, 2 * X, rtol=1e-6)
    assert g.graph.grad_acc(loss) is not None
    assert g.graph.grad_acc(w) is None
    assert g.graph.grad(g.ctx.new_tensor(Type.F32, (1,))) is None
    g.graph.reset()
    w.set_data(X * 2)
    g.graph.compute(backend)
    np.testing.assert_allclose(g.graph.grad(w).to_numpy(), 4 * X, rtol=1e-6)
    with pytest.raises(BackendError, match=r"^build_backward: the graph has its gradients already$"):
        g.graph.build_backward()


def refused(build, error, match, **kwargs):
    g = Graph(**kwargs)
    loss = build(g)
    if loss is not None:
        g.graph.expand(loss.set_loss())
    with pytest.raises(error, match=match):
        g.graph.build_backward()
    assert len(g.graph) < 10


def multiplied_then_scaled(g, w):
    factor = g.leaf(X)
    product = g.graph.expand(ops.mul(g.ctx, w, factor))
    g.graph.expand(ops.scale_inplace(g.ctx, factor, 2.0))
    return product


def copied_twice(g, w):
    cache = g.leaf(X)
    first = g.graph.expand(ops.sqr(g.ctx, ops.cpy(g.ctx, w, cache)))
    return ops.add(g.ctx, first, ops.cpy(g.ctx, ops.scale(g.ctx, w, 2.0), cache))


def copied_and_read(g, w):
    cache = g.leaf(X)
    copied = g.graph.expand(ops.cpy(g.ctx, w, cache))
    return ops.add(g.ctx, copied, ops.sqr(g.ctx, cache))


def test_what_has_no_gradient():
    def through(op):
        return lambda g: ops.sum(g.ctx, op(g, g.leaf(X, param=True)))

    for op, why in (
        (lambda g, w: ops.gelu(g.ctx, w), "GELU node 'node_1': ggml has no gradient for operand 0$"),
        (lambda g, w: ops.concat(g.ctx, w, w, 0), "CONCAT node .*: ggml has no gradient for operand 0$"),
        (lambda g, w: ops.norm(g.ctx, w, 1e-5), "NORM node .*: ggml has no gradient for operand 0$"),
        (lambda g, w: ops.map_custom1(g.ctx, w, print), "ggml has no gradient for operand 0$"),
        (lambda g, w: ops.div(g.ctx, g.leaf(X), ops.reshape(g.ctx, ops.sum(g.ctx, w), 1)), "that is broadcast$"),
        (lambda g, w: ops.map_custom1_inplace(g.ctx, w, print), "no gradient for what is computed in place$"),
        (
            lambda g, w: ops.cpy(g.ctx, w, g.leaf(X, param=True)),
            "CPY node .*: it is constant in operand 1, which has no other use$",
        ),
        (
            lambda g, w: ops.cont(g.ctx, ops.transpose(g.ctx, ops.sqr(g.ctx, w))),
            "SQR node .*: its gradient is permuted; put an ops.reshape before the permutation$",
        ),
        (lambda g, w: ops.view(g.ctx, w, (3, 3), (4,)), "VIEW node .*: ggml has no gradient where rows overlap, or"),
        (
            lambda g, w: ops.set(g.ctx, w, g.leaf(X[:2, :2], param=True), 4, 16, 16, 0),
            "SET node .*: ggml has no gradient where rows overlap, or interleave$",
        ),
        (
            lambda g, w: ops.silu(g.ctx, ops.permute(g.ctx, ops.reshape(g.ctx, w, 2, 6, 1), 0, 2, 1, 3)),
            "SILU node .*: operand 0 must be contiguous for a gradient; use ops.cont first$",
        ),
        (
            lambda g, w: ops.rope_set_offset(
                ops.rope(g.ctx, ops.reshape(g.ctx, w, 4, 1, 3), positions(g.ctx), 2, RopeType.NORMAL), 2
            ),
            "ROPE node .*: ggml has no gradient for a rotation that leaves out the first elements$",
        ),
        (
            lambda g, w: ops.mul_mat_set_hint(
                ops.mul_mat(g.ctx, g.leaf(np.zeros((4, 4), "f")), w), OpHint.SRC0_IS_HADAMARD
            ),
            "MUL_MAT node .*: ggml has no gradient for a product with a matrix that is not read$",
        ),
        (multiplied_then_scaled, "MUL node .*: operand 1 is written over by another node$"),
        (copied_twice, "SQR node .*: operand 0 is written over by another node$"),
        (copied_and_read, "SQR node .*: operand 0 is written over by another node$"),
    ):
        refused(through(op), ShapeError, why)


def test_a_loss_that_no_parameter_takes_part_in():
    """ggml looks for the gradient of its operands all the same."""
    g = Graph()
    g.graph.expand(ops.sqr(g.ctx, g.leaf(X, param=True)))
    g.graph.expand(ops.map_custom1(g.ctx, g.leaf(X[0, :1]), print).set_loss())
    with pytest.raises(ShapeError, match=r"^build_backward: MAP_CUSTOM1 node .* ggml has no gradient for operand 0$"):
        g.graph.build_backward()


def test_backward_preconditions():
    with pytest.raises(BackendError, match=r"^build_backward: the graph was made without grads=True$"):
        Graph(grads=False).graph.build_backward()
    refused(lambda g: None, ShapeError, r"^build_backward: no node is a parameter; use")
    refused(lambda g: ops.sum(g.ctx, g.leaf(X)), ShapeError, r"^build_backward: no node is a parameter; use")
    g = Graph()
    g.graph.expand(ops.sqr(g.ctx, g.leaf(X, param=True)))
    with pytest.raises(ShapeError, match=r"^build_backward: no node is a loss; use Tensor.set_loss\(\)$"):
        g.graph.build_backward()
    with pytest.raises(BackendError, match=r"^reset: the graph has no gradients, see build_backward$"):
        g.graph.reset()

    def late(g):
        w = g.leaf(X)
        loss = g.graph.expand(ops.sum(g.ctx, ops.sqr(g.ctx, w)))
        w.set_param()
        return loss

    refused(late, ShapeError, r"a parameter must be set with Tensor.set_param\(\) before CGraph.expand\(\)$")

    def half(g):
        w = g.ctx.new_tensor(Type.F16, (4, 3)).set_param()
        return ops.sum(g.ctx, ops.mul_mat(g.ctx, w, g.leaf(X)))

    refused(half, DTypeError, r"must be F32 to have a gradient$")
    refused(lambda g: ops.sum(g.ctx, ops.sqr(g.ctx, g.leaf(X, param=True))), AllocError, r"^a graph of 8 nodes", size=8)
    g = Graph()
    loss = g.graph.expand(ops.sum(g.ctx, ops.sqr(g.ctx, g.leaf(X, param=True))).set_loss())
    g.graph.build_backward()
    with pytest.raises(ClosedError, match="is not allocated"):
        g.graph.reset()
    with pytest.raises(ShapeError, match=r"^set_param: tensor '.*' is computed by SUM$"):
        loss.set_param()
    with pytest.raises(ShapeError, match=r"is not a single F32 number$"):
        g.leaf(X).set_loss()


def test_full_context():
    ctx = Context(Context.size_for(6) + 40000)
    graph = CGraph(ctx, 64, grads=True)
    w = ctx.new_tensor(Type.F32, (4,)).set_param()
    graph.expand(ops.sum(ctx, ops.sqr(ctx, w)).set_loss())
    while ctx.mem_size - ctx.used_mem > Context.size_for(10):
        ctx.new_tensor(Type.F32, (1,))
    with pytest.raises(AllocError, match=r"is full"):
        graph.build_backward()


def test_drawings(tmp_path, backend):
    g = Graph()
    w = g.leaf(X, param=True)
    w.name = "weights"
    loss = ops.sum(g.ctx, ops.sqr(g.ctx, w))
    forward = g.graph
    g.backward(loss, backend)
    text = forward.to_dot()
    assert text.startswith("digraph G {") and text.rstrip().endswith("}")
    assert "weights (f32)" in text and "yellow" in text
    path = tmp_path / "g.dot"
    forward.dump_dot(path, forward)
    assert path.read_text().count("->") == text.count("->")
    with pytest.raises(FileAccessError, match=r"no/such/g.dot: no such file or directory$"):
        forward.dump_dot(tmp_path / "no" / "such" / "g.dot")
    with pytest.raises(FileAccessError, match=r"is a directory$"):
        forward.dump_dot(tmp_path)
