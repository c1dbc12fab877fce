"""merge and verify: wrong pairs are named by their first differing tensor, damage by its tensor; nothing is written."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from low_rank_models import base_and_task, write_lora
from raw_gguf import f32_model
from tiny_models import Tiny

from pyggml_adapt.errors import AdaptorError, Error, FileAccessError, FileFormatError, OverwriteError, ParameterError
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.gguf import GGUFReader, GGUFWriter
from pyggml_adapt.tools import merge, split, verify
from pyggml_adapt.weights.identity import check_pair, foundation_entries, foundation_id, read_adaptor

TINY = Tiny(n_layer=1)
LAYOUTS = pytest.mark.parametrize("layout", ["complement", "overlay"])


def weights(*seed):
    return np.random.default_rng(seed).bytes(4096 * 4)


def model(path, **seeds):
    path.write_bytes(f32_model({name: ((4096,), weights(ord(name[0]), seed)) for name, seed in seeds.items()}))
    return path


@pytest.fixture
def pair(tmp_path, layout):
    """Return the paths of a foundation and of an adaptor that has the tensor c of its own, not a and b."""
    models = {"one": model(tmp_path / "one.gguf", a=0, b=0, c=1), "two": model(tmp_path / "two.gguf", a=0, b=0, c=2)}
    base = models.pop("one") if layout == "overlay" else None
    report = split(models, tmp_path / "out", foundation=base)
    return report.foundation, report.adaptors["two"]


def others(tmp_path, layout, **seeds):
    """Return a foundation that was split from other models."""
    models = {str(i): model(tmp_path / f"other{i}.gguf", **seeds, c=i) for i in (1, 2)}
    if layout == "overlay":
        return models["1"]
    return split(models, tmp_path / "others").foundation


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@LAYOUTS
def test_a_pair_that_belongs_together(pair, layout):
    with GGUFReader(pair[0]) as foundation, GGUFReader(pair[1]) as adaptor:
        identity = check_pair(foundation, adaptor)
        assert (identity.task, identity.layout) == ("two", layout)
        assert [entry.name for entry in identity.shared] == ["a", "b"]
        assert identity.own == {"c"}
        if layout == "complement":
            entries = list(foundation_entries(foundation).values())
            assert foundation_id(reversed(entries)) == identity.foundation_id
    report = verify(*pair)
    assert (report.tasks, report.n_tensors, report.nbytes) == (("two",), 3, 3 * 4 * 4096)


@LAYOUTS
@pytest.mark.parametrize(
    ("seeds", "detail"),
    [({"a": 0, "b": 9}, "tensor 'b' has other bytes there"), ({"a": 0, "x": 0}, "it has no tensor 'b'")],
)
def test_another_foundation_is_named_by_its_first_differing_tensor(pair, layout, seeds, detail, tmp_path):
    wrong = others(tmp_path, layout, **seeds)
    for use in (lambda: merge(wrong, pair[1], tmp_path / "m.gguf"), lambda: verify(wrong, pair[1])):
        with pytest.raises(AdaptorError, match=f"adaptor 'two' does not belong to {wrong}: {detail}") as caught:
            use()
        assert caught.value.code == "adaptor_base_mismatch"
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("layout", ["overlay"])
def test_types_and_shapes_are_named(pair, layout, tmp_path):
    for kind, ne, detail in (
        (Type.F16, (4096,), "type F16 there, not F32"),
        (Type.F32, (64, 64), r"shape \[64, 64, 1, 1\]"),
    ):
        writer = GGUFWriter()
        for name in "ab":
            writer.add_tensor(name, kind, ne)
        nbytes = writer.tensors["a"]
        writer.write(tmp_path / "wrong.gguf", lambda name, n=nbytes: bytes(n), overwrite=True)
        with pytest.raises(AdaptorError, match=f"tensor 'a' has {detail}"):
            verify(tmp_path / "wrong.gguf", pair[1])


@pytest.mark.parametrize("layout", ["overlay"])
def test_a_base_with_other_metadata_and_the_same_tensors_is_accepted(pair, layout, tmp_path):
    base = tmp_path / "renamed.gguf"
    writer = GGUFWriter()
    writer.set("general.name", "renamed", "str")
    with GGUFReader(pair[0]) as reader:
        mapped = reader.map()
        for info in reader.tensors.values():
            writer.add_tensor(info.name, info.type, info.ne)
        writer.write(base, lambda name: mapped[(t := reader.tensors[name]).offset : t.offset + t.nbytes])
    assert merge(base, pair[1], tmp_path / "m.gguf").identical


@LAYOUTS
def test_not_a_pair(pair, layout, tmp_path):
    plain = tmp_path / "two.gguf"
    with pytest.raises(AdaptorError, match=r"two\.gguf: not an adaptor .* but a model") as caught:
        merge(pair[0], plain, tmp_path / "m.gguf")
    assert caught.value.code == "adaptor_invalid"
    if layout == "complement":
        with pytest.raises(AdaptorError, match="the file is a model, not a foundation"):
            merge(plain, pair[1], tmp_path / "m.gguf")
    with pytest.raises(FileFormatError, match="carries no digests"):
        verify(plain)


@LAYOUTS
@pytest.mark.parametrize("name", ["a", "c"])
def test_damage_is_named_by_tensor(pair, layout, name, tmp_path):
    path = pair[0] if name == "a" else pair[1]
    with GGUFReader(path) as reader:
        offset = reader.tensors[name].offset
    flip(path, offset + 8000)  # in the middle, where no fingerprint looks
    for use in (lambda: verify(*pair), lambda: merge(*pair, tmp_path / "m.gguf")):
        with pytest.raises(FileFormatError, match=f"tensor '{name}' is damaged") as caught:
            use()
        assert (caught.value.path, caught.value.offset, caught.value.key) == (path, offset, name)
    assert not (tmp_path / "m.gguf").exists()


@LAYOUTS
def test_changed_metadata_are_noticed(pair, layout, tmp_path):
    content = Path(pair[1]).read_bytes()
    with open(pair[1], "wb") as file:
        file.write(content.replace(b"llama", b"lhama", 1))
    with pytest.raises(FileFormatError, match="metadata are not those"):
        verify(*pair)
    with pytest.raises(FileFormatError, match="metadata are not those"):
        merge(*pair, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@LAYOUTS
def test_hostile_adaptors_give_our_errors(pair, layout, tmp_path):
    rng = random.Random(2)
    content = bytearray(Path(pair[1]).read_bytes())
    with GGUFReader(pair[1]) as reader:
        end = reader.data_offset
    wrong = 0
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 2, 4))):
            damaged[rng.randrange(end)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        with open(tmp_path / "bad.gguf", "wb") as file:
            file.write(damaged)
        try:
            assert merge(pair[0], tmp_path / "bad.gguf", tmp_path / "m.gguf", force=True).identical
        except Error:
            wrong += 1
    assert wrong > 300


@LAYOUTS
@pytest.mark.parametrize("name", ["format", "kind", "layout", "task", "foundation.id", "source.tensors",
                                  "source.tensors.ne", "source.tensors.sha256", "source.nbytes"])  # fmt: skip
def test_missing_keys_are_named(pair, layout, name, tmp_path):
    writer = GGUFWriter()
    with GGUFReader(pair[1]) as reader:
        for key in reader.metadata:
            if key != f"pyggml_adapt.{name}":
                writer.copy_kv(reader, key)
        for info in reader.tensors.values():
            writer.add_tensor(info.name, info.type, info.ne)
        mapped = reader.map()
        writer.write(tmp_path / "bad.gguf", lambda n: mapped[(t := reader.tensors[n]).offset : t.offset + t.nbytes])
    with pytest.raises((FileFormatError, AdaptorError), match=rf"bad\.gguf.*(pyggml_adapt\.{name}|not an adaptor)"):
        merge(pair[0], tmp_path / "bad.gguf", tmp_path / "m.gguf")


@LAYOUTS
@pytest.mark.parametrize("ne", [(1 << 56, 1, 1, 1), (1 << 30, 1 << 30, 1, 1), (0, 1, 1, 1), (-4, 2, 1, 1)])
def test_impossible_shapes_are_named(pair, layout, ne, tmp_path):
    key = "pyggml_adapt.source.tensors.ne"
    with GGUFReader(pair[1]) as reader:
        name = reader.metadata["pyggml_adapt.source.tensors"][0]
        writer = GGUFWriter.copy_of(reader)
        writer.set(key, np.concatenate([ne, reader.metadata[key][4:]]).astype("q"), "i64")
        writer.write(tmp_path / "bad.gguf", reader.array)
    with GGUFReader(tmp_path / "bad.gguf") as reader:
        with pytest.raises(FileFormatError, match=rf"bad\.gguf: {name!r}: impossible shape \[{ne[0]}, ") as raised:
            read_adaptor(reader)
    assert raised.value.key == key


@LAYOUTS
def test_another_format_is_refused(pair, layout, tmp_path):
    content = Path(pair[1]).read_bytes()
    at = content.index(b"pyggml_adapt.format") + len("pyggml_adapt.format") + 4
    with open(tmp_path / "new.gguf", "wb") as file:
        file.write(content[:at] + b"\2" + content[at + 1 :])
    with GGUFReader(tmp_path / "new.gguf") as reader, pytest.raises(FileFormatError, match="format 2"):
        read_adaptor(reader)


@LAYOUTS
def test_the_output_is_safe(pair, layout, tmp_path):
    with pytest.raises(ParameterError, match="would replace the input"):
        merge(*pair, pair[1], force=True)
    output = tmp_path / "m.gguf"
    output.write_bytes(b"old")
    with pytest.raises(OverwriteError, match=r"m\.gguf: the file exists"):
        merge(*pair, output)
    with pytest.raises(FileAccessError, match="no such file"):
        merge(*pair, tmp_path / "no" / "m.gguf")
    assert merge(*pair, output, force=True).path == str(output)
    assert output.read_bytes() == (tmp_path / "two.gguf").read_bytes()


SCRIPT = """
import os, resource, signal, sys
from pyggml_adapt.errors import FileAccessError
from pyggml_adapt.tools import merge
if sys.argv[4] == "RLIMIT":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
def stop(done, total, what):
    os.kill(os.getpid(), signal.SIGTERM)
