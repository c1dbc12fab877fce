"""compute(): values of tensors with everything that they need."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import ClosedError, ShapeError
from pyggml_adapt.ggml import Context, Tensor, Type, compute, ops

W, X = np.arange(6, dtype="f").reshape(2, 3), np.arange(12, dtype="f").reshape(4, 3)


def test_values_are_numpys(backend):
    ctx, other = Context(Context.size_for(8)), Context(Context.size_for(8))
    w, x = Tensor.from_numpy(ctx, W.copy()), Tensor.from_numpy(other, X)
    product = w @ x
    total = ops.sum(other, ops.cont(other, ops.transpose(other, product)))
    found = compute(product, total, w, backend=backend)
    np.testing.assert_array_equal(found[0], X @ W.T)
    np.testing.assert_array_equal(found[1], [(X @ W.T).sum()])
    np.testing.assert_array_equal(found[2], W)
    np.testing.assert_array_equal(product.to_numpy(), X @ W.T)  # what is between can be looked at
    w.set_data(W + 1)
    np.testing.assert_array_equal(compute(product, backend=backend)[0], X @ (W + 1).T)
    ctx.close()  # what came back are copies
    assert compute(backend=backend) == []


def test_a_norm_that_only_a_product_reads(backend):
    ctx = Context(Context.size_for(8))
    norm = ops.rms_norm(ctx, Tensor.from_numpy(ctx, X), 1e-5)
    compute(ops.mul(ctx, norm, Tensor.from_numpy(ctx, X)), backend=backend)
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm.to_numpy(), expected, rtol=1e-5)  # float32 in another order


def test_each_type_comes_back(backend):
    ctx = Context(Context.size_for(8))
    x = Tensor.from_numpy(ctx, X)
    index, half = compute(ops.argmax(ctx, x), ops.cast(ctx, x, Type.F16), backend=backend)
    np.testing.assert_array_equal(index, np.full(4, 2, np.int32))
    np.testing.assert_array_equal(half, X.astype("e"))


def test_a_view_comes_as_it_lies(backend):
    ctx = Context(Context.size_for(8))
    x = Tensor.from_numpy(ctx, X)
    np.testing.assert_array_equal(compute(ops.transpose(ctx, x), backend=backend)[0], X.T)


def test_a_leaf_without_data_is_named(backend):
    ctx = Context(Context.size_for(8))
    leaf = ctx.new_tensor(Type.F32, (3, 2), "nowhere")
    with pytest.raises(ClosedError, match="compute: leaf 'nowhere' has no data"):
        compute(leaf @ Tensor.from_numpy(ctx, X), backend=backend)
    with pytest.raises(ClosedError, match="compute: leaf 'nowhere' has no data"):
        compute(leaf, backend=backend)


def test_preconditions_are_the_ops(backend):
    ctx = Context(Context.size_for(8))
    with pytest.raises(ShapeError, match="mul_mat: ne0 differs"):
        compute(Tensor.from_numpy(ctx, W) @ Tensor.from_numpy(ctx, np.ones((2, 2), "f")))


def test_it_makes_a_backend():
    ctx = Context(Context.size_for(8))
    np.testing.assert_array_equal(compute(Tensor.from_numpy(ctx, W) * 2)[0], W * 2)
