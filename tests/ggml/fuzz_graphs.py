"""Random graphs of right calls: in memory that nodes share they give what they give with memory for each node, and the
gradients that ggml builds are those of differences.

    python tests/ggml/fuzz_graphs.py [--graphs N] [--seed S]
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable

import numpy as np

from pyggml_adapt.errors import GGMLError
from pyggml_adapt.ggml import Backend, CGraph, Context, GAllocr, Sched, Tensor, ops

SIZE = 1024  # nodes
LARGEST = 2000  # elements of a tensor
TRIES = 60


class Graph:
    """What one seed gives: the same nodes each time, over arrays that may differ."""

    def __init__(self, seed: int, arrays: list[np.ndarray], *, differentiable: bool):
        self.random = random.Random(seed)
        self.leaves, self.ctx = Context(Context.size_for(400)), Context(3 * Context.size_for(SIZE, SIZE))
        self.params = [self.leaf(array.copy()) for array in arrays]
        self.tensors = [param.set_param() if differentiable else param for param in self.params]
        steps = SMOOTH if differentiable else SMOOTH + OTHERS
        n_left = self.random.randint(3, 12)
        for _ in range(TRIES):
            t = self.one_of(self.tensors) if self.random.random() < 0.4 else self.tensors[-1]
            try:
                found = self.one_of(steps)(self, t)
            except (GGMLError, IndexError):  # it does not fit t, or there is no operand that does
                continue
            if found.nelements <= LARGEST:
                self.tensors.append(found)
                n_left -= 1
            if not n_left:
                break

    def leaf(self, array: np.ndarray) -> Tensor:
        return Tensor.from_numpy(self.leaves, np.ascontiguousarray(array))

    def one_of(self, found):
        return self.random.choice(found)

    def up_to(self, n: int) -> int:
        return self.random.randint(0, n)

    def like(self, t: Tensor, fits: Callable[[int, int], bool] = int.__eq__) -> Tensor:
        """Return a tensor each of whose dimensions fits that of t."""
        return self.one_of([p for p in self.tensors if all(map(fits, p.ne, t.ne))])

    def picks(self, n: int, *shape: int) -> Tensor:
        """Return an I32 leaf of numbers below n."""
        return self.leaf(np.array([self.up_to(n - 1) for _ in range(int(np.prod(shape)))], "i").reshape(shape))

    def outputs(self) -> list[Tensor]:
        """Return the last tensor and some others, as contiguous outputs."""
        chosen = [self.tensors[-1], *(t for t in self.tensors if self.random.random() < 0.15)]
        return [ops.scale(self.ctx, ops.cont(self.ctx, t), 1.0).set_output() for t in chosen]


def divides(a: int, b: int) -> bool:
    return b % a == 0


def part_of(g: Graph, t: Tensor, sizes: list[int]) -> int:
    """Return the offset in bytes of a part of t that has these sizes."""
    return sum(g.up_to(n - size) * nb for n, size, nb in zip(t.ne, sizes, t.nb, strict=True))


def view(g: Graph, t: Tensor) -> Tensor:
    sizes = [g.random.randint(1, n) for n in t.ne]
    return ops.view(g.ctx, t, sizes, t.nb[1:], part_of(g, t, sizes))


def put(op: Callable[..., Tensor]) -> Callable[[Graph, Tensor], Tensor]:
    def step(g: Graph, t: Tensor) -> Tensor:
        part = g.like(t, int.__le__)
        return op(g.ctx, t, part, *t.nb[1:], part_of(g, t, list(part.ne)))

    return step


def permute(g: Graph, t: Tensor) -> Tensor:
    t = ops.reshape(g.ctx, t, *t.ne) if g.up_to(1) else t
    return ops.permute(g.ctx, t, *g.random.sample(range(4), 4))


def positive(g: Graph, t: Tensor, least: float) -> Tensor:
    return ops.scale_bias(g.ctx, ops.sqr(g.ctx, t), 1.0, least)


def product(g: Graph, t: Tensor) -> Tensor:
    return ops.scale(g.ctx, ops.mul_mat(g.ctx, g.one_of([p for p in g.tensors if p.ne[0] == t.ne[0]]), t), 1 / t.ne[0])


def rope(g: Graph, t: Tensor) -> Tensor:
    return ops.rope(g.ctx, t, g.picks(20, t.ne[2]), 2, g.one_of([0, 2]))


def get_rows(g: Graph, t: Tensor) -> Tensor:
    return ops.get_rows(g.ctx, t, g.picks(t.ne[1], t.ne[3], t.ne[2], 3))


def add_id(g: Graph, t: Tensor) -> Tensor:
    b = g.one_of([p for p in g.tensors if p.ne[0] == t.ne[0] and p.ne[2:] == (1, 1)])
    return ops.add_id(g.ctx, t, b, g.picks(b.ne[1], t.ne[2], t.ne[1]))


def with_sinks(g: Graph, t: Tensor) -> Tensor:
    return ops.soft_max_ext(g.ctx, t, None, 0.7, sinks=g.one_of([p for p in g.tensors if p.ne == (t.ne[2], 1, 1, 1)]))


def plain(op: Callable[..., Tensor]) -> Callable[[Graph, Tensor], Tensor]:
    return lambda g, t: op(g.ctx, t)


def with_other(op: Callable[..., Tensor], fits: Callable[[int, int], bool]) -> Callable[[Graph, Tensor], Tensor]:
    return lambda g, t: op(g.ctx, t, g.like(t, fits))


SMOOTH = [
    *map(plain, (ops.silu, ops.sqr, ops.sin, ops.cos, ops.softplus, ops.neg, ops.cont, ops.dup, ops.sum_rows)),
    *map(plain, (ops.transpose, ops.view_tensor, ops.soft_max, ops.soft_max)),
    *[with_other(op, divides) for op in (ops.add, ops.add, ops.sub, ops.mul, ops.mul)],
    with_other(ops.swiglu_split, int.__eq__),
    lambda g, t: ops.exp(g.ctx, ops.sin(g.ctx, t)),
    lambda g, t: ops.log(g.ctx, positive(g, t, 0.5)),
    lambda g, t: ops.sqrt(g.ctx, positive(g, t, 0.5)),
    lambda g, t: ops.div(g.ctx, t, positive(g, g.like(t, divides), 1.0)),
    lambda g, t: ops.reshape(g.ctx, t, *g.random.sample(t.ne, 4)),
    lambda g, t: ops.repeat_4d(g.ctx, t, *[n * g.one_of([1, 1, 2]) for n in t.ne]),
    lambda g, t: ops.scale(g.ctx, ops.repeat_back(g.ctx, ops.repeat_4d(g.ctx, t, *[2 * n for n in t.ne]), t), 1 / 16),
    lambda g, t: ops.rms_norm(g.ctx, t, 0.1),
    lambda g, t: ops.mul(g.ctx, ops.rms_norm(g.ctx, t, 0.1), g.like(t, divides)),
    lambda g, t: ops.scale_bias(g.ctx, t, g.one_of([0.5, 2.0]), 0.3),
    lambda g, t: ops.diag_mask_zero(g.ctx, t, g.up_to(1)),
    lambda g, t: ops.cpy(g.ctx, t, g.leaf(np.zeros(t.shape, "f"))),
    *(permute, product, view, put(ops.acc), put(ops.set), rope, get_rows),
]
OTHERS = [
    *[with_other(op, int.__eq__) for op in (ops.soft_max_ext_back, ops.silu_back)],
    lambda g, t: ops.rms_norm_back(g.ctx, t, g.like(t), 0.1),
    lambda g, t: ops.concat(g.ctx, t, g.like(t), g.up_to(3)),
    lambda g, t: ops.soft_max_ext(g.ctx, t, g.one_of([p for p in g.tensors if p.ne[0] == t.ne[0]]), 0.7),
    lambda g, t: ops.clamp(g.ctx, t, -0.5, 0.5),
    lambda g, t: ops.group_norm(g.ctx, t, 1, 0.1),
    lambda g, t: ops.norm(g.ctx, t, 0.1),
    *(plain(ops.swiglu), add_id, with_sinks),
]


def arrays_of(seed: int) -> list[np.ndarray]:
    """Return what the first tensors of a graph hold."""
    r, rng = random.Random(seed), np.random.default_rng(seed)
    n, m = r.choice([2, 3, 4, 6, 8]), r.choice([1, 2, 3, 4, 6])
    shapes = [(r.choice([1, 1, 2]), r.choice([m, n, 1]), r.choice([n, n, m, n * m])) for _ in range(r.randint(1, 3))]
    return [(rng.uniform(0.3, 1.2, shape) * rng.choice([-1, 1], shape)).astype("f") for shape in shapes]


def values(seed: int, backend: Backend, *, memory: str) -> list[np.ndarray]:
    """Return the outputs of a graph.  memory: whose nodes are computed in: "own", or that of a GAllocr or a Sched."""
    g = Graph(seed, arrays_of(seed), differentiable=False)
    graph, outs = CGraph(g.ctx, SIZE), g.outputs()
    for out in outs:
        graph.expand(out)
    if memory == "Sched":
        sched = Sched([backend])
        sched.alloc_graph(graph)
        sched.compute(graph)
    else:
        allocr = GAllocr(backend.device.buffer_type)
        if memory == "own":
            g.ctx.alloc_tensors(backend.device.buffer_type)
        allocr.alloc_graph(graph)
        graph.compute(backend)
    return [np.array(out.to_numpy()) for out in outs]


def loss_of(seed: int, arrays: list[np.ndarray], backend: Backend, *, memory: str) -> tuple[float, list[np.ndarray]]:
    """Return the loss of a graph, and its gradients by the arrays if memory is not "none"."""
    g = Graph(seed, arrays, differentiable=True)
    out = g.tensors[-1]
    weights = g.leaf(np.random.default_rng(seed).uniform(0.5, 1.5, out.shape).astype("f"))
    loss = ops.sum(g.ctx, ops.mul(g.ctx, out if out.nb[0] == 4 else ops.cont(g.ctx, out), weights))
    graph, allocr = CGraph(g.ctx, SIZE, grads=True), GAllocr(backend.device.buffer_type)
    graph.expand(loss.set_loss().set_output())
    grads: list[Tensor | None] = []
    if memory != "none":
        graph.build_backward()
        grads = [None if (each := graph.grad(param)) is None else each.set_output() for param in g.params]
    if memory != "shared":
        g.ctx.alloc_tensors(backend.device.buffer_type)
    allocr.alloc_graph(graph)
    if grads:
        graph.reset()
    graph.compute(backend)
    found = [np.zeros_like(a) if t is None else np.array(t.to_numpy()) for t, a in zip(grads, arrays, strict=False)]
    return loss.to_numpy().item(), [grad.reshape(a.shape) for grad, a in zip(found, arrays, strict=False)]


def check_values(seed: int, backends: list[Backend]) -> str:
    """Return "same", or what differs when nodes share memory; bounds: another order of F32 sums."""
    expected = values(seed, backends[0], memory="own")
    for memory, backend in (("GAllocr", backends[seed % 2]), ("Sched", backends[(seed + 1) % 2])):
        for a, b in zip(expected, values(seed, backend, memory=memory), strict=True):
            largest = np.abs(a, where=np.isfinite(a), out=np.zeros_like(a)).max()
            if not np.allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + largest), equal_nan=True):
                return f"differs in the memory of a {memory}"
    return "same"


def check_gradients(seed: int, backends: list[Backend]) -> str:
    """Return "right", or what is wrong with the gradients; "unclear" where differences of three widths differ."""
    arrays = arrays_of(seed)
    try:
        loss, grads = loss_of(seed, arrays, backends[0], memory="own")
    except GGMLError:
        return "refused"
    for a, b in zip(grads, loss_of(seed, arrays, backends[1], memory="shared")[1], strict=True):
        if not np.allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(a).max() + 1e-6, equal_nan=True):
            return "gradients differ in shared memory"
    rng = np.random.default_rng(seed)
    for i, array in enumerate(arrays):
        direction = rng.standard_normal(array.shape).astype("f")
        slopes = []
        for width in (2e-2, 1e-2, 5e-3):
            ends = []
            for step in (width, -width):
                moved = [*arrays[:i], array + np.float32(step) * direction, *arrays[i + 1 :]]
                ends.append(loss_of(seed, moved, backends[0], memory="none")[0])
            slopes.append((ends[0] - ends[1]) / (2 * width))
        along = float((grads[i] * direction).sum())
        scale = 1 + float(np.abs(grads[i] * direction).sum())
        # not smooth, or beyond what F32 resolves, as the sine of a large number is
        if max(slopes) - min(slopes) > 1e-2 * scale or 2e-2 * scale > 100 * (1 + abs(loss)):
            return "unclear"
        if not abs(slopes[1] - along) < 2e-2 * scale + 1e-4 * abs(loss):
            return f"gradient {i} is {along:.4g} along a direction, not {slopes[1]:.4g}"
    return "right"


def run(n_graphs: int, seed: int) -> int:
    """Check n_graphs graphs forward, and as many backward; print what was found, and return how many are wrong."""
    found: Counter[str] = Counter()
    with Backend(n_threads=1) as one, Backend(n_threads=2) as two:
        for at in range(seed, seed + n_graphs):
            for check in (check_values, check_gradients):
                result = check(at, [one, two])
                found[result] += 1
                if result not in ("same", "right", "refused", "unclear"):
                    print(f"seed {at}: {result}")
    print(", ".join(f"{n} {what}" for what, n in found.most_common()))
    return 2 * n_graphs - sum(found[what] for what in ("same", "right", "refused", "unclear"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    raise SystemExit(run(args.graphs, args.seed) > 0)
