"""Shared by the ggml tests: build a graph of a few tensors, compute it, look at the result."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import numpy as np
import pytest

from pyggml_adapt.ggml import Backend, CGraph, Context, GAllocr, Tensor, Type, ops, quantize

TYPES = {"f": Type.F32, "e": Type.F16, "i": Type.I32, "q": Type.I64, "l": Type.I64}


class Bench:
    """One context, one graph and one allocator, on a backend with one thread."""

    def __init__(self, backend: Backend, n_tensors: int = 256):
        self.backend = backend
        self.ctx = Context(Context.size_for(n_tensors, n_tensors))
        self.graph = CGraph(self.ctx, n_tensors)
        self.allocr = GAllocr(backend.device.buffer_type)
        self._fill: list[tuple[Tensor, np.ndarray]] = []

    def leaf(self, array: np.ndarray, type: Type | None = None) -> Tensor:
        """Return a leaf with the elements of `array`, converted to `type`; shape in NumPy order."""
        data = array if type is None else quantize(array, type)
        leaf = self.ctx.new_tensor(type if type is not None else TYPES[array.dtype.char], array.shape[::-1])
        self._fill.append((leaf.set_input(), np.ascontiguousarray(data)))
        return leaf

    def compute(self, *outs: Tensor) -> list[np.ndarray]:
        """Return the values of `outs`."""
        outs = [out if out.is_contiguous else ops.cont(self.ctx, out) for out in outs]
        for out in outs:
            self.graph.expand(out.set_output())
        self.allocr.alloc_graph(self.graph)
        for leaf, data in self._fill:
            if leaf.is_allocated:  # else it is not used
                leaf.set_data(data)
        self.graph.compute(self.backend)
        return [out.to_numpy() for out in outs]


@pytest.fixture(scope="session")
def backend():
    with Backend(n_threads=1) as backend:
        yield backend


@pytest.fixture
def bench(backend: Backend) -> Bench:
    return Bench(backend)


@pytest.fixture
def calc(backend: Backend) -> Callable[..., np.ndarray]:
    """Return calc(op, *arrays): the result of op(ctx, *leaves)."""

    def calc(op: Callable[..., Tensor], *arrays: np.ndarray | tuple[np.ndarray, Type]) -> np.ndarray:
        bench = Bench(backend)
        leaves = [bench.leaf(*each) if isinstance(each, tuple) else bench.leaf(each) for each in arrays]
        return bench.compute(op(bench.ctx, *leaves))[0]

    return calc


@pytest.fixture
def python() -> Callable[[str], str]:
    """Return python(code): its output, run in another process that must end well: an abort fails the test."""

    def python(code: str) -> str:
        prelude = "import numpy as np\nfrom pyggml_adapt.errors import *\nfrom pyggml_adapt.ggml import *\n"
        done = subprocess.run(
            [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
        return done.stdout

    return python
