"""What it costs to call ggml from Python: through our ops, and through ggml-python, which is ctypes.

Nothing is computed: a graph is built of tensors that have no data.  Each package is in a process of its own, as each
has a ggml of its own; the processes take turns.  `python ggml_calls.py --python PYTHON` measures by hand, PYTHON being
one that has ggml-python 0.0.45.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

N_LAYERS, N_EMBD, N_HEAD, N_HEAD_KV, N_HEAD_DIM, N_FF, N_VOCAB, N_CTX, N_KV = (
    32,
    4096,
    32,
    8,
    128,
    14336,
    128256,
    512,
    256,
)
WEIGHTS = {
    "attn_norm": (N_EMBD,), "wq": (N_EMBD, N_HEAD * N_HEAD_DIM), "wk": (N_EMBD, N_HEAD_KV * N_HEAD_DIM),
    "wv": (N_EMBD, N_HEAD_KV * N_HEAD_DIM), "wo": (N_HEAD * N_HEAD_DIM, N_EMBD), "ffn_norm": (N_EMBD,),
    "gate": (N_EMBD, N_FF), "up": (N_EMBD, N_FF), "down": (N_FF, N_EMBD),
    "k": (N_HEAD_KV * N_HEAD_DIM, N_CTX), "v": (N_HEAD_KV * N_HEAD_DIM, N_CTX),
}  # fmt: skip
N_NODES = 2048
N_GRAPHS = 10  # one after another in a round
N_CALLS = 300  # of a single op, in one context
ROPE = (N_HEAD_DIM, 0, 8192, 500000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
SCALE = N_HEAD_DIM**-0.5
F32, F16, I32 = 0, 1, 26  # ggml_type
ROW, HEAD = 2 * N_HEAD_KV * N_HEAD_DIM, 2 * N_HEAD_DIM  # bytes of F16


class Ours:
    """Our ops."""

    def __init__(self) -> None:
        from pyggml_adapt.ggml import CGraph, Context, ops

        self.Context, self.CGraph, self.ops = Context, CGraph, ops
        self.store = Context(Context.size_for(N_LAYERS * len(WEIGHTS) + 16))
        self.size = Context.size_for(N_NODES, N_NODES)

        def new(ne: tuple[int, ...], type: int) -> Any:
            return self.store.new_tensor(type, ne)

        self.layers, self.ends, self.inputs = make_tensors(new)

    def context(self) -> Any:
        return self.Context(self.size)

    def free(self, ctx: Any) -> None:
        ctx.close()

    def build(self) -> int:
        """Build one token's graph, and return the number of its nodes."""
        o, ctx = self.ops, self.Context(self.size)
        graph = self.CGraph(ctx, N_NODES)
        embd, output_norm, output = self.ends
        token, pos, mask = self.inputs
        x = o.get_rows(ctx, embd, token)
        for w in self.layers:
            cur = o.mul(ctx, o.rms_norm(ctx, x, 1e-5), w["attn_norm"])
            q = o.reshape(ctx, o.mul_mat(ctx, w["wq"], cur), N_HEAD_DIM, N_HEAD, 1)
            k = o.reshape(ctx, o.mul_mat(ctx, w["wk"], cur), N_HEAD_DIM, N_HEAD_KV, 1)
            v = o.mul_mat(ctx, w["wv"], cur)
            q = o.rope_ext(ctx, q, pos, None, *ROPE)
            k = o.rope_ext(ctx, k, pos, None, *ROPE)
            graph.expand(o.cpy(ctx, k, o.view(ctx, w["k"], (N_HEAD_DIM, N_HEAD_KV, 1), (HEAD, ROW), 7 * ROW)))
            graph.expand(o.cpy(ctx, v, o.view(ctx, w["v"], (N_HEAD_KV * N_HEAD_DIM, 1), (ROW,), 7 * ROW)))
            q = o.permute(ctx, q, 0, 2, 1, 3)
            keys = o.permute(ctx, o.view(ctx, w["k"], (N_HEAD_DIM, N_HEAD_KV, N_KV), (HEAD, ROW)), 0, 2, 1, 3)
            values = o.permute(ctx, o.view(ctx, w["v"], (N_HEAD_DIM, N_HEAD_KV, N_KV), (HEAD, ROW)), 1, 2, 0, 3)
            kq = o.soft_max_ext(ctx, o.mul_mat(ctx, keys, q), mask, SCALE, 0.0)
            kqv = o.permute(ctx, o.mul_mat(ctx, o.cont(ctx, values), kq), 0, 2, 1, 3)
            attn = o.mul_mat(ctx, w["wo"], o.cont(ctx, kqv, N_EMBD, 1))
            x = o.add(ctx, attn, x)
            cur = o.mul(ctx, o.rms_norm(ctx, x, 1e-5), w["ffn_norm"])
            cur = o.mul(ctx, o.silu(ctx, o.mul_mat(ctx, w["gate"], cur)), o.mul_mat(ctx, w["up"], cur))
            x = o.add(ctx, o.mul_mat(ctx, w["down"], cur), x)
        x = o.mul(ctx, o.rms_norm(ctx, x, 1e-5), output_norm)
        graph.expand(o.mul_mat(ctx, output, x))
        n = graph.n_nodes
        ctx.close()
        return n

    def calls(self, ctx: Any) -> dict[str, Callable[[], Any]]:
        """Return the single calls, into ctx."""
        o, w, x = self.ops, self.layers[0], ctx.new_tensor(F32, (N_EMBD, 1))
        return {
            "mul_mat": lambda: o.mul_mat(ctx, w["wq"], x),
            "add": lambda: o.add(ctx, x, x),
            "rms_norm": lambda: o.rms_norm(ctx, x, 1e-5),
            "view": lambda: o.view(ctx, w["k"], (N_HEAD_DIM, N_HEAD_KV), (HEAD,), ROW),
        }


