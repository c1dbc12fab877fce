"""GGUFReader and GGUFWriter: round trips, hostile files, and wrong calls that gguf.h would abort on."""

import itertools
import os
import struct
import subprocess
import sys
from array import array as c_array
from pathlib import Path

import numpy as np
import pytest
from raw_gguf import gguf, key, string, tensor

from pyggml_adapt.errors import (
    ClosedError,
    DTypeError,
    FileAccessError,
    FileFormatError,
    OverwriteError,
    ParameterError,
)
from pyggml_adapt.files import AtomicFile
from pyggml_adapt.ggml import Context, Tensor
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.gguf import GGUFReader, GGUFWriter, TensorInfo

MODELS = sorted((Path(__file__).parents[3] / "shared" / "models").glob("*.gguf"))
NUMBERS = {
    "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "u64": 2**64 - 1,
    "i64": -(2**63), "f32": 0.5, "f64": 0.1, "bool": True,
}  # fmt: skip


def small_file(path):
    """Write a file with every kind of value and one tensor of every type; return the tensors' bytes."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter()
    for kind, value in NUMBERS.items():
        writer.set(f"one.{kind}", value, kind)
        writer.set(f"many.{kind}", [value] * 3, kind)
    writer.set("one.str", "naïve", "str")
    writer.set("many.str", ["a", "", "é", "\udcff"], "str")
    writer.set("none.str", [], "str")
    writer.set("none.f32", [], "f32")
    data = {}
    for kind in Type:
        ne = (2 * kind.blck_size, 3, 1, 2)
        writer.add_tensor(f"t.{kind.name}", kind, ne)
        data[f"t.{kind.name}"] = rng.bytes(kind.row_size(ne[0]) * 6)
    writer.write(path, data)
    return data


def test_every_value_and_type_comes_back(tmp_path):
    data = small_file(tmp_path / "a.gguf")
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert (reader.version, reader.alignment, reader.path) == (3, 32, str(tmp_path / "a.gguf"))
        for kind, value in NUMBERS.items():
            found = reader.metadata[f"one.{kind}"]
            assert type(found) is type(value)
            assert found == value
            assert reader.kv_type(f"one.{kind}") == (kind, None)
            array = reader.metadata[f"many.{kind}"]
            assert array.tolist() == [value] * 3
            assert not array.flags.writeable
            assert reader.kv_type(f"many.{kind}") == ("arr", kind)
        assert reader.metadata["one.str"] == "naïve"
        assert reader.metadata["many.str"] == ["a", "", "é", "\udcff"]
        assert reader.metadata["none.str"] == []
        assert reader.metadata["none.f32"].shape == (0,)
        assert "absent" not in reader.metadata
        with pytest.raises(KeyError, match="absent"):
            reader.metadata["absent"]
        assert list(reader.tensors) == list(data)
        mapped = reader.map()
        for info in reader.tensors.values():
            assert mapped[info.offset : info.offset + info.nbytes] == data[info.name]
            assert (info.type.name, info.n_dims) == (info.name[2:], 4)
    assert mapped[:4] == b"GGUF"  # outlives the reader


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_alignment_and_version(tmp_path, alignment, version):
    writer = GGUFWriter(alignment=alignment, version=version)
    writer.set("general.architecture", "llama", "str")
    for name in "abc":
        writer.add_tensor(name, Type.I8, (5,))
    writer.write(tmp_path / "a.gguf", lambda name: (name.encode(), b"-", b"end"))
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert (reader.alignment, reader.version) == (alignment, version)
        assert [reader.map()[t.offset : t.offset + 5] for t in reader.tensors.values()] == [
            b"a-end",
            b"b-end",
            b"c-end",
        ]
        assert all(t.offset % alignment == 0 for t in reader.tensors.values())


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_headers_of_real_models_are_written_again_byte_by_byte(path):
    with GGUFReader(path) as reader:
        writer = GGUFWriter(alignment=reader.alignment)
        for name in reader.metadata:
            writer.copy_kv(reader, name)
        for info in reader.tensors.values():
            writer.add_tensor(info.name, info.type, info.ne)
        assert writer.header() == path.read_bytes()[: reader.data_offset]


def test_copied_values_keep_their_bits(tmp_path):
    payload = struct.pack("<I", 0x7FA00001)  # a signalling NaN
    (tmp_path / "a.gguf").write_bytes(
        gguf([key("nan", 6, payload), key("many", 9, struct.pack("<iQ", 6, 1) + payload)])
    )
    with GGUFReader(tmp_path / "a.gguf") as reader:
        writer = GGUFWriter()
        writer.copy_kv(reader, "nan", "other")
        writer.copy_kv(reader, "many")
        assert writer.header().count(payload) == 2
        assert b"other" in writer.header()


def bad(keys=(), tensors=(), data=bytes(4096), **more):
    return gguf(keys, tensors, data, **more)


F32 = tensor("x", (8,), 0, 0)
HOSTILE = {
    "empty": (b"", "empty"),
    "other magic": (b"GGML" + bytes(100), "not a GGUF file"),
    "short": (b"GGUF\3\0\0\0", "ends within its header"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 0": (bad(version=0), "version 0"),
    "version 1": (bad(version=1), "version 1"),
    "version 4": (bad(version=4), "version 4"),
    "2**60 keys": (bad(n_kv=2**60), "metadata keys are declared"),
    "2**60 tensors": (bad(n_tensors=2**60), "tensors are declared"),
    "2**63 tensors": (bad(n_tensors=2**63), "tensors are declared"),
    "empty key": (bad([key("", 4, bytes(4))]), "key 0 is empty"),
    "key twice": (bad([key("k", 4, bytes(4))] * 2), "duplicate key 'k'"),
    "keys equal to NUL": (bad([key("k", 4, bytes(4)), key("k\0x", 4, bytes(4))]), "'k': metadata key is there twice"),
    "key not UTF-8": (bad([key(b"\xff", 4, bytes(4))]), "not valid UTF-8"),
    "long key": (bad([struct.pack("<Q", 2**40) + b"k"]), "string length"),
    "long string": (bad([key("k", 8, struct.pack("<Q", 2**62))]), "string length"),
    "value type 99": (bad([key("k", 99, bytes(8))]), "invalid GGUF type"),
    "nested array": (bad([key("k", 9, struct.pack("<iQ", 9, 1))]), "invalid GGUF type"),
    "long array": (bad([key("k", 9, struct.pack("<iQ", 4, 2**60))]), "key-value pairs"),
    "long array of str": (bad([key("k", 9, struct.pack("<iQ", 8, 2**61))]), "key-value pairs"),
    "alignment 0": (bad([key("general.alignment", 4, bytes(4))]), "alignment 0"),
    "alignment 33": (bad([key("general.alignment", 4, struct.pack("<I", 33))]), "alignment 33"),
    "alignment 2**31": (bad([key("general.alignment", 4, struct.pack("<I", 2**31))]), "alignment of 2147483648"),
    "alignment as u64": (bad([key("general.alignment", 10, struct.pack("<Q", 32))]), "alignment"),
    "alignment as array": (bad([key("general.alignment", 9, struct.pack("<iQI", 4, 1, 32))]), "alignment"),
    "tensor twice": (bad([], [F32, F32]), "duplicate tensor name 'x'"),
    "tensor beyond the end": (bad([], [tensor("x", (2000,), 0, 0)]), "'x': tensor's 8000 bytes end"),
    "offset beyond the end": (bad([], [tensor("x", (8,), 0, 2**40)]), "has offset"),
    "overlap": (bad([], [F32, tensor("y", (8,), 0, 0)]), "has offset 0, expected 32"),
    "zero ne": (bad([], [tensor("x", (8, 0), 0, 0)]), "empty shape"),
    "negative ne": (bad([], [tensor("x", (-8,), 0, 0)]), "invalid number of elements"),
    "overflowing ne": (bad([], [tensor("x", (2**40, 2**40), 0, 0)]), "overflow"),
    "overflowing bytes": (bad([], [tensor("x", (2**62, 1), 27, 0)]), "size in bytes"),
    "overflowing row": (bad([], [tensor("x", (2**60,), 14, 0)]), "'x'"),
    "5 dimensions": (bad([], [tensor("x", (1, 1, 1, 1, 1), 0, 0)]), "number of dimensions"),
    "part of a block": (bad([], [tensor("x", (31,), 8, 0)]), "block size"),
    "removed type": (bad([], [tensor("x", (32,), 4, 0)]), "block size"),
    "type 999": (bad([], [tensor("x", (32,), 999, 0)]), "invalid ggml type"),
    "type -1": (bad([], [tensor("x", (32,), -1, 0)]), "invalid ggml type"),
    "tensor without name": (bad([], [tensor("", (8,), 0, 0)]), "name of tensor 0 is empty"),
    "tensor's name not UTF-8": (bad([], [tensor(b"\xff", (8,), 0, 0)]), "not valid UTF-8"),
    "tensor's name too long": (bad([], [tensor("x" * 64, (8,), 0, 0)]), "too long"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, tmp_path, capfd):
    content, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        GGUFReader(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # ggml's own words go to `logging`


def test_text_that_is_not_utf8_is_refused_when_asked_for(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf([key("k", 8, string(b"\xff"))]))
    with (
        GGUFReader(tmp_path / "a.gguf") as reader,
        pytest.raises(FileFormatError, match="'k': value is not valid") as e,
    ):
        reader.metadata["k"]
    assert e.value.key == "k"


def test_a_huge_header_is_refused_without_reading_it(tmp_path):
    with open(tmp_path / "a.gguf", "wb") as file:
        file.write(gguf([key("k", 9, struct.pack("<iQ", 8, 2**29))]))
        file.truncate(2**33)  # sparse: large enough for 2**29 empty strings
    with pytest.raises(FileFormatError, match="key-value pairs"):
        GGUFReader(tmp_path / "a.gguf")


FUZZ = """
import os, random, sys
from pyggml_adapt.errors import FileFormatError
from pyggml_adapt.ggml.gguf import GGUFReader
path, rng = sys.argv[1], random.Random(1)
whole = open(path, "rb").read()
end = GGUFReader(path).data_offset
def read():
    try:
        with GGUFReader(path) as reader:
            for key in reader.metadata:
                try:
                    reader.metadata[key]
                except FileFormatError:
                    pass
        return True
    except FileFormatError:
        return False
