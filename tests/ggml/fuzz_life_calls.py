"""Calls for fuzz_life.py: what makes, uses and ends contexts, buffers, allocators, graphs and what computes them.

A call is plain JSON: [name, numbers of the objects that it is given, seed of its own numbers].  Objects are numbered by
the call that gave them, so that leaving out calls moves no number.
"""

from __future__ import annotations

import gc
import mmap
import random
from collections.abc import Callable
from typing import Any

import fuzz_life_setups
import numpy as np

from pyggml_adapt.ggml import (
    Backend,
    Buffer,
    BufferUsage,
    CGraph,
    Context,
    Device,
    GAllocr,
    GraphPlan,
    OptContext,
    OptDataset,
    OptLossType,
    OptResult,
    Sched,
    Slots,
    Tensor,
    TensorTable,
    Threadpool,
    Type,
    compute,
    ops,
)

Random = random.Random
KINDS: dict[str, Any] = {
    "ctx": Context, "tensor": Tensor, "buffer": Buffer, "graph": CGraph, "allocr": GAllocr, "sched": Sched,
    "slots": Slots, "table": TensorTable, "plan": GraphPlan, "pool": Threadpool, "backend": Backend,
    "opt": OptContext, "dataset": OptDataset, "result": OptResult, "array": np.ndarray,
    "memory": (bytearray, bytes, mmap.mmap),
    "owner": (Context, Buffer, GAllocr, Sched, GraphPlan, Threadpool, Backend, OptContext, OptDataset),
    "any": object,
}  # fmt: skip
SHAPES = ((4,), (4, 3), (4, 3), (4, 3), (4, 3, 2), (3, 4), (4, 4), (4, 4), (64, 64), (1,), (4, 0), (1, 3))
TYPES = (Type.F32,) * 12 + (Type.F16, Type.I32, Type.I64)
CPU = Device.cpu().buffer_type
BYTES = 1 << 15  # of the largest tensor, about

CALLS: dict[str, tuple[tuple[str, ...], int, Callable[..., Any]]] = {}


def call(*kinds: str, weight: int = 4) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of a Random and objects of these kinds; "?" behind a kind: or None; "*": any number."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CALLS[function.__name__] = (kinds, weight, function)
        return function

    return register


# what makes something


call(weight=8)(fuzz_life_setups.prepared)
call(weight=3)(fuzz_life_setups.slotted)
call(weight=2)(fuzz_life_setups.trained)


@call()
def context(r: Random) -> object:
    return Context(r.choice((0, 1, 1000, Context.size_for(4), Context.size_for(32, 32), Context.size_for(64, 64))))


@call("ctx", weight=8)
def new_tensor(r: Random, ctx: Context) -> object:
    return ctx.new_tensor(r.choice(TYPES), r.choice(SHAPES), r.choice((None, "a", "b")))


@call("ctx", weight=6)
def from_numpy(r: Random, ctx: Context) -> object:
    array = np.ones(r.choice(SHAPES)[::-1], r.choice((np.float32, np.float32, np.float32, np.int32)))
    return [array, Tensor.from_numpy(ctx, array)]


@call("ctx", "tensor")
def from_dlpack(r: Random, ctx: Context, tensor: Tensor) -> object:
    return Tensor.from_dlpack(ctx, tensor)


@call("ctx")
def tensors(r: Random, ctx: Context) -> object:
    return r.sample(found := ctx.tensors(), min(2, len(found)))


@call("ctx", weight=6)
def alloc_tensors(r: Random, ctx: Context) -> object:
    return ctx.alloc_tensors(CPU)


@call()
def allocate(r: Random) -> object:
    return Buffer.allocate(CPU, r.choice((0, 1, 64, 4096, BYTES)), clear=r.random() < 0.5)


@call("memory?")
def from_mapping(r: Random, given: Any) -> object:
    if given is None:
        given = r.choice((bytearray, bytes, lambda n: mmap.mmap(-1, max(n, 1))))(r.choice((0, 64, 4096)))
    return [given, Buffer.from_mapping(given)]


@call("buffer", "tensor", weight=8)
def place(r: Random, buffer: Buffer, tensor: Tensor) -> object:
    return buffer.place(tensor, r.choice((0, 0, 0, 32, 2048, 1, 2**40)))


