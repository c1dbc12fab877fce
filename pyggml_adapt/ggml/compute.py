"""The shortest way from tensors to their values: all that a graph needs, at once."""

from __future__ import annotations

import numpy as np

from pyggml_adapt.errors import ClosedError
from pyggml_adapt.ggml import ops
from pyggml_adapt.ggml.backend import Backend
from pyggml_adapt.ggml.context import Context, Tensor
from pyggml_adapt.ggml.graph import CGraph, GAllocr

SIZE = 2048  # nodes, and leaves, at most


def compute(*tensors: Tensor, backend: Backend | None = None) -> list[np.ndarray]:
    """Return the values of tensors as new arrays, in NumPy's order of dimensions, as Tensor.to_numpy has them.

    Everything that they are computed from is allocated for good, so that its values can be looked at afterwards, and
    that nothing is reused: for trying things out, not for large graphs or many calls.  backend: one on the CPU, made
    for this call, if None.  Releases the GIL.
    Raises: ClosedError if a leaf has no data; AllocError; as CGraph.compute.
    """
    if backend is None:
        with Backend() as backend:
            return compute(*tensors, backend=backend)
    with Context(Context.size_for(len(tensors), SIZE)) as ctx:
        graph = CGraph(ctx, SIZE)
        for tensor in tensors:
            graph.expand(ops.view_tensor(ctx, tensor))
        waiting: dict[Context, None] = {}
        for node in graph:
            if node.op == "RMS_NORM":  # which ggml skips, if only the product that follows reads it
                node.set_output()
            for each in (node, *node.src):
                if each.is_allocated or not each.nbytes or each.ctx is ctx:
                    continue
                if each.op == "NONE":
                    raise ClosedError(f"compute: leaf {each.name!r} has no data; use Tensor.from_numpy, or allocate it")
                waiting[each.ctx] = None
        for home in waiting:
            home.alloc_tensors(backend.device.buffer_type)
        allocr = GAllocr(backend.device.buffer_type)
        allocr.alloc_graph(graph)
        graph.compute(backend)
    return [np.array(tensor.to_numpy()) for tensor in tensors]
