"""split, and merge back: byte-identical for every kind of file; what is shared and why; what is refused."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from raw_gguf import ARRAY, STRING, U16, U32, f32_model, key, string

from pyggml_adapt.errors import (
    FileAccessError,
    FileFormatError,
    OverwriteError,
    ParameterError,
    SourceMismatchError,
)
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.gguf import GGUFReader, GGUFWriter
from pyggml_adapt.tools import merge, split, verify

MODELS = Path(__file__).parents[3] / "shared" / "models"
FAMILIES = ("stories260K-{}-f16", "stories260K-{}-q8_0", "stories4M-{}-q8_0", "stories4M-{}-q4_k_m")


def write_model(path, tensors, keys=(("general.architecture", "llama", "str"),), alignment=32, version=3):
    """tensors: name -> (type, ne, bytes)."""
    writer = GGUFWriter(alignment=alignment, version=version)
    for name, value, kind in keys:
        writer.set(name, value, kind)
    for name, (kind, ne, _) in tensors.items():
        writer.add_tensor(name, kind, ne)
    writer.write(path, {name: data for name, (_, _, data) in tensors.items()}, overwrite=True)
    return path


def f32(n, seed):
    return Type.F32, (n,), np.random.default_rng(seed).bytes(4 * n)


def raw(n, seed):
    return (n,), np.random.default_rng(seed).bytes(4 * n)


def two_models(tmp_path, **changes):
    """Return paths of models that share `a` and differ in `b`."""
    one = write_model(tmp_path / "one.gguf", {"a": f32(8, 0), "b": f32(8, 1)})
    two = write_model(tmp_path / "two.gguf", {"a": f32(8, 0), "b": f32(8, 2), **changes})
    return {"one": one, "two": two}


def assert_merges_back(report, models, tmp_path):
    verify(report.foundation, *report.adaptors.values())
    for task, adaptor in report.adaptors.items():
        merged = merge(report.foundation, adaptor, tmp_path / f"merged-{task}.gguf")
        content = Path(merged.path).read_bytes()
        assert content == Path(models[task]).read_bytes()
        assert merged.identical
        assert merged.sha256 == hashlib.sha256(content).hexdigest()
        assert merged.nbytes == len(content)


@pytest.mark.parametrize("overlay", [False, True], ids=["complement", "overlay"])
@pytest.mark.parametrize("family", FAMILIES)
def test_real_models_merge_back_byte_by_byte(family, overlay, tmp_path):
    paths = {task: MODELS / f"{family.format(task)}.gguf" for task in ("base", "hero", "qa", "mood", "shout")}
    models = {task: path for task, path in paths.items() if path.exists()}
    if not models:
        pytest.skip("no ../shared/models")
    report = split(models, tmp_path / "out", prefix="x", foundation=models["base"] if overlay else None)
    assert report.source_nbytes == sum(path.stat().st_size for path in models.values())
    assert report.written_nbytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert report.foundation == str(models["base"] if overlay else tmp_path / "out" / "x-foundation.gguf")
    assert_merges_back(report, models, tmp_path)


def odd_models(tmp_path, seeds=(1, 2), **options):
    tensors = options.pop("tensors", lambda seed: {"a": raw(5, 0), "b": raw(7, seed)})
    models = {}
    for seed in seeds:
        path = tmp_path / f"m{seed}.gguf"
        path.write_bytes(f32_model(tensors(seed), **options))
        models[f"m{seed}"] = path
    return models


ODD = {
    "version 2": {"version": 2},
    "padding that is not zero": {"pad": b"\xaa"},
    "bytes after the last tensor": {"trailing": b"left over" * 10},
    "zeros after the last tensor": {"trailing": bytes(1000)},
    "megabytes after the last tensor": {"trailing": bytes(9 << 20) + b"x" + bytes(9 << 20)},
    "trailing dimensions of 1": {"tensors": lambda s: {"a": ((5, 1, 1), bytes(20)), "b": ((1, 1), bytes([s]) * 4)}},
    "alignment 8": {"alignment": 8, "keys": [key("general.alignment", U32, struct.pack("<I", 8))]},
    "alignment 32 said": {"keys": [key("general.alignment", U32, struct.pack("<I", 32))]},
    "alignment 128": {"alignment": 128, "keys": [key("general.alignment", U32, struct.pack("<I", 128))]},
    "split keys of a merged model": {"keys": [key("split.count", U16, bytes(2)), key("split.no", U16, bytes(2))]},
    "keys that look like ours": {"keys": [key("pyggml_adapt.source.kv.x", STRING, string("y"))]},
    "general.type": {"keys": [key("general.type", STRING, string("model")), key("x", STRING, string("y"))]},
    "NUL in a string": {"keys": [key("x", STRING, string("a\0b"))]},
    "bool that is 2": {"keys": [key("x", 7, b"\2")]},
    "text that is not UTF-8": {"keys": [key("x", STRING, string(b"\xff\xfe"))]},
    "empty arrays": {"keys": [key("x", ARRAY, struct.pack("<iQ", 8, 0)), key("y", ARRAY, struct.pack("<iQ", 6, 0))]},
}


@pytest.mark.parametrize("overlay", [False, True], ids=["complement", "overlay"])
@pytest.mark.parametrize("case", ODD)
def test_odd_files_merge_back_byte_by_byte(case, overlay, tmp_path):
    models = odd_models(tmp_path, **ODD[case])
    report = split(models, tmp_path, foundation=models["m1"] if overlay else None)
    assert_merges_back(report, models, tmp_path)
    for path in report.adaptors.values():
        with GGUFReader(path) as reader:
            assert reader.alignment >= 32


def test_too_much_that_belongs_to_no_tensor(tmp_path):
    models = odd_models(tmp_path)
    os.truncate(models["m1"], 1 << 40)
    with pytest.raises(FileFormatError, match=r"m1\.gguf, byte .* bytes belong to no tensor"):
        split(models, tmp_path / "out")


def test_a_file_without_its_last_padding(tmp_path):
    models = odd_models(tmp_path)
    for path in models.values():
        os.truncate(path, path.stat().st_size - 4)
    assert_merges_back(split(models, tmp_path), models, tmp_path)


def test_every_type_of_tensor(tmp_path):
    models = {}
    for task in ("one", "two"):
        tensors = {}
        for i, kind in enumerate(Type):
            ne = (kind.blck_size, 2, 3)
            rng = np.random.default_rng(i if i % 2 else [i, len(models)])
            tensors[f"t.{kind.name}"] = (kind, ne, rng.bytes(kind.row_size(ne[0]) * 6))
        models[task] = write_model(tmp_path / f"{task}.gguf", tensors)
    report = split(models, tmp_path)
    assert report.foundation_file.n_tensors == len(Type) // 2
    assert_merges_back(report, models, tmp_path)


def test_shards_merge_to_one_file(tmp_path):
    names = ["a", "b", "c"]
    for task, seed in (("one", 1), ("two", 2)):
        content = {"a": f32(5, 0), "b": f32(7, seed), "c": f32(9, 0)}
        architecture = ("general.architecture", "llama", "str")
        write_model(tmp_path / f"{task}-whole.gguf", content, [architecture, ("general.name", task, "str")])
        for no, name in enumerate(names):
            keys = [("split.no", no, "u16"), ("split.count", 3, "u16"), ("split.tensors.count", 3, "i32")]
            keys = [architecture, *keys, ("general.name", task, "str")] if no == 0 else keys
            write_model(tmp_path / f"{task}-{no + 1:05}-of-00003.gguf", {name: content[name]}, keys)
    shards = {task: tmp_path / f"{task}-00001-of-00003.gguf" for task in ("one", "two")}
    report = split(shards, tmp_path / "out")
    assert report.foundation_file.n_tensors == 2
    assert_merges_back(report, {task: tmp_path / f"{task}-whole.gguf" for task in shards}, tmp_path)
    assert merge(report.foundation, report.adaptors["one"], tmp_path / "x.gguf").n_shards == 3

    with pytest.raises(ParameterError, match="give the first shard"):
        split({**shards, "two": tmp_path / "two-00002-of-00003.gguf"}, tmp_path / "other")
    with pytest.raises(ParameterError, match="a foundation must be one file"):
        split({"one": shards["one"]}, tmp_path / "other", foundation=shards["two"])
    (tmp_path / "two-00003-of-00003.gguf").rename(tmp_path / "gone")
    with pytest.raises(FileAccessError, match=r"two-00003-of-00003\.gguf: no such file"):
        split(shards, tmp_path / "other")
    write_model(tmp_path / "two-00003-of-00003.gguf", {"c": f32(9, 0)}, [("split.no", 1, "u16")])
    with pytest.raises(FileFormatError, match="not shard 3 of 3"):
        split(shards, tmp_path / "other")


def test_reasons(tmp_path):
    one = {
        "same": f32(8, 0),
        "bytes": f32(8, 1),
        "shape": (Type.F32, (8,), bytes(32)),
        "kind": f32(8, 2),
        "gone": f32(8, 3),
    }
    two = {"same": f32(8, 0), "bytes": f32(8, 9), "shape": (Type.F32, (4, 2), bytes(32)),
           "kind": (Type.F16, (8,), bytes(16)), "new": f32(8, 4)}  # fmt: skip
    models = {"one": write_model(tmp_path / "1.gguf", one), "two": write_model(tmp_path / "2.gguf", two)}
    report = split(models, tmp_path / "out", dry_run=True)
    found = {tensor.name: (tensor.reason, tensor.tasks, tensor.nbytes) for tensor in report.tensors}
    assert found == {
        "same": ("equal", (), 32),
        "bytes": ("bytes", ("one", "two"), 64),
        "shape": ("shape", ("one", "two"), 64),
        "kind": ("type", ("one", "two"), 48),
        "gone": ("missing", ("one",), 32),
        "new": ("missing", ("two",), 32),
    }
    details = {tensor.name: tensor.detail for tensor in report.tensors}
    assert details["kind"] == "types differ: F32 in one, F16 in two"
    assert details["gone"] == "only in one"
    assert not (tmp_path / "out").exists()


def test_overlay_compares_each_model_with_the_foundation_alone(tmp_path):
    base = write_model(tmp_path / "base.gguf", {"a": f32(8, 0), "b": f32(8, 1), "c": f32(8, 2)})
    models = {
        "one": write_model(tmp_path / "1.gguf", {"a": f32(8, 9), "b": f32(8, 1), "c": f32(8, 2)}),
        "two": write_model(tmp_path / "2.gguf", {"a": f32(8, 0), "b": f32(8, 9), "d": f32(8, 3)}),
    }
    report = split(models, tmp_path, foundation=base)
    for task, own in (("one", ["a"]), ("two", ["b", "d"])):
        with GGUFReader(report.adaptors[task]) as reader:
            assert list(reader.tensors) == own
            assert reader.metadata["general.type"] == "adapter"
            assert reader.metadata["adapter.type"] == "overlay"
    assert_merges_back(report, models, tmp_path)


def test_a_tied_head_is_named(tmp_path):
    def embd(kind):
        return kind, (32, 4), bytes(kind.row_size(32) * 4)

    tied = {"token_embd.weight": embd(Type.Q8_0), "a": f32(8, 0)}
    untied = {"token_embd.weight": embd(Type.Q4_0), "output.weight": embd(Type.Q8_0), "a": f32(8, 0)}
    models = {"one": write_model(tmp_path / "1.gguf", tied), "two": write_model(tmp_path / "2.gguf", untied)}
    hints = split(models, tmp_path, dry_run=True).hints
    assert any("token_embd.weight" in hint and "tied in one only" in hint for hint in hints)


def test_a_cheaper_overlay_is_named(tmp_path):
    content = {name: f32(64, i) for i, name in enumerate("abcd")}
    models = {"base": write_model(tmp_path / "base.gguf", content)}
    for name in "abc":
        models[name] = write_model(tmp_path / f"{name}.gguf", {**content, name: f32(64, 9)})
    assert any("--foundation" in hint for hint in split(models, tmp_path, dry_run=True).hints)


def test_patterns(tmp_path):
    models = odd_models(
        tmp_path, tensors=lambda seed: {n: raw(4, i) for i, n in enumerate("xyz")} | {"w": raw(4, seed)}
    )

    def own(**options):
        report = split(models, tmp_path, dry_run=True, **options)
        return {tensor.name: tensor.reason for tensor in report.tensors if not tensor.shared}

    assert own() == {"w": "bytes"}
    assert own(task_tensors=["^x$", "y"]) == {"x": "asked", "y": "asked", "w": "bytes"}
    assert own(shared_tensors="x|y") == {"z": "asked", "w": "bytes"}
    assert own(foundation=models["m1"], task_tensors=["x"]) == {"x": "asked", "w": "bytes"}
    with pytest.raises(SourceMismatchError, match="'w' cannot be shared as asked: the bytes differ"):
        own(shared_tensors="w")
    with pytest.raises(ParameterError, match="'x' is asked for both"):
        own(shared_tensors="x", task_tensors=["x"])
    with pytest.raises(ParameterError, match=r"'\(' is not a regular expression"):
        own(task_tensors=["("])
    with pytest.raises(ParameterError, match="'nothing' is found in no tensor's name"):
        own(task_tensors=["nothing"])
    report = split(models, tmp_path, task_tensors=["x"], prefix="asked")
    assert_merges_back(report, models, tmp_path)


def with_keys(tmp_path, name, *keys):
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(f32_model({"a": raw(4, 0)}, keys))
    return path


def strings(*texts):
    return struct.pack("<iQ", STRING, len(texts)) + b"".join(string(text) for text in texts)


MISMATCHES = {
    "llama.embedding_length": [key("llama.embedding_length", U32, struct.pack("<I", n)) for n in (64, 128)],
    "llama.block_count": [key("llama.block_count", U32, struct.pack("<I", n)) for n in (1, 2)],
    "tokenizer.ggml.model": [key("tokenizer.ggml.model", STRING, string(name)) for name in ("gpt2", "llama")],
    "tokenizer.ggml.tokens": [key("tokenizer.ggml.tokens", ARRAY, strings(*names)) for names in ("ab", "abc")],
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_models_that_do_not_belong_together(name, tmp_path):
    one, two = (with_keys(tmp_path, f"m{i}", pair) for i, pair in enumerate(MISMATCHES[name]))
    with pytest.raises(SourceMismatchError, match=rf"m1.gguf: {name} differs: .* in 'one', .* in 'two'"):
        split({"one": one, "two": two}, tmp_path / "out")
    with pytest.raises(SourceMismatchError, match=name):
        split({"two": two}, tmp_path / "out", foundation=one)
    assert not (tmp_path / "out").exists()


def test_another_architecture(tmp_path):
    models = two_models(tmp_path)
    write_model(models["two"], {"a": f32(8, 0)}, [("general.architecture", "qwen2", "str")])
    with pytest.raises(SourceMismatchError, match=r"general\.architecture differs: 'llama' in 'one', 'qwen2' in 'two'"):
        split(models, tmp_path)


def test_other_metadata_may_differ(tmp_path):
    one = with_keys(tmp_path, "1", key("general.name", STRING, string("one")))
    two = with_keys(tmp_path, "2", key("llama.context_length", U32, bytes(4)))
    models = {"one": one, "two": two}
    assert_merges_back(split(models, tmp_path), models, tmp_path)


def test_models_that_share_nothing(tmp_path):
    models = {task: write_model(tmp_path / f"{task}.gguf", {"a": f32(8, i)}) for i, task in enumerate(("one", "two"))}
    with pytest.raises(SourceMismatchError, match="share no tensor"):
        split(models, tmp_path / "out")
    assert split(models, tmp_path / "out", dry_run=True).foundation_file.n_tensors == 0


def test_wrong_parameters(tmp_path):
    models = two_models(tmp_path)
    for wrong, message in (
        ({}, "no model"), ({"one": models["one"]}, "two models at least"),
        ({**models, "a/b": models["one"]}, "'a/b'"), ({**models, "": models["one"]}, "task ''"),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=message):
            split(wrong, tmp_path)
    with pytest.raises(ParameterError, match=r"prefix '\.\./x'"):
        split(models, tmp_path, prefix="../x")
    report = split(models, tmp_path)
    with pytest.raises(ParameterError, match="is a foundation, not a whole model"):
        split({**models, "x": report.foundation}, tmp_path / "out")
    with pytest.raises(ParameterError, match="is an adaptor, not a whole model"):
        split({**models, "x": report.adaptors["one"]}, tmp_path / "out")


def test_nothing_is_overwritten_without_force(tmp_path):
    models = two_models(tmp_path)
    out = tmp_path / "out"
    first = split(models, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OverwriteError, match=r"model-foundation\.gguf: the file exists"):
        split(models, out)
    split(models, out, dry_run=True)
    assert split(models, out, force=True) == first
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_an_output_never_replaces_an_input(tmp_path):
    models = two_models(tmp_path)
    os.link(models["one"], tmp_path / "model-foundation.gguf")
    with pytest.raises(ParameterError, match="would replace the input"):
        split(models, tmp_path, force=True)


def test_dry_run_says_what_will_be_written(tmp_path):
    models = two_models(tmp_path)
    promised = split(models, tmp_path / "out", dry_run=True)
    done = split(models, tmp_path / "out")
    assert promised.to_json() == done.to_json()
    for file in (done.foundation_file, *done.adaptor_files):
        assert file.nbytes == os.path.getsize(file.path)
    assert json.loads(json.dumps(done.to_json())) == {
        "foundation": {"path": done.foundation, "n_tensors": 1, "nbytes": done.foundation_file.nbytes},
        "adaptors": [
            {"task": file.task, "path": file.path, "n_tensors": 1, "nbytes": file.nbytes} for file in done.adaptor_files
        ],
        "source_nbytes": sum(path.stat().st_size for path in models.values()),
        "written_nbytes": sum(path.stat().st_size for path in (tmp_path / "out").iterdir()),
        "sizes": [
            {"task": task, "whole_nbytes": 32, "low_rank_nbytes": 32, "rank": 16, "is_measured": False}
            for task in ("one", "two")
        ],
    }


def test_progress_reaches_the_end(tmp_path):
    calls = []
    split(two_models(tmp_path), tmp_path / "out", progress=lambda *call: calls.append(call))
    for what in ("reading", "writing"):
        done, total, _ = [call for call in calls if call[2] == what][-1]
        assert 0 < done == total


def test_places_that_cannot_be_written(tmp_path):
    models = two_models(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    for out in ("/proc/nowhere", tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(FileAccessError, match=str(out)):
            split(models, out)


SCRIPT = """
import os, resource, signal, sys
from pyggml_adapt.errors import FileAccessError
from pyggml_adapt.tools import merge, split
one, two, out, how = sys.argv[1:]
def progress(done, total, what):
    if what == "writing" and done >= total / 2:
        os.kill(os.getpid(), getattr(signal, how))
