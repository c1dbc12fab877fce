"""Measure this package beside llama.cpp, and write the tables and plots of docs/benchmarks.md.

Needs pyggml_adapt installed with its `bench` extra.  Models are generated once, into build/bench-models.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ggml_calls
import machine
import report
from loras import write_lora
from models import ARCHITECTURES, LARGE, SHAPES, SMALL, THIN, TYPES, WIDE, Shape, Store
from soak import make_adaptors
from vocabularies import vocabularies

import pyggml_adapt as pga

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("pyggml_adapt", "mmap", "default", "shards")
N_TASKS = (1, 2, 4)
PARTS = ("speed", "architectures", "switching", "memory", "adaptors", "soak", "text", "ggml")


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def measure(name: str, **arguments: Any) -> Any:
    """Return the result of one measurement, taken in a process of its own."""
    worker = Path(__file__).with_name("worker.py")
    say(f"measuring {name} {arguments.pop('label', '')}...")
    command = [sys.executable, str(worker), name, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed with status {done.returncode}")
    return json.loads(done.stdout)


def measure_speed(store: Store, shapes: list[Shape], types: list[str], quick: bool) -> dict[str, Any]:
    """Return tokens/s by shape and type."""
    found = {}
    for shape in shapes:
        rounds = 5 if quick else 11 if shape is SMALL else 5
        for type in types:
            case = f"{shape.name} {type}"
            found[case] = measure("speed", label=case, path=str(store.model(shape, type)), rounds=rounds)
    return found


def measure_architectures(store: Store, quick: bool) -> dict[str, Any]:
    """Return tokens/s by architecture and type, of several processes each, which differ by some per cent."""
    found = {}
    for shape in ARCHITECTURES:
        for type in ("Q4_K_M", "Q8_0"):
            case = f"{shape.name} {type}"
            arguments = {"path": str(store.model(shape, type)), "rounds": 6 if quick else 15}
            found[case] = [measure("architecture", label=case, **arguments) for _ in range(3 if quick else 5)]
    return found


def measure_switching(store: Store, largest: Shape, quick: bool) -> dict[str, Any]:
    """Return what a token costs outside ggml, what a swap costs, and what loading costs."""
    found: dict[str, Any] = {"overhead": {}, "swap": {}, "load": {}}
    for shape, type in ((THIN, "Q8_0"), (largest, "Q4_K_M")):
        family, case = store.family(shape, type), f"{shape.name} {type}"
        n = 1000 if shape is THIN else 200
        found["overhead"][case] = measure("overhead", label=case, path=str(store.model(shape, type)), n_tokens=n)
        split = {"foundation": family.foundation, "adaptors": family.adaptors}
        found["swap"][case] = measure("swap", label=case, **split, rounds=n // 2)
        found["swap"][case] |= measure("reload", label=case, full=family.full, rounds=3 if quick else 10)
        adaptor = next(iter(family.adaptors.values()))
        if shape is not THIN:
            found["load"][case] = measure(
                "load", label=case, foundation=family.foundation, adaptor=adaptor, rounds=5 if quick else 15
            )
    return found


def measure_lowrank(store: Store, shape: Shape, quick: bool) -> dict[str, Any]:
    """Return speed and switch cost of low-rank tasks, beside whole tensors and llama.cpp."""
    family, case = store.overlays(shape, "Q4_K_M"), f"{shape.name} Q4_K_M"
    loras = [str(write_lora(store.folder / f"{shape.name}-lora-{i}.gguf", shape, seed=i)) for i in range(2)]
    baked = store.folder / f"{shape.name}-Q4_K_M-baked.gguf"
    if not baked.exists():
        say(f"baking {baked.name} ...")
        pga.bake(family.foundation, loras[0], baked)
    few = quick or shape is not SMALL
    speed = measure("lowrank_speed", label=case, base=family.foundation, lora=loras[0], baked=str(baked),
                    rounds=3 if few else 11)  # fmt: skip
    whole = list(family.adaptors.values())[:2]
    switch = measure("lowrank_switch", label=case, base=family.foundation, loras=loras, whole=whole, full=family.full,
                     rounds=60 if few else 200)  # fmt: skip
    return {case: speed | {"switch": switch}}


def measure_fork(store: Store, shape: Shape, quick: bool) -> dict[str, Any]:
    """Return ms of one document under four tasks, by forks and by prefills."""
    family, case = store.overlays(shape, "Q4_K_M"), f"{shape.name} Q4_K_M"
    arguments = {"foundation": family.foundation, "adaptors": family.adaptors}
    few = quick or shape is not SMALL
    return {case: measure("fork", label=case, **arguments, n_tokens=[512] if few else [512, 1024],
                          rounds=3 if few else 9)}  # fmt: skip


def measure_soak(store: Store, quick: bool) -> dict[str, Any]:
    """Return what a host with many adaptors and room for few went through."""
    n, room, requests = (40, 8, 300) if quick else (500, 20, 5000)
    say(f"making {n} adaptors ...")
    base, adaptors = make_adaptors(store, SMALL, n, store.folder / "soak")
    with pga.Host(base, adaptors) as host:
        largest = max(adaptor.nbytes for adaptor in host.adaptors)
    arguments = {"foundation": base, "adaptors": adaptors, "budget": room * largest, "n_requests": requests}
    return {"case": f"{SMALL.name} Q4_K_M", "room": room} | measure("soak", label=f"{n} adaptors", **arguments)


def measure_memory(store: Store, shape: Shape) -> dict[str, Any]:
    """Return bytes by engine and number of tasks, and the sizes of the files."""
    family = store.family(shape, "Q4_K_M")
    arguments = {"full": family.full, "foundation": family.foundation, "adaptors": family.adaptors}
    cases = {
        engine: {
            str(n): measure("memory", label=f"{engine}, {n} tasks", engine=engine, n_tasks=n, **arguments)
            for n in N_TASKS
        }
        for engine in ENGINES
    }
    sizes = {task: Path(path).stat().st_size for task, path in family.adaptors.items()}
    return {
        "case": f"{shape.name} Q4_K_M",
        "foundation": Path(family.foundation).stat().st_size,
        "adaptors": sizes,
        "engines": cases,
    }


def measure_files(store: Store, shape: Shape, quick: bool) -> dict[str, Any]:
    """Return seconds of split and merge and of their yardsticks."""
    family, case = store.family(shape, "Q4_K_M"), f"{shape.name} Q4_K_M"
    return {
        case: measure(
            "files",
            label=case,
            full=family.full,
            foundation=family.foundation,
            adaptors=family.adaptors,
            folder=str(store.folder / "out"),
            rounds=3 if quick else 5,
        )
    }


def measure_adaptors(store: Store, shapes: list[Shape], quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the results on low-rank adaptors, forks, and the jobs that write files, shape by shape."""
    for shape in shapes:
        yield {"lowrank": measure_lowrank(store, shape, quick)}
        yield {"fork": measure_fork(store, shape, quick)}
        yield {"files": measure_files(store, shape, quick)}


