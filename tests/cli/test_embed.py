"""pyggml-adapt embed: one line of numbers for each text."""

import io
import json
import sys

import numpy as np
import pytest

import pyggml_adapt as pga
from pyggml_adapt.cli.main import main


@pytest.fixture(scope="module")
def path(tiny_gguf):
    return str(tiny_gguf())


def numbers(text):
    return np.array([[float(number) for number in line.split(" ")] for line in text.splitlines()], dtype=np.float32)


def test_a_line_for_each_text(path, tmp_path, capsys, monkeypatch):
    with pga.Host(path, n_threads=1) as host:
        wanted = {pooling: host.embed(["the in", "", "a"], pooling=pooling) for pooling in ("mean", "last", "none")}
        raw = host.embed(["the in", "", "a"], normalize=False)
    command = ["embed", "-m", path, "-t", "1"]
    (tmp_path / "texts").write_text("the in\n\na\n")
    assert main([*command, "-f", str(tmp_path / "texts")]) == 0
    np.testing.assert_array_equal(numbers(capsys.readouterr().out), wanted["mean"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the in\n\na")))
    assert main([*command, "-f", "-", "--pooling", "last"]) == 0
    np.testing.assert_array_equal(numbers(capsys.readouterr().out), wanted["last"])
    assert main([*command, "-p", "the in<>" + "<>a", "--embd-separator", "<>", "--embd-normalize", "-1"]) == 0
    np.testing.assert_array_equal(numbers(capsys.readouterr().out), raw)
    assert main([*command, "-p", "the in\n\na", "--pooling", "none"]) == 0
    np.testing.assert_array_equal(numbers(capsys.readouterr().out), np.concatenate(wanted["none"]))
    assert main([*command, "-p", "the in\n\na", "--pooling", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"task": "base", "embeddings": [each.tolist() for each in wanted["none"]]}


@pytest.mark.parametrize(("flags", "message"), [
    (["-p", "the in", "-c", "2"], "text 0 takes 4 tokens, more than the context of 2"),
    (["-p", "the", "--embd-separator", ""], "--embd-separator is empty: there must be something between the texts"),
    (["-p", "the", "--task", "x"], "task 'x'"),
])  # fmt: skip
def test_what_is_wrong(path, capsys, flags, message):
    assert main(["embed", "-m", path, "-t", "1", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pyggml-adapt: error: ") and message in error and error.count("\n") == 1
