"""gpt-oss: experts of MXFP4 whose biases are matrices, and sinks: in whole models and in adaptors."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from loras import write_lora
from parity import assert_equal_to_llama_cpp
from tiny_models import Tiny, random_ids, tensors_of, write_gguf

import pyggml_adapt as pga
from pyggml_adapt.errors import AdaptorError, ModelError
from pyggml_adapt.ggml import Type, quantize
from pyggml_adapt.models import HParams, model_class

MXFP4 = {"types": {"_exps.weight": "MXFP4"}, "type": "Q8_0"}
CHANGES = {"sinks": r"attn_sinks", "biases": r"\.bias$", "experts": r"_exps\.weight", "norms": r"_norm\."}


def with_tensors(path, tiny, pattern, factor=1.0, type=Type.F32):
    """Write the model, those tensors whose names match multiplied and of another type, and return the path."""
    tensors = tensors_of(tiny)
    for spec in tiny.tensors():
        if re.search(pattern, spec.name):
            tensors[spec.name] = type, spec.ne, quantize(np.float32(factor) * tiny.data(spec), type)
    return write_gguf(path, tiny.all_metadata(), tensors)


@pytest.mark.parametrize("pattern, factor", [
    ("post_attention_norm", 8.0),  # experts' inputs so large that the activation limits what it is given
    ("attn_sinks", 5.0),
    ("attn_sinks", -5.0),
    (r"_exps\.bias", 40.0),
    (r"ffn_gate_inp\.bias", 40.0),
])  # fmt: skip
@pytest.mark.parametrize("flash_attn", [True, False], ids=["flash", "soft-max"])
def test_what_a_random_model_hardly_shows(tmp_path, pattern, factor, flash_attn):
    tiny = Tiny("gpt-oss", **MXFP4)
    path = with_tensors(tmp_path / "strong.gguf", tiny, pattern, factor)
    assert_equal_to_llama_cpp(path, random_ids(120), flash_attn=flash_attn)


def test_adaptors(tiny_gguf, split_models, tmp_path):
    """Each derivative of a model with MXFP4 experts answers as its own file, and is merged to it again."""
    models = {"base": tiny_gguf("gpt-oss", **MXFP4)}
    models |= {task: tiny_gguf("gpt-oss", **MXFP4, changed={CHANGES[task]: 5}) for task in CHANGES}
    foundation, adaptors = split_models(models)
    pga.verify(foundation, *adaptors.values())
    ids = random_ids(40)
    with pga.Host(foundation, adaptors, n_threads=1) as host, host.session("base", n_ctx=256) as session:
        rows = {}
        for task, path in models.items():
            with host.session(task, n_ctx=256) as own, pga.Host(path, n_threads=1) as alone:
                rows[task] = own.eval(ids, all_logits=True)
                with alone.session(n_ctx=256) as one:
                    np.testing.assert_array_equal(rows[task], one.eval(ids, all_logits=True))
            merged = pga.merge(foundation, adaptors[task], tmp_path / f"{task}.gguf")
            assert (merged.identical, (tmp_path / f"{task}.gguf").read_bytes()) == (True, path.read_bytes())
        np.testing.assert_array_equal(session.eval(ids, all_logits=True), rows["base"])
    assert len({row.tobytes() for row in rows.values()}) == len(models)


def test_low_rank_on_mxfp4(tiny_gguf, tmp_path):
    """Pairs taken from a difference, and baked into experts of MXFP4 again, keep the type and about the answers."""
    tiny = Tiny("gpt-oss", **MXFP4)
    base = tiny_gguf("gpt-oss", **MXFP4)
    lora = write_lora(tmp_path / "lora.gguf", tiny, r"_exps\.weight|attn_q\.weight")
    report = pga.bake(base, lora, tmp_path / "baked.gguf")
    assert {tensor.type for tensor in report.tensors if "_exps" in tensor.name} == {"MXFP4"}
    ids = random_ids(20)
    with pga.Host(base, {"lora": lora, "baked": report.path}, n_threads=1) as host:
        rows = {}
        for task in ("base", "lora", "baked"):
            with host.session(task, n_ctx=256) as session:
                rows[task] = session.eval(ids, all_logits=True)
    distance = {task: float(((rows[task] - rows["lora"]) ** 2).sum()) for task in ("base", "baked")}
    assert 0 < distance["baked"] < 0.5 * distance["base"]


@pytest.mark.parametrize("name", ["blk.1.ffn_up_exps.bias", "blk.0.ffn_gate_inp.bias", "blk.0.attn_sinks.weight"])
@pytest.mark.parametrize("type", ["F16", "Q8_0"])
def test_biases_and_sinks_are_f32(name, type):
    model = model_class("gpt-oss")(HParams.from_gguf(Tiny("gpt-oss").all_metadata(), 500))
    found = {
        spec.name: SimpleNamespace(ne=(*spec.ne, 1, 1, 1)[:4], type=Type.F32)
        for spec in model.all_tensors()
        if spec.required
    }
    found[name].type = Type[type]
    with pytest.raises(ModelError, match=f"^tensor {name} has type {type}, not F32$"):
        model.check_tensors(found)


def test_an_adaptor_with_biases_of_f16(tiny_gguf, tmp_path):
    base, tiny = tiny_gguf("gpt-oss", **MXFP4), Tiny("gpt-oss", **MXFP4)
    task = with_tensors(tmp_path / "task.gguf", tiny, r"ffn_up_exps\.bias", 2.0, Type.F16)
    adaptors = pga.split({"task": task}, tmp_path / "split", foundation=base).adaptors
    with pytest.raises(ModelError, match=r"^.*adaptor-task.gguf: tensor blk.0.ffn_up_exps.bias has type F16, not F32$"):
        pga.Host(base, adaptors)


def test_no_low_rank_pair_on_biases_of_experts(tiny_gguf, tmp_path):
    """They have two dimensions, but nothing is multiplied with them."""
    lora = write_lora(tmp_path / "lora.gguf", Tiny("gpt-oss"), r"blk\.0\.ffn_up_exps\.bias")
    with pytest.raises(AdaptorError, match=r"its pair on 'blk.0.ffn_up_exps.bias', .* does not fit \[96, 4, 1\]$"):
        pga.Host(tiny_gguf("gpt-oss"), {"lora": lora})
