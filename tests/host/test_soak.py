"""The soak of benchmarks/soak.py in its short form: many adaptors, room for few, two threads."""

import importlib
from pathlib import Path

import pytest
from loras import write_lora
from tiny_models import Tiny

import pyggml_adapt as pga

ROOT = Path(__file__).parents[2]
SMALL = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 1}


@pytest.fixture
def soak(monkeypatch):
    """Return the module, which lies beside the package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("soak")
    monkeypatch.setattr(module, "SECONDS_BETWEEN", 0.02)
    return module


def test_many_adaptors_in_little_memory(soak, tiny_gguf, split_models, tmp_path):
    """40 adaptors of both kinds with room for 4, 400 requests: see docs/benchmarks.md for 500 and 5,000."""
    models = {f"whole{i}": tiny_gguf(**SMALL, changed={"attn": i + 1}) for i in range(8)}
    foundation, adaptors = split_models({"base": tiny_gguf(**SMALL), **models}, "overlay")
    for i in range(32):
        adaptors[f"lora{i}"] = write_lora(tmp_path / f"{i}.gguf", Tiny(**SMALL), seed=i, alpha=1.0 + i)
    sizes = []
    with pga.Host(foundation, adaptors, n_threads=1) as host:
        sizes = sorted(adaptor.nbytes for adaptor in host.adaptors)
    budget = 4 * sizes[-1]
    found = soak.run(str(foundation), adaptors, budget=budget, n_requests=400)
    assert found.wrong == []
    assert len(found.ms) == 400 and 0.2 < found.hit_rate < 0.9
    assert len(found.samples) > 3
    assert max(sample.nbytes for sample in found.samples) <= budget
    assert max(sample.n_files for sample in found.samples) <= found.samples[0].n_files + 2 * 20
    assert found.samples[-1].rss < found.samples[len(found.samples) // 3].rss + 8 * 2**20