if how == "RLIMIT":
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20))
    progress = None
try:
    split({"one": one, "two": two}, out, force=True, progress=progress)
except FileAccessError as error:
    print(error)
"""


def big_models(tmp_path):
    """Return models of 16 MiB that share one half."""
    return {
        task: write_model(tmp_path / f"{task}.gguf", {"a": f32(2 << 20, 0), "b": f32(2 << 20, seed)})
        for task, seed in (("one", 1), ("two", 2))
    }


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT", "RLIMIT"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
def test_interrupted_in_the_middle(how, there, tmp_path):
    models, out = big_models(tmp_path), tmp_path / "out"
    out.mkdir()
    names = ["model-adaptor-one.gguf", "model-adaptor-two.gguf", "model-foundation.gguf"]
    if there:
        for name in names:
            (out / name).write_bytes(b"old")
    command = [sys.executable, "-c", SCRIPT, str(models["one"]), str(models["two"]), str(out), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert sorted(os.listdir(out)) == (names if there else [])
    assert all((out / name).read_bytes() == b"old" for name in os.listdir(out))
    if how == "RLIMIT":
        assert done.returncode == 0
        assert done.stdout == f"{out}/model-foundation.gguf: file too large\n"
    else:
        assert done.returncode != 0


MEMORY = """
import resource, sys
from pyggml_adapt.tools import merge, split
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
report = split({"one": sys.argv[1], "two": sys.argv[2]}, sys.argv[3])
merge(report.foundation, report.adaptors["two"], sys.argv[3] + "/merged.gguf")
print(peak() - before)
"""


def test_memory_stays_flat(tmp_path):
    models = {}
    for seed, task in enumerate(("one", "two")):
        writer = GGUFWriter()
        writer.set("general.architecture", "llama", "str")
        for name in ("same", "other"):
            writer.add_tensor(name, Type.I8, (96 << 20,))
        models[task] = tmp_path / f"{task}.gguf"
        writer.write(models[task], lambda name, x=seed: (bytes([x if name == "other" else 9]) * (8 << 20),) * 12)
    command = [sys.executable, "-c", MEMORY, str(models["one"]), str(models["two"]), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 64 << 10  # KiB