class Theirs:
    """ggml-python's functions."""

    def __init__(self) -> None:
        import ggml

        self.g = ggml
        self.store = self.new_context(ggml.ggml_tensor_overhead() * (N_LAYERS * len(WEIGHTS) + 16))
        self.size = ggml.ggml_tensor_overhead() * N_NODES + ggml.ggml_graph_overhead_custom(N_NODES, False)

        def new(ne: tuple[int, ...], type: int) -> Any:
            full = (*ne, 1, 1, 1)
            return ggml.ggml_new_tensor_4d(self.store, type, *full[:4])

        self.layers, self.ends, self.inputs = make_tensors(new)

    def new_context(self, size: int) -> Any:
        return self.g.ggml_init(self.g.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True))

    def context(self) -> Any:
        return self.new_context(self.size)

    def free(self, ctx: Any) -> None:
        self.g.ggml_free(ctx)

    def build(self) -> int:
        """Build one token's graph, and return the number of its nodes."""
        g, ctx = self.g, self.new_context(self.size)
        graph = g.ggml_new_graph_custom(ctx, N_NODES, False)
        embd, output_norm, output = self.ends
        token, pos, mask = self.inputs
        x = g.ggml_get_rows(ctx, embd, token)
        for w in self.layers:
            cur = g.ggml_mul(ctx, g.ggml_rms_norm(ctx, x, 1e-5), w["attn_norm"])
            q = g.ggml_reshape_3d(ctx, g.ggml_mul_mat(ctx, w["wq"], cur), N_HEAD_DIM, N_HEAD, 1)
            k = g.ggml_reshape_3d(ctx, g.ggml_mul_mat(ctx, w["wk"], cur), N_HEAD_DIM, N_HEAD_KV, 1)
            v = g.ggml_mul_mat(ctx, w["wv"], cur)
            q = g.ggml_rope_ext(ctx, q, pos, None, *ROPE)
            k = g.ggml_rope_ext(ctx, k, pos, None, *ROPE)
            to = g.ggml_view_3d(ctx, w["k"], N_HEAD_DIM, N_HEAD_KV, 1, HEAD, ROW, 7 * ROW)
            g.ggml_build_forward_expand(graph, g.ggml_cpy(ctx, k, to))
            to = g.ggml_view_2d(ctx, w["v"], N_HEAD_KV * N_HEAD_DIM, 1, ROW, 7 * ROW)
            g.ggml_build_forward_expand(graph, g.ggml_cpy(ctx, v, to))
            q = g.ggml_permute(ctx, q, 0, 2, 1, 3)
            keys = g.ggml_view_3d(ctx, w["k"], N_HEAD_DIM, N_HEAD_KV, N_KV, HEAD, ROW, 0)
            keys = g.ggml_permute(ctx, keys, 0, 2, 1, 3)
            values = g.ggml_view_3d(ctx, w["v"], N_HEAD_DIM, N_HEAD_KV, N_KV, HEAD, ROW, 0)
            values = g.ggml_permute(ctx, values, 1, 2, 0, 3)
            kq = g.ggml_soft_max_ext(ctx, g.ggml_mul_mat(ctx, keys, q), mask, SCALE, 0.0)
            kqv = g.ggml_permute(ctx, g.ggml_mul_mat(ctx, g.ggml_cont(ctx, values), kq), 0, 2, 1, 3)
            attn = g.ggml_mul_mat(ctx, w["wo"], g.ggml_cont_2d(ctx, kqv, N_EMBD, 1))
            x = g.ggml_add(ctx, attn, x)
            cur = g.ggml_mul(ctx, g.ggml_rms_norm(ctx, x, 1e-5), w["ffn_norm"])
            gate = g.ggml_silu(ctx, g.ggml_mul_mat(ctx, w["gate"], cur))
            x = g.ggml_add(
                ctx, g.ggml_mul_mat(ctx, w["down"], g.ggml_mul(ctx, gate, g.ggml_mul_mat(ctx, w["up"], cur))), x
            )
        x = g.ggml_mul(ctx, g.ggml_rms_norm(ctx, x, 1e-5), output_norm)
        g.ggml_build_forward_expand(graph, g.ggml_mul_mat(ctx, output, x))
        n = g.ggml_graph_n_nodes(graph)
        g.ggml_free(ctx)
        return n

    def calls(self, ctx: Any) -> dict[str, Callable[[], Any]]:
        """Return the single calls, into ctx."""
        g, w, x = self.g, self.layers[0], self.g.ggml_new_tensor_2d(ctx, F32, N_EMBD, 1)
        return {
            "mul_mat": lambda: g.ggml_mul_mat(ctx, w["wq"], x),
            "add": lambda: g.ggml_add(ctx, x, x),
            "rms_norm": lambda: g.ggml_rms_norm(ctx, x, 1e-5),
            "view": lambda: g.ggml_view_2d(ctx, w["k"], N_HEAD_DIM, N_HEAD_KV, HEAD, ROW),
        }