@call("ctx", weight=8)
def new_graph(r: Random, ctx: Context) -> object:
    return CGraph(ctx, r.choice((1, 4, 16, 32)), grads=r.random() < 0.4)


@call(weight=3)
def new_allocr(r: Random) -> object:
    return GAllocr(CPU)


@call("backend*", weight=3)
def new_sched(r: Random, *backends: Backend) -> object:
    return Sched(backends, r.choice((2048, 2048, 16, 1)))


@call("pool?", weight=3)
def new_backend(r: Random, pool: Threadpool | None) -> object:
    return Backend(n_threads=r.choice((1, 2))) if pool is None else Backend(threadpool=pool)


@call(weight=1)
def new_pool(r: Random) -> object:
    return Threadpool(r.choice((1, 2)), paused=r.random() < 0.3)


@call("graph")
def new_slots(r: Random, graph: CGraph) -> object:
    return Slots(graph)


@call("tensor*")
def new_table(r: Random, *tensors: Tensor) -> object:
    return TensorTable(tensors, [0.5] * r.choice((0, 0, 1)))


@call("backend", "graph")
def new_plan(r: Random, backend: Backend, graph: CGraph) -> object:
    return GraphPlan(backend, graph)


# ops


@call("ctx", "tensor", "tensor", weight=14)
def binary(r: Random, ctx: Context, a: Tensor, b: Tensor) -> object:
    op = r.choice((
        ops.add, ops.mul, ops.mul_mat, ops.add_inplace, ops.cpy, ops.concat, ops.add_cast, ops.repeat, ops.set_rows,
        ops.get_rows, ops.acc_inplace,
    ))  # fmt: skip
    if op in (ops.set_rows,):
        return op(ctx, a, b, b)
    if op is ops.add_cast:
        return op(ctx, a, b, Type.F32)
    if op is ops.concat:
        return op(ctx, a, b, 1)
    if op is ops.acc_inplace:
        return op(ctx, a, b, *a.nb[1:], 0)
    return op(ctx, a, b)


