"""Call every op with right and wrong arguments, compute what they accept, and report what ends the process or hangs.

`python tests/ggml/fuzz_ops.py --cases 50000` runs the cases in processes of their own, each case written down before
it runs; `--replay CASE` runs one such line again.  Ends with status 1 if a process died, hung, or raised an exception
that is none of ours.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
from fuzz_cases import Case, Maker, signatures

from pyggml_adapt.errors import GGMLError
from pyggml_adapt.ggml import Backend, Buffer, CGraph, Context, GAllocr, Sched, Tensor, Type, ops

HANG = 10.0  # seconds, of a case
START = 120.0  # seconds, of a process
MAX_NBYTES = 1 << 21  # of all tensors of a graph that is computed: convolutions of more would take many seconds
N_TENSORS = 64
COUNTED = ("accepted", "refused", "computed")  # calls of an op
ALLOWED = (GGMLError, TypeError, ValueError, OverflowError)


class Runner:
    """Runs cases in this process."""

    def __init__(self) -> None:
        self.backends = {n: Backend(n_threads=n) for n in (1, 2)}
        self.buffer_type = self.backends[1].device.buffer_type
        with tempfile.TemporaryFile() as file:
            file.write(np.random.default_rng(1).integers(0, 4, 1 << 20, dtype=np.uint8).tobytes())
            file.flush()
            self.readonly = Buffer.from_mapping(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.closed = Context(1000)
        self.closed.close()

    def run(self, case: Case) -> tuple[bool, list[str]]:
        """Return whether the last step was accepted, and the exceptions that should not have been."""
        size = Context.size_for(N_TENSORS, N_TENSORS)
        self.contexts = {"own": Context(size), "foreign": Context(size), "closed": self.closed}
        self.buffers: list[Buffer] = []
        self.odd: list[str] = []
        self.tensors: dict[int, Tensor | None] = {}
        with suppress(*ALLOWED):
            for i, leaf in enumerate(case["leaves"]):
                self.tensors[i] = self.leaf(leaf)
        self.operands = dict(self.tensors)
        self.accepted: list[str] = []
        self.refused: list[str] = []
        for i, step in enumerate(case["steps"]):
            ok, found = self.step(step)
            self.tensors[1000 + i] = found
            (self.accepted if ok else self.refused).append(step["op"])
            given = [self.argument(each) for each in step["args"] if "t" in each]
            self.operands[1000 + i] = found or next(iter(given), None)  # of what is refused, its operand goes on
        self.computed: list[str] = []
        try:
            self.compute(case)
        except ALLOWED:
            pass
        except Exception as error:
            self.odd.append(f"compute: {type(error).__name__}: {error}")
        return ok, self.odd

    def leaf(self, leaf: Case) -> Tensor | None:
        """Return a new leaf, or None if there can be none such."""
        place = leaf["place"]
        tensor = self.contexts["foreign" if "foreign" in place else "own"].new_tensor(Type[leaf["type"]], leaf["ne"])
        if leaf.get("param"):
            tensor.set_param()
        if place == "graph":
            tensor.set_input()
        elif place == "readonly":
            with suppress(GGMLError):
                self.readonly.place(tensor, 0)
        elif place in ("buffer", "foreign") and tensor.nbytes < MAX_NBYTES:
            self.buffers.append(Buffer.allocate(self.buffer_type, tensor.nbytes + 64, clear=True))
            self.buffers[-1].place(tensor, 0)
        return tensor

    def argument(self, spec: Case) -> Any:
        """Return what a case says."""
        ((kind, value),) = spec.items()
        if kind == "t":
            return self.operands.get(value)
        if kind == "l":
            return [self.argument(each) for each in value]
        if kind == "c":
            return self.contexts[value]
        if kind == "f":
            return {"nothing": lambda *_: None, "raise": refuse, "number": 3, "write": write}[value]
        return None if kind == "none" else value

    def step(self, step: Case) -> tuple[bool, Tensor | None]:
        """Return whether the op took its arguments, and the tensor that it gave."""
        try:
            found = getattr(ops, step["op"])(*[self.argument(each) for each in step["args"]])
            repr(found)
        except ALLOWED:
            return False, None
        except Exception as error:
            self.odd.append(f"{step['op']}: {type(error).__name__}: {error}")
            return False, None
        return True, found if isinstance(found, Tensor) else None

    def compute(self, case: Case) -> None:
        """Compute everything that was accepted, and read it back."""
        own = self.contexts["own"]
        results = [t for i, t in self.tensors.items() if i >= 1000 and t is not None and t.ctx is own]
        graph = CGraph(own, N_TENSORS)
        for each in results:
            graph.expand(each.set_output())
        if results:  # beside which others, that ggml lets one thread compute, do not plan for more
            graph.expand(ops.silu(own, own.new_tensor(Type.F32, (4, 4))).set_output())
        if sum(each.nbytes for each in own.tensors()) > MAX_NBYTES:
            return
        random = np.random.default_rng(case["seed"])
        backend = self.backends[case["threads"]]
        with GAllocr(self.buffer_type) as allocr, Sched([backend]) as sched:
            if case["end"] != "empty":
                (sched if case["end"] == "sched" else allocr).alloc_graph(graph)
            for each in own.tensors():
                if each.op == "NONE" and each.is_allocated:
                    with suppress(GGMLError):  # read-only
                        each.set_data(contents(each, case["fill"], random))
            if case["end"] == "close" and self.buffers:
                self.contexts["foreign"].close()
                self.buffers[0].close()
            if case["end"] == "sched":
                sched.compute(graph)
            else:
                graph.compute(backend)
            self.computed = self.accepted
            for each in results:
                with suppress(*ALLOWED):
                    each.to_numpy().tobytes()


def refuse(*arrays: Any) -> None:
    """Raise an exception in a custom op."""
    raise ValueError("refused")


def write(*arrays: Any) -> None:
    """Write to the first array that a custom op is given."""
    arrays[0][...] = 1


def contents(tensor: Tensor, fill: str, random: np.random.Generator) -> bytes:
    """Return bytes for a leaf: indices are in range most of the time, if they are small."""
    n, dtype = tensor.nelements, {"F32": "f", "F16": "e", "F64": "d", "I32": "i", "I64": "q"}.get(tensor.type.name)
    if fill == "bytes" or dtype is None:
        return random.bytes(tensor.nbytes)
    if fill == "zeros":
        return bytes(tensor.nbytes)
    if dtype in "iq":
        return random.integers(*((0, 3) if fill == "small" else (-1, 5)), n).astype(dtype).tobytes()
    values = random.standard_normal(n)
    if fill == "special":
        values = random.choice([0.0, 1.0, -1.0, 1e30, -1e30, 1e-42, np.nan, np.inf, -np.inf], n)
    with np.errstate(over="ignore"):
        return values.astype(dtype).tobytes()


def work(seed: int, first: int, n: int) -> None:
    """Run n cases, writing each to stdout before, and after it what was odd, and what became of its ops."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ggml itself prints
    maker, runner = Maker(seed), Runner()
    for i in range(first, first + n):
        case = maker.make(i)
        print(json.dumps(case), file=out, flush=True)
        ok, odd = runner.run(case)
        if ok and len(case["steps"]) <= 4:
            maker.remember(case)
        done = {"odd": odd, "accepted": runner.accepted, "refused": runner.refused, "computed": runner.computed}
        print(json.dumps({"done": done}), file=out, flush=True)