fd = os.open(path, os.O_RDWR)
for _ in range(5000):
    spots = [rng.randrange(end) for _ in range(rng.choice((1, 1, 2, 4, 8)))]
    for spot in spots:
        os.pwrite(fd, bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))]), spot)
    read()
    for spot in spots:
        os.pwrite(fd, whole[spot:spot + 1], spot)
assert read()
for n in reversed(range(len(whole))):
    os.ftruncate(fd, n)
    assert not read() or n >= len(whole) - 32, n  # padding after the last tensor may be missing
print("survived")
"""


def test_random_damage_and_every_truncation_give_exceptions(tmp_path):
    small_file(tmp_path / "a.gguf")
    command = [sys.executable, "-c", FUZZ, str(tmp_path / "a.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "survived\n", "")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "no", "no such file"), (tmp_path, "is a directory"),
                          (tmp_path / "pipe", "not a regular file")):  # fmt: skip
        with pytest.raises(FileAccessError, match=message) as caught:
            GGUFReader(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_closed_reader_says_so_and_leaks_nothing(tmp_path):
    small_file(tmp_path / "a.gguf")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        reader = GGUFReader(tmp_path / "a.gguf")
        metadata = reader.metadata
        reader.close()
        reader.close()
    assert reader.closed
    assert isinstance(reader.tensors["t.F32"], TensorInfo)
    for use in (lambda: reader.metadata, lambda: metadata["one.u8"], reader.map, reader.fileno, reader.__enter__):
        with pytest.raises(ClosedError, match="closed"):
            use()
    (tmp_path / "bad.gguf").write_bytes(gguf([key("", 4, bytes(4))]))
    for _ in range(50):
        with pytest.raises(FileFormatError):
            GGUFReader(tmp_path / "bad.gguf")
    assert len(os.listdir("/proc/self/fd")) == before


WRONG = {
    "number too large": lambda w: w.set("k", 256, "u8"),
    "number too small": lambda w: w.set("k", -1, "u32"),
    "fraction": lambda w: w.set("k", 0.5, "i32"),
    "bool as number": lambda w: w.set("k", True, "u8"),
    "None": lambda w: w.set("k", None, "u8"),
    "str as number": lambda w: w.set("k", "1", "u8"),
    "number as str": lambda w: w.set("k", 1, "str"),
    "two dimensions": lambda w: w.set("k", [[1]], "u8"),
    "type": lambda w: w.set("k", 1, "u7"),
    "arr": lambda w: w.set("k", [1], "arr"),
    "empty key": lambda w: w.set("", 1, "u8"),
    "NUL in key": lambda w: w.set("a\0b", 1, "u8"),
    "NUL in value": lambda w: w.set("k", "a\0b", "str"),
    "other alignment": lambda w: w.set("general.alignment", 64, "u32"),
    "alignment as u64": lambda w: w.set("general.alignment", 32, "u64"),
    "alignment as array": lambda w: w.set("general.alignment", [32], "u32"),
    "tensor twice": lambda w: w.add_tensor("t", Type.F32, (1,)),
    "empty name": lambda w: w.add_tensor("", Type.F32, (1,)),
    "long name": lambda w: w.add_tensor("x" * 64, Type.F32, (1,)),
    "no shape": lambda w: w.add_tensor("x", Type.F32, ()),
    "five dimensions": lambda w: w.add_tensor("x", Type.F32, (1,) * 5),
    "zero ne": lambda w: w.add_tensor("x", Type.F32, (0,)),
    "part of a block": lambda w: w.add_tensor("x", Type.Q4_K, (255,)),
    "unknown type": lambda w: w.add_tensor("x", 4, (32,)),
    "2**63 bytes": lambda w: w.add_tensor("x", Type.F32, (2**61,)),
    "generator": lambda w: w.set("k", (i for i in range(3)), "u8"),
    "generator of str": lambda w: w.set("k", (each for each in "ab"), "str"),
    "map": lambda w: w.set("k", map(int, "12"), "u8"),
    "set": lambda w: w.set("k", {1}, "u8"),
    "range as str": lambda w: w.set("k", range(2), "str"),
    "[None]": lambda w: w.set("k", [None], "u8"),
    "None as str": lambda w: w.set("k", None, "str"),
    "bytes": lambda w: w.set("k", b"ab", "u8"),
    "bytes as str": lambda w: w.set("k", b"ab", "str"),
    "two dimensions of str": lambda w: w.set("k", np.array([["a"]]), "str"),
    "mixed": lambda w: w.set("k", [1, "a"], "u8"),
    "mixed with bool": lambda w: w.set("k", [True, 2], "u8"),
    "mixed str": lambda w: w.set("k", ["a", 1], "str"),
    "number too long to print": lambda w: w.set("k", 10**5000, "u8"),
    "list of it": lambda w: w.set("k", [10**5000], "f64"),
    "it as str": lambda w: w.set("k", 10**5000, "str"),
    "NaN": lambda w: w.set("k", float("nan"), "i32"),
    "beyond f32": lambda w: w.set("k", [1e300], "f32"),
    "dates": lambda w: w.set("k", np.array(["2020-01-01"], "M8[s]"), "i64"),
    "type None": lambda w: w.set("k", 1, None),
    "key None": lambda w: w.set(None, 1, "u8"),
    "surrogate in key": lambda w: w.set("\ud800", 1, "u8"),
    "escape in key": lambda w: w.set("\udcff", 1, "u8"),
    "surrogate in value": lambda w: w.set("k", "\ud800", "str"),
    "escape in value": lambda w: w.set("k", "\udcff", "str"),
    "surrogate in values": lambda w: w.set("k", ["a", "\ud800"], "str"),
    "surrogate in name": lambda w: w.add_tensor("\ud800", Type.F32, (1,)),
    "escape in name": lambda w: w.add_tensor("\udcff", Type.F32, (1,)),
    "surrogate to remove": lambda w: w.remove("\ud800"),
    "fraction in ne": lambda w: w.add_tensor("x", Type.F32, (2.0,)),
    "None in ne": lambda w: w.add_tensor("x", Type.F32, (None,)),
    "no ne": lambda w: w.add_tensor("x", Type.F32, 5),
    "type None of a tensor": lambda w: w.add_tensor("x", None, (1,)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_are_exceptions(case):
    writer = GGUFWriter()
    writer.add_tensor("t", Type.F32, (1,))
    with pytest.raises(ParameterError) as caught:
        WRONG[case](writer)
    assert "\n" not in str(caught.value)
    assert (list(writer.tensors), writer.keys) == (["t"], [])


def test_why_text_and_iterators_are_refused():
    writer = GGUFWriter()
    for use in (lambda: writer.set("k", "\ud800", "str"), lambda: writer.set("k", ["\ud800"], "str")):
        with pytest.raises(ParameterError, match=r"^'k': '\\ud800' has a lone surrogate, which UTF-8 cannot hold$"):
            use()
    with pytest.raises(ParameterError, match=r"^tensor name: '\\udcff' has a lone surrogate"):
        writer.add_tensor("\udcff", Type.F32, (1,))
    with pytest.raises(ParameterError, match=r"^'k': <generator .* is no sequence: make a list of it$"):
        writer.set("k", (i for i in range(3)), "u8")


class Quiet(np.ndarray):
    ndim = 0


class Texts(str):
    def encode(self, *args):
        return bytearray(b"a\0b")


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        (range(5), "u8", [0, 1, 2, 3, 4]),
        (c_array("H", [1, 2]), "i32", [1, 2]),
        (bytearray(b"ab"), "u8", [97, 98]),
        (np.arange(10)[::4], "u8", [0, 4, 8]),
        (np.array([1, 2], ">u2"), "u16", [1, 2]),
        (np.zeros(0, "u1").view(Quiet), "u8", []),
        (np.ones(3, "u1").view(Quiet), "u8", [1, 1, 1]),
        ([], "bool", []),
        ([1, 2.5], "f32", [1.0, 2.5]),
        ((float("inf"),), "f32", [float("inf")]),
        (np.array(["a", "b"]), "str", ["a", "b"]),
        (("a", Texts("b")), "str", ["a", "b"]),
        (Texts("b"), "str", "b"),
        (np.float32(1.5), "f32", 1.5),
        (np.array(3), "u8", 3),
        (np.bool_(True), "bool", True),
    ],
)
def test_what_is_like_an_array_is_one(tmp_path, value, kind, expected):
    writer = GGUFWriter()
    writer.set("k", value, kind)
    writer.write(tmp_path / "a.gguf", {})
    with GGUFReader(tmp_path / "a.gguf") as reader:
        found = reader.metadata["k"]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected


def test_the_extents_of_a_tensor_do_not_overflow():
    writer = GGUFWriter()
    writer.add_tensor("t", Type.F32, np.int32([1 << 20, 1 << 20]))
    assert writer.tensors["t"] == 1 << 42


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "'t': None is neither a buffer nor an iterable of buffers"),
        ("abcd", "'t': 'a' is no buffer"),
        ([5], "'t': 5 is no buffer"),
        (itertools.repeat(b"abc"), "'t': the tensor has 4 bytes, not 6"),
    ],
)
def test_wrong_data(tmp_path, data, message):
    writer = GGUFWriter()
    writer.add_tensor("t", Type.F32, (1,))
    with pytest.raises(ParameterError, match=message):
        writer.write(tmp_path / "a.gguf", lambda name: data)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "data", [np.zeros(1, ">f4"), np.zeros(1, [("x", "f4")]), [np.zeros((0, 3)), np.zeros((1, 2), "f")[:, ::2]]]
)
def test_data_of_any_layout(tmp_path, data):
    writer = GGUFWriter()
    writer.add_tensor("t", Type.F32, (1,))
    writer.write(tmp_path / "a.gguf", {"t": data})
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert reader.array("t").tolist() == [0]


def test_paths_that_cannot_be(tmp_path):
    for path in (f"{tmp_path}/a\0b", f"{tmp_path}/a\0b/c"):
        with pytest.raises(FileAccessError, match="embedded null byte"):
            GGUFWriter().write(path, {})
    file = AtomicFile(tmp_path / "a")
    file.close()
    with pytest.raises(FileAccessError, match="file descriptor"):
        file.commit()
    GGUFWriter().write(tmp_path / "a", {})
    assert GGUFReader(np.str_(tmp_path / "a")).path == str(tmp_path / "a")


def test_no_class_can_be_derived():
    for base in (GGUFReader, GGUFWriter):
        with pytest.raises(TypeError, match="is not an acceptable base type"):
            type("Derived", (base,), {})


def test_readers_are_needed():
    for use in (GGUFWriter.copy_of, lambda reader: GGUFWriter().copy_kv(reader, "k")):
        with pytest.raises(TypeError, match="got NoneType"):
            use(None)


@pytest.mark.parametrize(
    "options",
    [
        {"alignment": 0}, {"alignment": 24}, {"alignment": 2**31}, {"alignment": 32.0}, {"alignment": 10**5000},
        {"version": 1}, {"version": "3"}, {"version": 2**40},
    ],
)  # fmt: skip
def test_wrong_writers(options):
    with pytest.raises(ParameterError, match=next(iter(options))):
        GGUFWriter(**options)


@pytest.mark.parametrize("data", [b"123", b"12345", [b"12", b"345"]])
def test_wrong_amount_of_data_leaves_no_file(tmp_path, data):
    writer = GGUFWriter()
    writer.add_tensor("t", Type.F32, (1,))
    with pytest.raises(ParameterError, match="'t': the tensor has 4 bytes, not"):
        writer.write(tmp_path / "a.gguf", {"t": data})
    assert os.listdir(tmp_path) == []


@pytest.fixture(params=["nameless", "named"])
def temporary(request, monkeypatch):
    """Run a test with both kinds of temporary files."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE")