@call("ctx", "tensor", weight=14)
def unary(r: Random, ctx: Context, a: Tensor) -> object:
    op = r.choice((
        ops.view_tensor, ops.cont, ops.dup, ops.sqr, ops.sum, ops.relu_inplace, ops.soft_max, ops.transpose, ops.neg,
        ops.scale, ops.scale_inplace, ops.reshape, ops.view, ops.argmax, ops.mean,
    ))  # fmt: skip
    if op in (ops.scale, ops.scale_inplace):
        return op(ctx, a, 0.5)
    if op is ops.reshape:
        return op(ctx, a, (a.nelements,))
    if op is ops.view:
        return op(ctx, a, (max(a.nelements // 2, 1),), (), a.nb[0] * r.choice((0, 1, 2)))
    return op(ctx, a)


@call("ctx", "tensor", weight=5)
def custom(r: Random, ctx: Context, a: Tensor, *, world: Any) -> object:
    inner = world.inner(r.randrange(2**31))
    return r.choice((ops.map_custom1, ops.map_custom1_inplace))(ctx, a, inner)


# what is done with tensors


@call("tensor", weight=6)
def mark(r: Random, tensor: Tensor) -> object:
    getattr(tensor, r.choice(("set_input", "set_output", "set_param", "set_loss")))()
    return None


@call("tensor", weight=6)
def look(r: Random, tensor: Tensor) -> object:
    repr(tensor)
    return [tensor.ctx, *tensor.src[:1], *([tensor.view_src] if tensor.view_src is not None else [])]


@call("tensor", weight=6)
def set_data(r: Random, tensor: Tensor) -> object:
    return tensor.set_data(bytes(tensor.nbytes), r.choice((0, 0, 0, 4)))


@call("tensor")
def get_data(r: Random, tensor: Tensor) -> object:
    return tensor.get_data(bytearray(min(tensor.nbytes, BYTES)), r.choice((0, 0, 0, 4)))


@call("tensor", weight=2)
def memset(r: Random, tensor: Tensor) -> object:
    return tensor.memset(1, r.choice((0, 4, 2**40)), r.choice((None, 4, 2**63)))


@call("tensor", "tensor", weight=2)
def copy_from(r: Random, tensor: Tensor, other: Tensor) -> object:
    return tensor.copy_from(other)


@call("tensor", weight=8)
def to_numpy(r: Random, tensor: Tensor) -> object:
    return r.choice((Tensor.to_numpy, Tensor.to_numpy, np.from_dlpack, lambda t: np.asarray(memoryview(t))))(tensor)


@call("array", weight=6)
def write(r: Random, array: np.ndarray) -> object:
    array[...] = 0
    return array.copy() if r.random() < 0.2 else array[:1]


@call("ctx", "tensor", "tensor", weight=1)
def set_many(r: Random, ctx: Context, a: Tensor, b: Tensor) -> object:
    return ctx.set_data((a, b), (bytes(a.nbytes), bytes(b.nbytes)))


@call("tensor", "backend", "tensor", weight=3)
def asynchronous(r: Random, a: Tensor, backend: Backend, b: Tensor) -> object:
    way = r.choice(("set", "get", "copy", "synchronize", "supports"))
    if way == "set":
        return backend.set_async(a, bytes(a.nbytes))
    if way == "get":
        return backend.get_async(a, bytearray(a.nbytes))
    if way == "supports":
        return [backend.supports_op(a), backend.offload_op(b)][2:]
    return backend.copy_async(a, b) if way == "copy" else backend.synchronize()


# what is done with graphs


@call("graph", "tensor", weight=16)
def expand(r: Random, graph: CGraph, tensor: Tensor) -> object:
    return graph.expand(tensor)


@call("graph", weight=4)
def of_graph(r: Random, graph: CGraph) -> object:
    graph.to_dot()
    return [graph.node(r.choice((0, -1, 1))), *([found] if (found := graph.tensor("a")) is not None else [])]


@call("graph", weight=2)
def clear_graph(r: Random, graph: CGraph) -> object:
    return graph.clear()


@call("graph", "graph", weight=2)
def cpy_graph(r: Random, graph: CGraph, other: CGraph) -> object:
    return graph.cpy(other)


@call("graph", "ctx?", weight=2)
def dup_graph(r: Random, graph: CGraph, ctx: Context | None) -> object:
    return graph.dup(ctx, grads=r.random() < 0.3)


@call("graph", weight=4)
def backward(r: Random, graph: CGraph) -> object:
    return graph.build_backward()


@call("graph", "tensor", weight=3)
def grad(r: Random, graph: CGraph, tensor: Tensor) -> object:
    return [each for each in (graph.grad(tensor), graph.grad_acc(tensor)) if each is not None]


@call("graph", weight=3)
def reset_graph(r: Random, graph: CGraph) -> object:
    return graph.reset()


@call("allocr", "graph", weight=10)
def alloc_graph(r: Random, allocr: GAllocr, graph: CGraph) -> object:
    return allocr.reserve(graph) if r.random() < 0.15 else allocr.alloc_graph(graph)


@call("graph", "backend", weight=16)
def compute_graph(r: Random, graph: CGraph, backend: Backend) -> object:
    return graph.compute_async(backend) if r.random() < 0.2 else graph.compute(backend)


@call("graph", "backend", "tensor", weight=3)
def compute_result(r: Random, graph: CGraph, backend: Backend, result: Tensor) -> object:
    if len(graph) and r.random() < 0.8:  # by chance it is hardly ever one that is there in the end
        result = graph.node(-1)
    out = np.empty(result.nbytes, np.uint8)
    graph.compute(backend, result, out)
    return out


@call("tensor", weight=2)
def compute_all(r: Random, tensor: Tensor) -> object:
    return compute(tensor)


@call("plan", weight=6)
def compute_plan(r: Random, plan: GraphPlan) -> object:
    return plan.compute()


@call("sched", "graph", weight=6)
def sched_alloc(r: Random, sched: Sched, graph: CGraph) -> object:
    return sched.reserve(graph) if r.random() < 0.15 else sched.alloc_graph(graph)


@call("sched", "graph", weight=12)
def sched_compute(r: Random, sched: Sched, graph: CGraph) -> object:
    return sched.compute_async(graph) if r.random() < 0.2 else sched.compute(graph)


@call("sched", "tensor", "backend", weight=4)
def sched_others(r: Random, sched: Sched, tensor: Tensor, backend: Backend) -> object:
    way = r.choice(("reset", "reset", "assign", "assigned", "synchronize", "numbers"))
    if way == "assign":
        return sched.set_tensor_backend(tensor, backend)
    if way == "assigned":
        return sched.get_tensor_backend(tensor)
    if way == "numbers":
        return [sched.n_splits, sched.n_copies, sched.get_buffer_size(backend), *sched.backends][3:]
    return getattr(sched, way)()


@call("sched", weight=4)
def observe(r: Random, sched: Sched, *, world: Any) -> object:
    sched.eval_callback = r.choice((None, world.inner(r.randrange(2**31)), world.inner(r.randrange(2**31))))
    return None


@call("slots", "tensor", weight=6)
def add_slot(r: Random, slots: Slots, tensor: Tensor) -> object:
    return slots.add_scale(tensor) if r.random() < 0.2 else slots.add(tensor)


@call("slots", "table", weight=6)
def bind(r: Random, slots: Slots, table: TensorTable) -> object:
    return slots.seal() if r.random() < 0.2 else slots.bind(table)


# what is done with the others


@call("buffer", weight=3)
def clear_buffer(r: Random, buffer: Buffer) -> object:
    buffer.usage = r.choice(list(BufferUsage))
    return buffer.clear(r.choice((0, 1)))


@call("backend", weight=2)
def abort_flag(r: Random, backend: Backend) -> object:
    backend.abort_flag = r.random() < 0.3


@call("pool", weight=2)
def pause(r: Random, pool: Threadpool) -> object:
    return pool.pause() if r.random() < 0.5 else pool.resume()


@call("sched", "tensor?", "tensor?", weight=2)
def new_opt(r: Random, sched: Sched, inputs: Tensor | None, outputs: Tensor | None) -> object:
    return OptContext(sched, inputs, outputs, loss_type=r.choice(list(OptLossType)), opt_period=r.choice((1, 2)))


@call(weight=1)
def new_dataset(r: Random) -> object:
    return [
        OptDataset(np.ones((6, 4), np.float32), np.ones((6, 3), np.float32), ndata_shard=r.choice((1, 2))),
        OptResult(),
    ]


@call("opt", "tensor", weight=3)
def prepare(r: Random, opt: OptContext, weight: Tensor) -> object:
    ctx = Context(OptContext.size_for(8, 256))
    graph = CGraph(ctx, 256)
    inputs = ctx.new_tensor(Type.F32, (4, 2)).set_input()
    outputs = graph.expand(ops.mul_mat(ctx, weight, inputs))
    opt.prepare_alloc(graph, inputs, outputs)
    return [ctx, graph, inputs, outputs]


@call("opt", "result?", weight=6)
def step(r: Random, opt: OptContext, result: OptResult | None) -> object:
    opt.alloc(backward=r.random() < 0.7)
    if r.random() < 0.8:
        opt.eval(result)
    return None


@call("opt", "dataset", "result?", weight=6)
def epoch(r: Random, opt: OptContext, dataset: OptDataset, result: OptResult | None, *, world: Any) -> object:
    callback = world.inner(r.randrange(2**31)) if r.random() < 0.5 else None
    return opt.epoch(dataset, result, result if r.random() < 0.2 else None, r.choice((-1, 4, 2)), callback, callback)


@call("opt", "tensor", weight=4)
def of_opt(r: Random, opt: OptContext, tensor: Tensor) -> object:
    if r.random() < 0.3:
        opt.reset(optimizer=r.random() < 0.5)
    found = [opt.labels, opt.loss, opt.pred, opt.ncorrect, opt.grad_acc(tensor), opt.inputs, opt.outputs]
    return [each for each in found if each is not None]


@call("dataset", "opt", "result", weight=2)
def of_dataset(r: Random, dataset: OptDataset, opt: OptContext, result: OptResult) -> object:
    dataset.shuffle(opt, r.choice((-1, 2)))
    return [*dataset.get_batch(0, 2), *((result.loss, result.accuracy, result.pred)[:0])]


@call("owner", weight=12)
def close(r: Random, owner: Any) -> object:
    return owner.close()


@call("any", weight=10)
def drop(r: Random, owner: object) -> object:
    return None


@call(weight=1)
def collect(r: Random) -> object:
    gc.collect()
    return None
