"""split, merge, verify, link and inspect as commands: exit status, one line per failure, JSON shapes."""

import json
import os

import pytest
from raw_gguf import f32_model

from pyggml_adapt.cli.main import main


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
    assert list(found) == ["foundation", "adaptors", "source_nbytes", "written_nbytes"]
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


@pytest.mark.parametrize(
    ("models", "message"),
    [(["code.gguf"], "'code.gguf': expected NAME=PATH"), (["code="], "'code=': expected NAME=PATH"),
     (["=a"], "'=a': expected NAME=PATH"), (["a=x", "a=y"], "the name 'a' is given twice"),
     (["a=x", "b=y"], "x: no such file or directory")],
)  # fmt: skip
def test_wrong_models_are_one_line(models, message, tmp_path, capsys):
    assert message in failure(capsys, ["split", *models, "-o", tmp_path / "out"])


@pytest.mark.parametrize(
    "arguments", [["split"], ["split", "a=b"], ["merge", "a"], ["link", "a", "b"], ["inspect"], ["split", "--no"]]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""