def make_tensors(
    new: Callable[[tuple[int, ...], int], Any],
) -> tuple[list[dict[str, Any]], tuple[Any, ...], tuple[Any, ...]]:
    """Return the weights and caches of each layer, those of the ends, and the inputs: token, position, mask."""
    layers = [{name: new(ne, F32 if len(ne) == 1 else F16) for name, ne in WEIGHTS.items()} for _ in range(N_LAYERS)]
    ends = (new((N_EMBD, N_VOCAB), F16), new((N_EMBD,), F32), new((N_EMBD, N_VOCAB), F16))
    return layers, ends, (new((1,), I32), new((1,), I32), new((N_KV, 1), F32))


def time_once(engine: Ours | Theirs) -> dict[str, float]:
    """Return the microseconds of one graph, and of one call of each op."""
    start = perf_counter()
    for _ in range(N_GRAPHS):
        n_nodes = engine.build()
    found = {"graph": (perf_counter() - start) / N_GRAPHS * 1e6, "n_nodes": float(n_nodes)}
    ctx = engine.context()
    for name, call in engine.calls(ctx).items():
        start = perf_counter()
        for _ in range(N_CALLS):
            call()
        found[name] = (perf_counter() - start) / N_CALLS * 1e6
    engine.free(ctx)
    return found


def serve(engine: Ours | Theirs) -> None:
    """Measure once for each line that comes in, always on the same processor: they are not equally fast at a time."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for _ in range(3):
        time_once(engine)
    for _ in sys.stdin:
        print(json.dumps(time_once(engine)), flush=True)


def measure(python: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the figures of each round, ours and theirs, the processes taking turns."""
    commands = {
        "ours": [sys.executable, __file__, "--serve", "ours"],
        "theirs": [python, __file__, "--serve", "theirs"],
    }
    processes = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in processes}
    for i in range(rounds):
        for name in list(processes)[:: 1 if i % 2 else -1]:
            process = processes[name]
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(commands[name])} ended with status {process.wait()}")
            for case, value in json.loads(line).items():
                found[name].setdefault(case, []).append(value)
    for process in processes.values():
        process.communicate()
    return found


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="a Python that has ggml-python 0.0.45")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(Ours() if args.serve == "ours" else Theirs())
        return
    if not args.python:
        parser.error("--python is needed")
    found = measure(args.python, args.rounds)
    for case in found["ours"]:
        ours, theirs = median(found["ours"][case]), median(found["theirs"][case])
        print(f"{case:10}{ours:12.2f}{theirs:12.2f}{ours / theirs:8.2f}")


if __name__ == "__main__":
    main()