@pytest.mark.usefixtures("temporary")
def test_atomic_file_replaces_only_when_told(tmp_path):
    path = tmp_path / "a"
    with AtomicFile(path) as file:
        file.write(b"one")
        assert not path.exists()
        file.commit()
    with pytest.raises(OverwriteError, match="exists"):
        AtomicFile(path)
    with AtomicFile(path, overwrite=True) as file:
        file.write(b"two")
    assert path.read_bytes() == b"one"  # not committed
    with AtomicFile(path, overwrite=True) as file:
        file.write(np.arange(3, dtype=np.uint8))
        file.commit()
    assert path.read_bytes() == b"\0\1\2"
    assert path.stat().st_mode & 0o600 == 0o600
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.usefixtures("temporary")
def test_atomic_file_sees_a_file_that_came_meanwhile(tmp_path):
    with AtomicFile(tmp_path / "a") as file:
        (tmp_path / "a").write_bytes(b"other")
        with pytest.raises(OverwriteError, match="came into being"):
            file.commit()
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"other"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "no" / "a", tmp_path / "file" / "a", "/proc/a"):
        with pytest.raises(FileAccessError, match=f"^{path}: "):
            AtomicFile(path, overwrite=True)


def test_open_is_fast_with_a_large_vocabulary(tmp_path):
    n = 32_000
    writer = GGUFWriter()
    writer.set("tokens", [f"token {i}" for i in range(n)], "str")
    writer.set("scores", np.zeros(n, np.float32), "f32")
    writer.write(tmp_path / "a.gguf", {})
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert reader.metadata["tokens"][-1] == f"token {n - 1}"
        assert reader.metadata["tokens"] is reader.metadata["tokens"]
        assert len(reader.metadata["scores"]) == n