def measure_text(store: Store, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the results on tokenizers, sampling and chats."""
    paths, origin = vocabularies(store.folder / "vocabularies", say)
    yield {"vocabularies": origin}
    rounds = 3 if quick else 5
    yield {
        "tokenizing": {
            name: measure("tokenizing", label=name, path=path, rounds=rounds) for name, path in paths.items()
        }
    }
    wide, small = str(store.model(WIDE, "Q8_0")), str(store.model(SMALL, "Q4_K_M"))
    yield {"sampling": measure("sampling", path=wide, n_tokens=100 if quick else 400)}
    yield {"rendering": measure("rendering", n_messages=20, rounds=100)}
    case = f"{SMALL.name} Q4_K_M"
    yield {"first_token": {case: measure("first_token", label=case, path=small, rounds=5 if quick else 11)}}
    cases = {case: small, f"{WIDE.name} Q8_0": wide}
    vocabulary = next(path for name, path in paths.items() if "152 k" in name)
    yield {"constraining": measure("constraining", path=vocabulary, rounds=rounds)}
    yield {"around": {name: measure("around", label=name, path=path, rounds=rounds) for name, path in cases.items()}}


def measure_part(part: str, store: Store, shapes: list[Shape], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the results of one of PARTS, piece by piece."""
    if part == "speed":
        yield {"speed": measure_speed(store, shapes, args.types, args.quick)}
    elif part == "architectures":
        yield {"architectures": measure_architectures(store, args.quick)}
    elif part == "switching":
        yield measure_switching(store, shapes[-1], args.quick)
    elif part == "memory":
        yield {"memory": measure_memory(store, shapes[-1])}
    elif part == "adaptors":
        yield from measure_adaptors(store, shapes, args.quick)
    elif part == "text":
        yield from measure_text(store, args.quick)
    elif part == "ggml":
        say("measuring calls of ggml ...")
        yield {"ggml_calls": ggml_calls.measure(args.ggml_python, rounds=10 if args.quick else 60)}
    else:
        yield {"soak": measure_soak(store, args.quick)}


def measure_all(store: Store, shapes: list[Shape], args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Return the results of the parts that are asked for, and of the others what was found in `out` before.

    They are written to `out` as they come: what is measured is not lost.
    """
    results: dict[str, Any] = {"measured": {}}
    if set(args.parts) != set(PARTS):
        results |= json.loads(out.read_text(encoding="utf-8"))
    results["machine"] = machine.describe()
    for part in args.parts:
        if part == "ggml" and args.ggml_python is None:
            say("calls of ggml are not measured: --ggml-python names no Python that has ggml-python 0.0.45")
            continue
        results["measured"][part] = machine.now(ROOT)
        fresh: set[str] = set()
        for found in measure_part(part, store, shapes, args):
            for name, cases in found.items():
                results[name] = results[name] | cases if name in fresh else cases
                fresh.add(name)
            out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="0.1 B only and fewer rounds; docs/ is left as it is")
    parser.add_argument("--sizes", nargs="+", choices=[SMALL.name, LARGE.name], default=[SMALL.name, LARGE.name])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "bench-models", help="folder for the models")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the others stay as they were measured before"
    )
    parser.add_argument("--ggml-python", metavar="PYTHON", help="a Python that has ggml-python 0.0.45, for part ggml")
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing, report these results")
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, keep the results, and unless --quick write docs/benchmarks.md."""
    args = parse()
    if args.report:
        results = json.loads(args.report.read_text(encoding="utf-8"))
    else:
        store = Store(args.models, say)
        shapes = [SMALL] if args.quick else [SHAPES[name] for name in args.sizes]
        out = ROOT / "build" / ("bench-quick.json" if args.quick else "bench.json")
        results = measure_all(store, shapes, args, out)
        say(f"results are in {out}")
    print(report.markdown(results))
    if not args.quick:
        report.write(results, ROOT / "docs")


if __name__ == "__main__":
    main()
