"""inspect: what each kind of file is said to be."""

from pathlib import Path

import numpy as np
import pytest
from low_rank_models import base_and_task, write_lora
from raw_gguf import STRING, f32_model, key, string
from tiny_models import Tiny

from pyggml_adapt.errors import FileAccessError
from pyggml_adapt.tools import inspect, split


def test_every_kind_of_file(tmp_path):
    models = {}
    for seed, task in enumerate(("one", "two")):
        models[task] = tmp_path / f"{task}.gguf"
        models[task].write_bytes(f32_model({"a": ((1,), bytes(4)), "b": ((1,), bytes([seed] * 4))}))
    report = split(models, tmp_path / "out")
    overlay = split({"two": models["two"]}, tmp_path / "over", foundation=models["one"])
    lora = tmp_path / "lora.gguf"
    kinds = {"general.type": "adapter", "adapter.type": "lora"}
    lora.write_bytes(f32_model({}, [key(name, STRING, string(value)) for name, value in kinds.items()]))
    found = inspect(models["one"], report.foundation, report.adaptors["two"], overlay.adaptors["two"], lora)
    assert [(info.kind, info.layout, info.task, info.n_tensors) for info in found] == [
        ("model", "", "", 2),
        ("foundation", "", "", 1),
        ("adaptor", "complement", "two", 1),
        ("adaptor", "overlay", "two", 1),
        ("lora", "", "", 0),
    ]
    assert found[1].foundation_id == found[2].foundation_id != ""
    assert found[0].to_json()["types"] == {"F32": 2}
    assert found[0].architecture == "llama"


def test_low_rank_adaptors(tmp_path):
    base, task = base_and_task(tmp_path, Tiny(n_layer=1), 2, "attn_q", "attn_v")
    own = split({"x": task}, tmp_path / "low", foundation=base, low_rank=2).adaptors["x"]
    pairs = {f"{i}.weight": (np.ones((rank, 8), "f"), np.ones((8, rank), "f")) for i, rank in enumerate((4, 2, 4))}
    lora = write_lora(tmp_path / "lora.gguf", pairs, alpha=16.0, whole={"output_norm.weight": np.ones(8, "f")})
    ours, theirs = inspect(own, lora)
    assert (ours.kind, ours.layout, ours.task, ours.n_pairs, ours.n_whole) == ("adaptor", "low-rank", "x", 2, 0)
    assert (ours.ranks, ours.alpha) == ({2: 2}, 2.0)
    assert ours.max_error is not None and 0 < ours.max_error < 1e-3
    assert (theirs.kind, theirs.layout, theirs.n_pairs, theirs.n_whole) == ("lora", "", 3, 1)
    assert (theirs.ranks, theirs.alpha, theirs.max_error) == ({2: 1, 4: 2}, 16.0, None)


def test_the_first_file_at_fault_is_named(tmp_path):
    with pytest.raises(FileAccessError, match=f"^{tmp_path}/no: no such file"):
        inspect(tmp_path / "no")


def test_a_directory_of_peft():
    """The one that PEFT itself made: tests/weights/data/make_peft_golden.py."""
    directory = Path(__file__).parents[1] / "weights" / "data" / "peft"
    (info,) = inspect(directory)
    assert (info.path, info.kind, info.architecture) == (str(directory), "peft", "")
    assert info.n_tensors == 2 * info.n_pairs + info.n_whole and info.n_pairs == sum(info.ranks.values()) > 0
    assert info.nbytes == sum(path.stat().st_size for path in directory.iterdir())


def test_a_directory_that_only_looks_like_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FileAccessError, match=r"adapter_model\.safetensors: no such file"):
        inspect(tmp_path)
