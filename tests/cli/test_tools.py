"""split, merge, verify, link and inspect as commands: exit status, one line per failure, JSON shapes."""

import json
import os
import struct

import numpy as np
import pytest
from low_rank_models import base_and_task
from raw_gguf import f32_model
from tiny_models import Tiny, write_gguf

from pyggml_adapt.cli.main import main
from pyggml_adapt.ggml import Type
from pyggml_adapt.tools import split


@pytest.fixture
def models(tmp_path):
    """Return NAME=PATH arguments of two models that share one of their two tensors."""
    arguments = []
    for seed, task in enumerate(("base", "code")):
        path = tmp_path / f"{task}.gguf"
        path.write_bytes(f32_model({"blk.0.a": ((1,), bytes(4)), "blk.0.b": ((1,), bytes([seed] * 4))}))
        arguments.append(f"{task}={path}")
    return arguments


@pytest.fixture
def out(models, tmp_path, capsys):
    """Return the folder that the two models were split into."""
    assert main(["split", *models, "-o", str(tmp_path / "out"), "--prefix", "phi"]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def paths(out):
    return str(out / "phi-foundation.gguf"), str(out / "phi-adaptor-code.gguf")


def failure(capsys, arguments):
    """Return the one line on stderr of a command that fails."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pyggml-adapt: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def answer(capsys, arguments):
    """Return the one JSON object on stdout of a command that succeeds."""
    assert main([*map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_split_shows_what_is_shared_and_why(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["split", *models, "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for text in ("blk.*.a", "equal in all", "adaptors of base, code", "the bytes differ", "Nothing was written"):
        assert text in shown
    assert not (tmp_path / "out").exists()
    assert main(["split", *models, "-o", str(tmp_path / "out"), "--task-tensors", "a", "--task-tensors", "b"]) == 1


def test_split_json(models, tmp_path, capsys):
    found = answer(capsys, ["split", *models, "-o", tmp_path / "out", "--prefix", "phi"])
    assert list(found) == ["foundation", "adaptors", "source_nbytes", "written_nbytes", "sizes"]
    assert list(found["foundation"]) == ["path", "n_tensors", "nbytes"]
    assert [adaptor["task"] for adaptor in found["adaptors"]] == ["base", "code"]
    assert found["written_nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_split_with_a_foundation(models, tmp_path, capsys):
    arguments = ["split", models[1], "-o", tmp_path / "out", "--foundation", tmp_path / "base.gguf"]
    found = answer(capsys, arguments)
    assert found["foundation"]["path"] == str(tmp_path / "base.gguf")
    assert os.listdir(tmp_path / "out") == ["model-adaptor-code.gguf"]


def test_merge(out, tmp_path, capsys):
    assert main(["merge", *paths(out), "-o", str(tmp_path / "m.gguf")]) == 0
    assert "identical to the model that was split" in capsys.readouterr().out
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "code.gguf").read_bytes()
    assert "m.gguf: the file exists already" in failure(capsys, ["merge", *paths(out), "-o", tmp_path / "m.gguf"])
    found = answer(capsys, ["merge", *paths(out), "-o", tmp_path / "m.gguf", "--force"])
    assert found["identical"] is True
    assert found["n_shards"] == 1


def test_verify(out, tmp_path, capsys):
    assert main(["verify", *paths(out)]) == 0
    assert "all as they were written" in capsys.readouterr().out
    assert answer(capsys, ["verify", *paths(out)])["tasks"] == ["code"]
    assert "not an adaptor" in failure(capsys, ["verify", paths(out)[0], tmp_path / "code.gguf"])


def test_link(out, tmp_path, capsys):
    found = answer(capsys, ["link", *paths(out), "-d", tmp_path / "stock"])
    assert found["adaptor"] == str(tmp_path / "stock" / "phi-adaptor-code-00001-of-00002.gguf")
    assert os.path.samefile(found["foundation"], paths(out)[0])
    assert main(["link", *paths(out), "-d", str(tmp_path / "stock")]) == 0
    assert capsys.readouterr().out.splitlines() == [found["adaptor"], found["foundation"]]


def test_inspect(out, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", *paths(out)]) == 0
    shown = capsys.readouterr().out
    assert "foundation" in shown
    assert "adaptor (complement)" in shown
    assert [info["kind"] for info in answer(capsys, ["inspect", *paths(out)])["files"]] == ["foundation", "adaptor"]


@pytest.fixture
def low(tmp_path):
    """Return the paths of a base, of a task that is a low-rank change of it, and of a folder."""
    return *base_and_task(tmp_path, Tiny(n_layer=1), 2, "attn_q", "attn_v"), tmp_path / "out"


def test_split_low_rank(low, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base, task, out = low
    arguments = ["split", f"x={task}", "--foundation", base, "-o", out, "--low-rank", "auto", "--max-error", "0.01"]
    assert main([*map(str, arguments), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for text in ("blk.*.attn_q.weight", "low-rank", "smallest rank for error 0.01", "with the errors above"):
        assert text in shown
    assert "logits" not in shown
    assert not out.exists()
    assert main([*map(str, arguments)]) == 0
    assert "logits against the whole model's, on 256 pseudo-random tokens: nmse" in capsys.readouterr().out
    found = answer(capsys, [*arguments, "--force"])
    assert list(found)[-3:] == ["sizes", "low_rank", "logits"]
    assert [(t["name"], t["kind"], t["rank"]) for t in found["low_rank"]] == [
        ("blk.0.attn_q.weight", "low-rank", 2),
        ("blk.0.attn_v.weight", "low-rank", 2),
    ]
    assert list(found["low_rank"][0]) == [
        "task", "name", "kind", "rank", "error", "nbytes", "whole_nbytes", "why"
    ]  # fmt: skip
    logits = found["logits"][0]
    assert list(logits) == ["task", "n_tokens", "nmse", "max_abs", "kl_mean", "top1_agreement"]
    assert 0 < logits["nmse"] < 1e-5


def test_split_low_rank_on_a_text(low, tmp_path, capsys):
    base, task, out = low
    (tmp_path / "text").write_text("the tea in a tin")
    arguments = ["split", f"x={task}", "--foundation", base, "-o", out, "--low-rank", "2", "--logits-text"]
    assert main([*map(str, arguments), str(tmp_path / "text")]) == 0
    assert f"tokens of {tmp_path / 'text'}: nmse" in capsys.readouterr().out
    assert "none: no such file" in failure(capsys, [*arguments, tmp_path / "none", "--force"])
    (tmp_path / "text").write_bytes(b"a\xff")
    assert "the text is not UTF-8 at byte 1" in failure(capsys, [*arguments, tmp_path / "text", "--force"])
    arguments = ["split", f"x={task}", "--foundation", base, "-o", out, "--logits-text", tmp_path / "text"]
    assert "--logits-text: logits are measured of low-rank" in failure(capsys, arguments)


def test_split_low_rank_of_a_model_that_cannot_be_run(tmp_path, capsys):
    paths = []
    for seed in (1, 2):
        values = np.random.default_rng(seed).standard_normal((32, 64), "f")
        tensors = {"blk.0.ffn_up.weight": (Type.F32, (64, 32), values)}
        paths.append(write_gguf(tmp_path / f"{seed}.gguf", {"general.architecture": "x"}, tensors, tokenizer=False))
    arguments = ["split", f"x={paths[1]}", "--foundation", paths[0], "-o", tmp_path / "out", "--low-rank", "2"]
    found = answer(capsys, arguments)
    assert list(found["logits"][0]) == ["task", "why_not"]
    assert "architecture 'x' is not supported" in found["logits"][0]["why_not"]


def test_split_says_what_low_rank_would_take(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["split", *models, "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "code: its own tensors take 4 bytes whole, 4 bytes as low-rank pairs of rank 16 at most: by" in shown
    assert "error not measured (see --low-rank)" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--low-rank", "4"], "low_rank (--low-rank) needs a foundation"),
        (["--low-rank", "0", "--foundation", "x"], "low_rank must be a rank of at least 1"),
        (["--max-error", "0.1"], "max_error (--max-error) is of low-rank pairs"),
    ],
)
def test_split_low_rank_wrongly(arguments, message, models, tmp_path, capsys):
    assert message in failure(capsys, ["split", *models, "-o", tmp_path / "out", *arguments])


def test_bake(low, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base, task, out = low
    split({"x": task}, out, foundation=base, low_rank=2)
    own = str(out / "model-adaptor-x.gguf")
    assert main(["bake", str(base), own, "-o", str(tmp_path / "b.gguf"), "--type", "Q8_0"]) == 0
    shown = capsys.readouterr().out
    for text in ("blk.*.attn_q.weight", "merged", "Q8_0", "0.005", "b.gguf: task x, 2 tensors"):
        assert text in shown
    assert "b.gguf: the file exists already" in failure(capsys, ["bake", base, own, "-o", tmp_path / "b.gguf"])
    found = answer(capsys, ["bake", base, own, "-o", tmp_path / "b.gguf", "--force", "--task", "y", "--scale", "0.5"])
    assert (found["task"], found["n_tensors"], found["tensors"][0]["kind"]) == ("y", 2, "merged")
    assert main(["verify", str(base), str(tmp_path / "b.gguf")]) == 0


def test_low_rank_files_elsewhere(low, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base, task, out = low
    split({"x": task}, out, foundation=base, low_rank=2)
    own = out / "model-adaptor-x.gguf"
    assert main(["inspect", str(own)]) == 0
    shown = capsys.readouterr().out
    assert "adaptor (low-rank)" in shown
    assert "2 low-rank pairs (rank 2: 2), 0 whole tensors, alpha 2, largest error of a pair 0.000" in shown
    assert answer(capsys, ["verify", base, own])["tasks"] == ["x"]
    assert "bake" in failure(capsys, ["merge", base, own, "-o", tmp_path / "m.gguf"])
    assert "bake" in failure(capsys, ["link", base, own, "-d", tmp_path / "stock"])


def test_verify_fails_for_weights_that_are_not_finite(tmp_path, capsys):
    for task, value in (("base", 0), ("bad", float("nan"))):
        data = struct.pack("<f", value)
        (tmp_path / f"{task}.gguf").write_bytes(f32_model({"a": ((1,), data), "b": ((1,), data)}))
    base = tmp_path / "base.gguf"
    assert main(["split", f"bad={tmp_path / 'bad.gguf'}", "--foundation", str(base), "-o", str(tmp_path)]) == 0
    capsys.readouterr()
    message = failure(capsys, ["verify", base, tmp_path / "model-adaptor-bad.gguf"])
    assert "model-adaptor-bad.gguf: tensor 'a' (and 1 more) has elements that are NaN or infinite" in message


@pytest.mark.parametrize(
    ("models", "message"),
    [(["code.gguf"], "'code.gguf': expected NAME=PATH"), (["code="], "'code=': expected NAME=PATH"),
     (["=a"], "'=a': expected NAME=PATH"), (["a=x", "a=y"], "the name 'a' is given twice"),
     (["a=x", "b=y"], "x: no such file or directory")],
)  # fmt: skip
def test_wrong_models_are_one_line(models, message, tmp_path, capsys):
    assert message in failure(capsys, ["split", *models, "-o", tmp_path / "out"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["split"],
        ["split", "a=b"],
        ["merge", "a"],
        ["link", "a", "b"],
        ["inspect"],
        ["split", "--no"],
        ["bake", "a", "b"],
        ["split", "a=b", "-o", "x", "--low-rank", "high"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""
