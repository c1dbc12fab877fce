"""link: names by which an unmodified llama.cpp loads a pair, with the very logits of the model that was split."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
from low_rank_models import base_and_task, write_lora
from raw_gguf import f32_model
from tiny_models import Tiny

from pyggml_adapt.errors import AdaptorError, OverwriteError, ParameterError
from pyggml_adapt.tools import link, split

MODELS = Path(__file__).parents[3] / "shared" / "models"


@pytest.fixture
def report(tmp_path):
    models = {}
    for seed, task in enumerate(("one", "two")):
        models[task] = tmp_path / f"{task}.gguf"
        models[task].write_bytes(f32_model({"a": ((1,), bytes(4)), "b": ((1,), bytes([seed] * 4))}))
    return split(models, tmp_path / "out", prefix="phi")


def test_links_point_to_adaptor_and_foundation(report, tmp_path):
    first, second = link(report.foundation, report.adaptors["one"], tmp_path / "stock")
    assert os.path.basename(first) == "phi-adaptor-one-00001-of-00002.gguf"
    assert os.path.basename(second) == "phi-adaptor-one-00002-of-00002.gguf"
    assert os.path.samefile(first, report.adaptors["one"])
    assert os.path.samefile(second, report.foundation)
    assert link(report.foundation, report.adaptors["one"], tmp_path / "stock") == (first, second)  # they are there


def test_low_rank_adaptors_are_no_shards(tmp_path):
    base, task = base_and_task(tmp_path, Tiny(n_layer=1), 2, "attn_q")
    own = split({"x": task}, tmp_path / "low", foundation=base, low_rank=2).adaptors["x"]
    lora = write_lora(tmp_path / "lora.gguf", {"x.weight": (np.ones((2, 8), "f"), np.ones((8, 2), "f"))})
    for path in (own, lora):
        with pytest.raises(ParameterError, match=f"{path}: a low-rank adaptor is no shard of a model; .* bake"):
            link(base, path, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_links_survive_a_move_of_the_whole_tree(report, tmp_path):
    link(report.foundation, report.adaptors["one"], tmp_path / "out" / "stock")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert all(path.exists() for path in (tmp_path / "moved" / "stock").iterdir())


def test_what_is_there_is_replaced_only_when_told(report, tmp_path):
    (tmp_path / "phi-adaptor-one-00002-of-00002.gguf").write_bytes(b"other")
    with pytest.raises(OverwriteError, match="00002-of-00002"):
        link(report.foundation, report.adaptors["one"], tmp_path)
    assert not (tmp_path / "phi-adaptor-one-00001-of-00002.gguf").exists()
    _, second = link(report.foundation, report.adaptors["one"], tmp_path, force=True)
    assert os.path.samefile(second, report.foundation)


def test_wrong_pairs_get_no_links(report, tmp_path):
    with pytest.raises(AdaptorError, match="not an adaptor"):
        link(report.foundation, tmp_path / "one.gguf", tmp_path / "stock")
    overlay = split({"two": tmp_path / "two.gguf"}, tmp_path / "over", foundation=tmp_path / "one.gguf")
    with pytest.raises(ParameterError, match=r"llama\.cpp cannot load an overlay adaptor"):
        link(overlay.foundation, overlay.adaptors["two"], tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


class Stock:
    """Runs whole models in llama.cpp."""

    def __init__(self, llama_cpp):
        self.api, self.lines = llama_cpp, []
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: self.lines.append(text.decode()))
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(self._log, None)

    def params(self):
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        return params

    def load(self, *paths):
        if len(paths) == 1:
            return self.api.llama_model_load_from_file(os.fsencode(paths[0]), self.params())
        names = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
        return self.api.llama_model_load_from_splits(names, len(paths), self.params())

    def logits(self, *paths):
        api, model = self.api, self.load(*paths)
        assert model
        params = api.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
        context = api.llama_init_from_model(model, params)
        tokens = (api.llama_token * 5)(1, 403, 407, 261, 378)
        assert api.llama_decode(context, api.llama_batch_get_one(tokens, 5)) == 0
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (n_vocab,)).copy()
        api.llama_free(context)
        api.llama_model_free(model)
        return logits


@pytest.fixture(scope="module")
def stock():
    """Return llama.cpp; skip where llama-cpp-python is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp")
    made = Stock(llama_cpp)
    yield made
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), None)


@pytest.mark.parametrize("tasks", [("base", "hero"), ("hero", "mood"), ("hero", "hero")], ids="-".join)
def test_llama_cpp_computes_the_same_logits_from_a_pair(stock, tasks, tmp_path):
    models = {f"{i}-{task}": MODELS / f"stories260K-{task}-q8_0.gguf" for i, task in enumerate(tasks)}
    if not all(path.exists() for path in models.values()):
        pytest.skip("no ../shared/models")
    report = split(models, tmp_path)
    for task, path in models.items():
        whole = stock.logits(path)
        first, _ = link(report.foundation, report.adaptors[task], tmp_path / "stock")
        assert np.array_equal(whole, stock.logits(report.adaptors[task], report.foundation))
        assert np.array_equal(whole, stock.logits(first))


def test_llama_cpp_refuses_an_overlay_adaptor(stock, tmp_path):
    base, hero = (MODELS / f"stories260K-{task}-q8_0.gguf" for task in ("base", "hero"))
    if not base.exists():
        pytest.skip("no ../shared/models")
    adaptor = split({"hero": hero}, tmp_path, foundation=base).adaptors["hero"]
    assert not stock.load(adaptor)
    assert any("not found" in line for line in stock.lines)
    model = stock.load(base)
    assert not stock.api.llama_adapter_lora_init(model, os.fsencode(adaptor))
    assert any("expect adapter.type to be 'lora', but got: overlay" in line for line in stock.lines)
    stock.api.llama_model_free(model)
