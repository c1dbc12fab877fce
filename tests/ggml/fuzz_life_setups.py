"""Beginnings for fuzz_life.py: objects that belong together, so that more can be done with them than by chance."""

from __future__ import annotations

import random

import numpy as np

from pyggml_adapt.ggml import (
    SGD,
    Backend,
    Buffer,
    CGraph,
    Context,
    Device,
    GAllocr,
    OptContext,
    OptDataset,
    OptLossType,
    OptResult,
    Sched,
    Slots,
    Tensor,
    TensorTable,
    Type,
    ops,
)

Random = random.Random
CPU = Device.cpu().buffer_type


def prepared(r: Random) -> list[object]:
    """Return a graph, most of the time allocated, with all that it needs."""
    ctx, backend = Context(2 * Context.size_for(64, 128)), Backend(n_threads=r.choice((1, 1, 2)))
    a, b = (Tensor.from_numpy(ctx, np.ones((3, 4), np.float32)) for _ in range(2))
    node = r.choice((ops.add, ops.mul, ops.add_inplace, ops.mul_mat, ops.sub))(ctx, a.set_param(), b)
    last = ops.sum(ctx, node).set_loss()
    graph = CGraph(ctx, 128, grads=r.random() < 0.4)
    graph.expand(last)
    if graph.grads and r.random() < 0.8:
        graph.build_backward()
    made = [ctx, backend, a, b, node, last, graph]
    way = r.choice(("allocr", "allocr", "sched", "buffer", "nothing"))
    if way == "allocr":
        made.append(allocr := GAllocr(CPU))
        allocr.alloc_graph(graph)
    elif way == "sched":
        made.append(sched := Sched([backend] * r.choice((1, 1, 2))))
        sched.alloc_graph(graph)
    elif way == "buffer":
        made.append(ctx.alloc_tensors(CPU))
    return made


def slotted(r: Random) -> list[object]:
    """Return a graph with slots, what they can point at, and what all this needs."""
    ctx, backend = Context(Context.size_for(48, 64)), Backend(n_threads=1)
    weights = [Tensor.from_numpy(ctx, np.ones((3, 4), np.float32)) for _ in range(4)]
    home = Context(Context.size_for(48, 64))
    graph = CGraph(home, 64)
    slots = Slots(graph)
    a, b = slots.add(weights[0]), slots.add(weights[1])
    node = ops.scale(home, r.choice((ops.add, ops.mul_mat, ops.add_inplace))(home, a, b), 2.0)
    n_scales = int(r.random() < 0.3)
    if n_scales:
        slots.add_scale(node)
    graph.expand(node.set_output())
    allocr = GAllocr(CPU)
    allocr.alloc_graph(graph)
    if r.random() < 0.8:
        slots.seal()
    tables = [TensorTable(weights[i : i + 2], [0.5] * n_scales) for i in (0, 2)]
    return [ctx, home, backend, *weights, graph, slots, a, b, node, allocr, *tables]


def trained(r: Random) -> list[object]:
    """Return an OptContext for a single weight, and what it needs."""
    ctx, backend = Context(Context.size_for(64, 64)), Backend(n_threads=1)
    inputs = ctx.new_tensor(Type.F32, (4, 2)).set_input()
    weight = Tensor.from_numpy(ctx, np.ones((3, 4), np.float32)).set_param()
    buffer = Buffer.allocate(CPU, 4096, clear=True)
    buffer.place(inputs, 0)
    outputs = ops.mul_mat(ctx, weight, inputs).set_output()
    sched, dataset = Sched([backend]), OptDataset(np.ones((6, 4), np.float32), np.ones((6, 3), np.float32))
    loss = r.choice((OptLossType.MEAN_SQUARED_ERROR, OptLossType.SUM, OptLossType.MEAN))
    tensors = (inputs, outputs) if r.random() < 0.7 else ()
    opt = OptContext(sched, *tensors, loss_type=loss, optimizer=r.choice((None, SGD())), opt_period=r.choice((1, 3)))
    return [ctx, backend, inputs, buffer, outputs, sched, dataset, OptResult(), weight, opt]
