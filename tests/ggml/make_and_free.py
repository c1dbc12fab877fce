"""Make and free many of everything that owns something of ggml's, for valgrind to say what is left: see
docs/howto/develop.md.

`python tests/ggml/make_and_free.py N` makes N of each; half of them are closed, half are left to Python.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pyggml_adapt.ggml import (
    Backend,
    Buffer,
    CGraph,
    Context,
    Device,
    GAllocr,
    GGUFReader,
    GGUFWriter,
    GraphPlan,
    Sched,
    Slots,
    Tensor,
    Threadpool,
    Type,
    dequantize,
    ops,
    quantize,
)

SIZE = Context.size_for(16, 16)


def graph() -> tuple[Context, CGraph, Tensor]:
    """Return a small graph, and its last node."""
    ctx = Context(SIZE)
    a = ctx.new_tensor(Type.F32, (4, 3)).set_input()
    made = CGraph(ctx, 16)
    made.expand(last := ops.map_custom1(ctx, ops.add(ctx, a, a), np.copyto))
    return ctx, made, last


def owners(folder: Path) -> Iterator[Callable[[Backend], object]]:
    """Yield functions that make something and use it."""
    yield lambda backend: Context(1 << 16)
    yield lambda backend: Buffer.allocate(Device.cpu().buffer_type, 4096)
    yield lambda backend: Buffer.from_mapping(bytes(256))
    yield lambda backend: Threadpool(1)
    yield lambda backend: Backend(n_threads=1)
    yield lambda backend: compute(GAllocr(backend.device.buffer_type), backend)
    yield lambda backend: compute(Sched([backend]), backend)
    yield plan
    yield slots
    yield lambda backend: GGUFReader(folder / "one.gguf")
    yield lambda backend: header()
    yield lambda backend: Tensor.from_numpy(Context(SIZE), np.zeros((4, 3), np.float32)).to_numpy()
    yield lambda backend: dequantize(quantize(np.ones((2, 32), np.float32), Type.Q8_0), Type.Q8_0, 32)


def compute(allocr: GAllocr | Sched, backend: Backend) -> object:
    """Allocate a graph with it, compute it, and return it."""
    ctx, made, _ = graph()
    allocr.alloc_graph(made)
    if isinstance(allocr, Sched):
        allocr.compute(made)
    else:
        made.compute(backend)
    ctx.close()
    return allocr


def plan(backend: Backend) -> GraphPlan:
    """Return a plan that was computed once."""
    _, made, _ = graph()
    GAllocr(backend.device.buffer_type).alloc_graph(made)
    found = GraphPlan(backend, made)
    found.compute()
    return found


def slots(backend: Backend) -> Slots:
    """Return slots with one leaf."""
    source = Tensor.from_numpy(Context(SIZE), np.zeros((4, 3), np.float32))
    made = CGraph(Context(SIZE), 16)
    found = Slots(made)
    made.expand(ops.neg(made.ctx, found.add(source)))
    GAllocr(backend.device.buffer_type).alloc_graph(made)
    found.seal()
    return found


def header() -> GGUFWriter:
    """Return a writer with a key and a tensor."""
    writer = GGUFWriter()
    writer.set("general.name", "x", "str")
    writer.add_tensor("a", Type.F32, (4,))
    writer.header()
    return writer


def main() -> None:
    """Make and free."""
    n = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, Backend(n_threads=1) as backend:
        header().write(Path(folder) / "one.gguf", {"a": np.zeros(4, np.float32)})
        for make in owners(Path(folder)):
            for i in range(n):
                made = make(backend)
                if i % 2 and hasattr(made, "close"):
                    made.close()


if __name__ == "__main__":
    main()
