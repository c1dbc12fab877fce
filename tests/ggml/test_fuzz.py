"""Whatever an op is called with, the process goes on: see fuzz_ops.py, which has more cases by hand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_ops.py")


def test_no_call_ends_the_process():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("accepted", "refused"):
        assert f"never {what}" not in done.stdout  # of all ops


def test_a_crash_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A process that dies in its third case: that one is reported, and the others run."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("fuzz_ops", SCRIPT)
    assert spec and spec.loader
    fuzz_ops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz_ops)
    code = """
import os, sys
for i in range(int(sys.argv[3]), int(sys.argv[3]) + int(sys.argv[4])):
    print('{"leaves": [], "steps": [{"op": "number %d", "args": []}]}' % i, flush=True)
    if i == 2:
        print("what ggml says", file=sys.stderr)
        os.abort()
    print('{"done": {"odd": [], "accepted": ["add"], "refused": [], "computed": []}}', flush=True)
"""
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return popen([command[0], "-c", code, *command[2:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(fuzz_ops.subprocess, "Popen", start)
    assert fuzz_ops.run(6, seed=1, per_process=6) == 1
    out = capsys.readouterr().out
    assert "number 2 ends with status -6: what ggml says" in out
    assert """--replay '{"leaves": [], "steps": [{"op": "number 2", "args": []}]}'""" in out
    assert "6 cases of" in out
    assert "5 calls accepted" in out
    assert "never refused: abs, " in out


def test_graphs_in_shared_memory_and_their_gradients():
    """See fuzz_graphs.py; ggml has no gradient for about a sixth of them."""
    script = SCRIPT.with_name("fuzz_graphs.py")
    command = [sys.executable, str(script), "--graphs", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(each.split(" ", 1)[::-1] for each in done.stdout.splitlines()[-1].split(", "))
    assert int(found["right"]) > 350, done.stdout