try:
    merge(*sys.argv[1:4], force=True, progress=stop)
except FileAccessError as error:
    print(error)
"""


@LAYOUTS
@pytest.mark.parametrize("how", ["SIGTERM", "RLIMIT"])
def test_an_interrupted_merge_leaves_the_old_file(pair, layout, how, tmp_path):
    (tmp_path / "here").mkdir()
    output = tmp_path / "here" / "m.gguf"
    output.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *pair, output, how], capture_output=True, text=True, timeout=60
    )
    assert os.listdir(tmp_path / "here") == ["m.gguf"]
    assert output.read_bytes() == b"old"
    assert done.stdout == (f"{output}: file too large\n" if how == "RLIMIT" else "")


@pytest.fixture
def low_rank(tmp_path):
    """Return a base, a low-rank adaptor of it, and a LoRA GGUF for it."""
    base, task = base_and_task(tmp_path, TINY, 2, "attn_q")
    own = split({"shout": task}, tmp_path / "low", foundation=base, low_rank=2).adaptors["shout"]
    a, b = np.ones((2, 128), "f"), np.ones((128, 2), "f")
    return base, Path(own), write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (a, b)})


def test_low_rank_adaptors_are_not_merged(low_rank, tmp_path):
    base, *adaptors = low_rank
    for path in adaptors:
        with pytest.raises(ParameterError, match=f"{path}: a low-rank adaptor has no model to give back; .* bake"):
            merge(base, path, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_verify_of_a_low_rank_adaptor(low_rank, tmp_path):
    base, own, lora = low_rank
    with GGUFReader(base) as reader, GGUFReader(own) as adaptor:
        n_tensors = len(reader.tensors) + len(adaptor.tensors)
        nbytes = sum(info.nbytes for each in (reader, adaptor) for info in each.tensors.values())
        place, inner = adaptor.tensors["blk.0.attn_q.weight.lora_b"].offset, reader.tensors["output.weight"].offset
    report = verify(base, own)
    assert (report.tasks, report.n_tensors, report.nbytes) == (("shout",), n_tensors, nbytes)
    overlay = split({"x": tmp_path / "task.gguf"}, tmp_path / "over", foundation=base).adaptors["x"]
    assert verify(base, own, overlay).tasks == ("shout", "x")
    with pytest.raises(FileFormatError, match=r"lora\.gguf: nothing to verify this lora by: it carries no digests"):
        verify(base, lora)
    with pytest.raises(AdaptorError, match="made for a file of other bytes") as caught:
        verify(tmp_path / "task.gguf", own)
    assert caught.value.code == "adaptor_base_mismatch"
    flip(own, place + 8)
    with pytest.raises(FileFormatError, match=r"tensor 'blk\.0\.attn_q\.weight\.lora_b' is damaged"):
        verify(base, own)
    flip(own, place + 8)
    flip(base, inner + 8000)  # in the middle of a tensor, where no fingerprint looks
    with pytest.raises(AdaptorError, match=r"'shout' does not belong to .*: its tensors have other bytes"):
        verify(base, own)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0])
def test_weights_that_are_not_finite_are_reported(kind, tmp_path, capfd):
    data = {name: np.zeros(kind.row_size(1 << 17), np.uint8) for name in ("a", "b", "c")}
    data["b"][-kind.type_size :] = 0xFF
    paths = []
    for seed, name in enumerate(("one", "two")):
        data["c"][0] = seed
        writer = GGUFWriter()
        for tensor in data:
            writer.add_tensor(tensor, kind, (1 << 17,))
        writer.write(tmp_path / f"{name}.gguf", data)
        paths.append(tmp_path / f"{name}.gguf")
    report = split({"two": paths[1]}, tmp_path / "o", foundation=paths[0], task_tensors=["[abc]"])
    assert verify(report.foundation, report.adaptors["two"]).not_finite == ((report.adaptors["two"], "b"),)
    assert (capfd.readouterr().err == "") == (not kind.is_quantized)


def test_a_lora_that_is_not_finite(low_rank, tmp_path):
    a, b = np.ones((2, 128), "f"), np.full((128, 2), np.nan, "f")
    lora = write_lora(tmp_path / "nan.gguf", {"blk.0.attn_q.weight": (a, b)})
    with pytest.raises(AdaptorError, match=r"attn_q\.weight\.lora_b' has elements that are NaN"):
        verify(low_rank[0], lora)
