"""Make random calls on contexts, buffers, allocators, graphs and what computes them, in any order; close at any moment.

`python tests/ggml/fuzz_life.py --programs 500` runs that many sequences of calls, each in a process of its own, and
prints those that ended it, hung, or raised an exception that is none of ours, with the calls left out that it takes
no part of; `--replay CALLS` runs one such line again.  `--threads 2` lets two threads make the calls.  Ends with
status 1 if something was found.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

if __name__ == "__main__" and "MALLOC_PERTURB_" not in os.environ:  # freed memory is overwritten, or gone
    os.environ |= {"MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": "8192", "OPENBLAS_NUM_THREADS": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
from fuzz_life_calls import CALLS, KINDS

from pyggml_adapt.errors import Error

HANG = 20.0  # seconds, of a program
ALLOWED = (Error, TypeError, ValueError, IndexError, BufferError, OverflowError, MemoryError)
NEEDS_WORLD = ("custom", "observe", "epoch")
NOT_BESIDE = ("compute_result",)  # what another thread may not see
ODD = 77  # the status of a program in which something was raised that should not be

Call = list[Any]  # its number, its name, the numbers of its objects, the seed of its own numbers


class World:
    """The objects that there are, by number, and what makes calls with them.  say: told each call before it is made."""

    def __init__(self, say: Callable[[Call], None], n_threads: int):
        self.objects: dict[str, object] = {}
        self.odd: list[str] = []
        self.counts: Counter[str] = Counter()
        self._say, self._n_threads, self._inside = say, n_threads, threading.local()
        sys.unraisablehook = lambda what: self.odd.append(f"ignored: {what.exc_value!r} in {what.object!r}")

    def of_kind(self, kind: str) -> list[str]:
        """Return the numbers of the objects of a kind, oldest first."""
        return [number for number, each in list(self.objects.items()) if isinstance(each, KINDS[kind])]

    def think_of(self, number: str, source: random.Random) -> Call | None:
        """Return a call, None if it lacks an object."""
        names = [name for name in CALLS if self._n_threads == 1 or name not in NOT_BESIDE]
        name = source.choices(names, [CALLS[each][1] for each in names])[0]
        operands: list[str | None] = []
        for kind in CALLS[name][0]:
            there = self.of_kind(kind.rstrip("?*"))
            if kind.endswith("*"):
                operands += source.sample(there, min(len(there), source.choice((0, 1, 1, 2, 3))))
            elif kind.endswith("?") and source.random() < 0.5:
                operands.append(None)
            elif not there:
                return None
            else:  # mostly one of the last, and any other now and then
                back = int(source.expovariate(0.25)) if source.random() < 0.8 else source.randrange(len(there))
                operands.append(there[-1 - min(back, len(there) - 1)])
        return [number, name, operands, source.randrange(2**31)]

    def make(self, call: Call) -> None:
        """Make a call if its objects are there, and keep what it gives."""
        number, name, operands, seed = call
        given = [None if each is None else self.objects.get(each, self) for each in operands]
        if any(each is self for each in given):
            return
        more = {"world": self} if name in NEEDS_WORLD else {}
        try:
            found = CALLS[name][2](random.Random(seed), *given, **more)
        except ALLOWED as error:
            self.counts[f"{name}: {type(error).__name__}"] += 1
            return
        except Exception as error:
            self.odd.append(f"{name}: {type(error).__name__}: {error}")
            return
        self.counts[name] += 1
        if name == "drop":
            self.objects.pop(operands[0], None)
        for i, each in enumerate(found if isinstance(found, list) else [found]):
            if each is not None:
                self.objects[f"{number}.{i}"] = each

    def inner(self, seed: int) -> Callable[..., object]:
        """Return a function that is called in a computation, and makes calls itself."""
        source = random.Random(seed)

        def function(*arrays: Any) -> object:
            if arrays and isinstance(arrays[0], np.ndarray) and arrays[0].dtype.kind == "f" and source.random() < 0.7:
                arrays[0][...] = 1.0
            depth = getattr(self._inside, "depth", 0)
            if depth < 2 and source.random() < 0.5:
                self._inside.depth = depth + 1
                call = self.think_of(f"inner {source.randrange(2**31)}", source)
                if call is not None:
                    self.make(call)
                self._inside.depth = depth
            return source.random() < 0.9

        return function

    def improvise(self, seed: int, n_calls: int) -> None:
        """Make random calls, in as many threads as there shall be."""

        def go(thread: int) -> None:
            source = random.Random(seed * 16 + thread)
            for i in range(n_calls):
                call = self.think_of(f"{thread}.{i}", source)
                if call is not None:
                    self._say(call)
                    self.make(call)

        others = [threading.Thread(target=go, args=(i,)) for i in range(1, self._n_threads)]
        for each in others:
            each.start()
        go(0)
        for each in others:
            each.join()

    def end(self) -> None:
        """Let go of everything, the oldest first."""
        for number in list(self.objects):
            del self.objects[number]
        gc.collect()


class Outcome:
    """What became of a process: the calls that it made, how it ended, in words, and what it counted."""

    def __init__(self, run: Callable[[World], None], n_threads: int = 1):
        self.calls: list[Call] = []
        self.odd: list[str] = []
        self.counts: Counter[str] = Counter()
        with tempfile.TemporaryFile() as errors:
            ours, theirs = os.pipe()
            pid = os.fork()
            if not pid:
                os.close(ours)
                os.dup2(errors.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                child(theirs, run, n_threads)
            os.close(theirs)
            hangs = self._listen(ours, pid)
            os.close(ours)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
        self.fault = ""
        if status:
            said = [line for line in lines if "GGML_ASSERT" in line or "rror" in line]
            self.fault = f"ends with status {status}: {' | '.join(said[:3])}"
        if hangs:
            self.fault = f"hangs: nothing for {HANG:.0f} s"
        if status == ODD:
            self.fault = self.odd[0]

    def _listen(self, fd: int, pid: int) -> bool:
        """Take what the process says, and return whether it had to be killed."""
        buffer = b""
        while True:
            if not select.select([fd], [], [], HANG)[0]:
                os.kill(pid, signal.SIGKILL)
                return True
            data = os.read(fd, 1 << 16)
            if not data:
                return False
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if isinstance(said, list):
                    self.calls.append(said)
                else:
                    self.odd, self.counts = said["odd"], Counter(said["counts"])


def child(fd: int, run: Callable[[World], None], n_threads: int) -> None:
    """Run in a new process, and end it."""
    status = 1
    try:
        world = World(lambda call: os.write(fd, json.dumps(call).encode() + b"\n") and None, n_threads)
        run(world)
        world.end()
        os.write(fd, json.dumps({"odd": world.odd, "counts": world.counts}).encode() + b"\n")
        status = ODD if world.odd else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def replay(calls: Iterable[Call]) -> Outcome:
    """Make these calls in a new process."""

    def run(world: World) -> None:
        for call in calls:
            world.make(call)

    return Outcome(run)


def shrink(calls: list[Call], fault: str) -> list[Call]:
    """Return the calls without those that the fault does not need."""
    size = len(calls) // 2
    while size:
        i = 0
        while i < len(calls):
            fewer = calls[:i] + calls[i + size :]
            if replay(fewer).fault == fault:
                calls = fewer
            else:
                i += size
        size //= 2
    return calls


def run(n_programs: int, seed: int, n_calls: int, n_threads: int) -> int:
    """Run programs, print what was wrong, and how often each call did something, and return the number of faults."""
    seen: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for i in range(seed, seed + n_programs):
        done = Outcome(lambda world, i=i: world.improvise(i, n_calls), n_threads)  # type: ignore[misc]
        counts.update(done.counts)
        if not done.fault:
            continue
        seen[done.fault] += 1
        if seen[done.fault] == 1:
            again = n_threads == 1 and replay(done.calls).fault == done.fault
            calls = shrink(done.calls, done.fault) if again else done.calls
            print(f"program {i} {done.fault}\n  --replay '{json.dumps(calls)}'", flush=True)
    never = [name for name in CALLS if not counts[name]]
    n_good = sum(counts[name] for name in CALLS)
    print(f"{n_programs} programs; {counts.total()} calls of {len(CALLS)} kinds, {n_good} of them accepted")
    if never:
        print(f"never accepted: {', '.join(never)}")
    for fault, n in seen.most_common():
        print(f"{n} times: {fault}")
    print(f"{seen.total()} faults")
    return seen.total()


def main() -> int:
    """Return 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first program (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=80, help="in a program (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that make calls (default: %(default)s)")
    parser.add_argument("--replay", metavar="CALLS", help="make these calls")
    args = parser.parse_args()
    if args.replay:
        done = replay(json.loads(args.replay))
        print(done.fault or "nothing was wrong")
        return int(bool(done.fault))
    return int(run(args.programs, args.seed, args.calls, args.threads) > 0)


if __name__ == "__main__":
    sys.exit(main())