class Worker:
    """A process that runs cases, and what it said last."""

    def __init__(self, seed: int, first: int, n: int):
        command = [sys.executable, __file__, "--worker", str(seed), str(first), str(n)]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        env = os.environ | {"GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, env=env)
        self.case: str | None = None
        self.n_done = 0
        self.odd: list[tuple[str, str | None]] = []
        self.counts: dict[str, Counter[str]] = {key: Counter() for key in COUNTED}

    def follow(self) -> str | None:
        """Wait until it ends, and return what was wrong, None if nothing."""
        with self.process, self.errors:
            return self.listen()

    def listen(self) -> str | None:
        assert self.process.stdout is not None
        fd, buffer, heard = self.process.stdout.fileno(), b"", time.monotonic()
        while True:
            if not select.select([fd], [], [], 0.5)[0]:
                limit = HANG if self.n_done else START
                if time.monotonic() - heard > limit:
                    self.process.kill()
                    self.process.wait()
                    return f"hangs: nothing for {limit:.0f} s"
                continue
            data, heard = os.read(fd, 1 << 16), time.monotonic()
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self.hear(line.decode())
        status = self.process.wait()
        self.errors.seek(0)
        tail = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        return None if status == 0 else f"ends with status {status}: {' | '.join(tail[:6])}"

    def hear(self, line: str) -> None:
        """Take one line."""
        if line.startswith('{"done"'):
            done = json.loads(line)["done"]
            self.odd += [(what, self.case) for what in done["odd"]]
            for key, names in self.counts.items():
                names.update(done[key])
        else:
            self.case, self.n_done = line, self.n_done + 1


def run(n_cases: int, seed: int, per_process: int) -> int:
    """Run the cases, print what went wrong and how often ops were accepted, and return the number of faults."""
    totals: dict[str, Counter[str]] = {key: Counter() for key in COUNTED}
    done, n_faults = 0, 0
    seen: Counter[str] = Counter()
    while done < n_cases:
        worker = Worker(seed, done, min(per_process, n_cases - done))
        fault = worker.follow()
        if not worker.n_done:
            raise SystemExit(f"a process that should run cases {fault or 'did nothing'}")
        faults = list(worker.odd) + ([(fault, worker.case)] if fault else [])
        for what, case in faults:
            n_faults += 1
            op = json.loads(case)["steps"][-1]["op"] if case else "?"
            seen[f"{op}: {what}"[:80]] += 1
            if seen[f"{op}: {what}"[:80]] <= 2:
                print(f"{op} {what}\n  --replay '{case}'", flush=True)
        for key, total in totals.items():
            total.update(worker.counts[key])
        done += worker.n_done
        seed += 1
    names = sorted(signatures())
    print(f"{done} cases of {len(names)} ops; {totals['accepted'].total()} calls accepted")
    for key, total in totals.items():
        never = [name for name in names if not total[name]]
        if never:
            print(f"never {key}: {', '.join(never)}")
    print(f"{n_faults} faults")
    return n_faults


def main() -> int:
    """Return 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first process (default: %(default)s)")
    parser.add_argument("--per-process", type=int, default=2500, help="cases in one process (default: %(default)s)")
    parser.add_argument("--replay", metavar="CASE", help="run this one case, in this process")
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return 0
    if args.replay:
        print(Runner().run(json.loads(args.replay)))
        return 0
    return int(run(args.cases, args.seed, args.per_process) > 0)


if __name__ == "__main__":
    sys.exit(main())
