"""Whatever is called in whatever order, the process goes on: see fuzz_life.py, which makes more calls by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each program has a process made by fork()")

SCRIPT = Path(__file__).with_name("fuzz_life.py")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_no_order_of_calls_ends_the_process(n_threads: int):
    done = run("--programs", "40", "--threads", str(n_threads))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 programs; " in done.stdout


def test_a_program_is_replayed_without_the_calls_whose_objects_are_missing():
    calls = [
        ["0", "context", [], 1],
        ["1", "new_tensor", ["0.0"], 1],
        ["2", "mark", ["7.0"], 1],
        ["3", "close", ["0.0"], 1],
    ]
    done = run("--replay", json.dumps(calls))
    assert (done.returncode, done.stdout) == (0, "nothing was wrong\n"), done.stderr


WRONG = """
import os, sys
sys.path.insert(0, sys.argv[1])
import fuzz_life, fuzz_life_calls
def fatal(r, ctx):
    os.abort()
def wrong(r, ctx):
    raise KeyError("what")
fuzz_life_calls.CALLS.clear()
fuzz_life_calls.call()(fuzz_life_calls.context)
fuzz_life_calls.call("ctx", weight=1)({"fatal": fatal, "wrong": wrong}[sys.argv[2]])
print(fuzz_life.run(1, 1, 30, 1))
"""


@pytest.mark.parametrize(("name", "said"), [("fatal", "ends with status -6: "), ("wrong", "wrong: KeyError: 'what'")])
def test_what_is_wrong_is_reported_with_no_call_too_many(name: str, said: str):
    command = [sys.executable, "-c", WRONG, str(SCRIPT.parent), name]
    env = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env)
    first, replay, *_, n_faults = done.stdout.splitlines()
    assert first == f"program 1 {said}"
    calls = json.loads(replay.strip().removeprefix("--replay ").strip("'"))
    assert [each[1] for each in calls] == ["context", name]
    assert n_faults == "1"
