"""A matrix product in five lines: ggml's w @ x applies w to each row of x."""

import numpy as np

from pyggml_adapt.ggml import Context, Tensor, compute

w, x = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((4, 3), np.float32)
ctx = Context(Context.size_for(n_tensors=3))
product = Tensor.from_numpy(ctx, w) @ Tensor.from_numpy(ctx, x)
(result,) = compute(product)
print(result, (result == x @ w.T).all())