@pytest.mark.parametrize("fault", [OSError(18, "other device"), 0], ids=["refused", "nothing copied"])
def test_copies_without_the_kernels_help(tmp_path, monkeypatch, fault):
    def copy_file_range(*args):
        if fault:
            raise fault
        return 0

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    (tmp_path / "from").write_bytes(bytes(range(256)) * 100)
    with open(tmp_path / "from", "rb") as source, AtomicFile(tmp_path / "to") as file:
        file.copy(source.fileno(), 100, 20_000, "from")
        with pytest.raises(FileAccessError, match="from: the file became shorter"):
            file.copy(source.fileno(), 20_000, 20_000, "from")
    with open(tmp_path / "from", "rb") as source, AtomicFile(tmp_path / "to") as file:
        file.copy(source.fileno(), 100, 20_000, "from")
        file.commit()
    assert (tmp_path / "to").read_bytes() == (tmp_path / "from").read_bytes()[100:20_100]


def test_arrays_show_the_file(tmp_path):
    data = small_file(tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    arrays = {name: reader.array(name) for name in reader.tensors}
    with pytest.raises(KeyError, match="absent"):
        reader.array("absent")
    reader.close()
    with pytest.raises(ClosedError, match="the reader is closed"):
        reader.array("t.F32")
    dtypes = {"F32": "f", "F16": "e", "F64": "d", "I8": "b", "I16": "h", "I32": "i", "I64": "l"}
    for name, array in arrays.items():
        type = Type[name[2:]]
        assert array.tobytes() == data[name]
        assert array.dtype == np.dtype(dtypes.get(type.name, "B"))
        last = 2 if type.name in dtypes else type.row_size(2 * type.blck_size)
        assert array.shape == (2, 1, 3, last)
        assert not array.flags.writeable


def test_an_array_begins_anywhere(tmp_path):
    writer = GGUFWriter(alignment=1)
    writer.add_tensor("a", Type.I8, (3,))
    writer.add_tensor("b", Type.F32, (2, 1))
    values = np.array([[1.5, -2]], "f")
    writer.write(tmp_path / "a.gguf", {"a": b"abc", "b": values})
    with GGUFReader(tmp_path / "a.gguf") as reader:
        np.testing.assert_array_equal(reader.array("b"), values[0])  # trailing dimensions of 1 are not in a file


def test_a_file_is_copied_with_other_metadata(tmp_path):
    data = small_file(tmp_path / "a.gguf")
    with GGUFReader(tmp_path / "a.gguf") as reader:
        writer = GGUFWriter.copy_of(reader)
        assert writer.keys == list(reader.metadata)
        assert writer.header() == (tmp_path / "a.gguf").read_bytes()[: reader.data_offset]
        writer.set("one.str", "other", "str")
        writer.set("general.name", "new", "str")
        writer.remove("many.f32")
        with pytest.raises(KeyError, match="absent"):
            writer.remove("absent")
        writer.write(tmp_path / "b.gguf", reader.array)
    with GGUFReader(tmp_path / "a.gguf") as before, GGUFReader(tmp_path / "b.gguf") as after:
        changed = {"one.str", "general.name", "many.f32"}
        assert after.metadata["one.str"] == "other"
        assert after.metadata["general.name"] == "new"
        assert [key for key in before.metadata if key not in changed] == [k for k in after.metadata if k not in changed]
        for key in set(after.metadata) - changed:
            np.testing.assert_array_equal(after.metadata[key], before.metadata[key])
        assert {name: after.array(name).tobytes() for name in after.tensors} == data


def test_the_alignment_stays(tmp_path):
    writer = GGUFWriter(alignment=64)
    with pytest.raises(ParameterError, match=r"general\.alignment must be 64"):
        writer.remove("general.alignment")
    writer.add_tensor("a", Type.I8, (3,))
    writer.write(tmp_path / "a.gguf", {"a": b"abc"})
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert GGUFWriter.copy_of(reader).alignment == 64
    writer = GGUFWriter()
    writer.set("general.alignment", 32, "u32")
    writer.remove("general.alignment")
    assert writer.keys == []


@pytest.mark.parametrize("kind", "fedbhilBHILQ?")
def test_arrays_of_any_layout_are_written(tmp_path, kind):
    values = np.arange(12).reshape(3, 4).astype(kind)
    for i, array in enumerate((values, np.asfortranarray(values), values.repeat(2, axis=1)[:, ::2])):
        writer = GGUFWriter()
        writer.add_tensor("a", Type.I8, (values.nbytes,))
        writer.write(tmp_path / f"{i}.gguf", {"a": array})
        with GGUFReader(tmp_path / f"{i}.gguf") as reader:
            assert reader.array("a").tobytes() == values.tobytes()


def test_tensors_of_a_file_are_used_in_place(tmp_path):
    writer = GGUFWriter()
    writer.add_tensor("a", Type.F32, (3, 2))
    writer.write(tmp_path / "a.gguf", {"a": np.arange(6, dtype="f")})
    with GGUFReader(tmp_path / "a.gguf") as reader:
        ctx = Context(Context.size_for(1))
        tensor = Tensor.from_numpy(ctx, reader.array("a"), "a")
    np.testing.assert_array_equal(tensor.to_numpy(), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(DTypeError, match="read-only"):
        tensor.set_data(bytes(24))
