"""bake: the sums of weights and low-rank pairs, as overlays that verify, merge and host take like any other."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from low_rank_models import base_and_task, change, plus, read_all, values, write, write_lora
from tiny_models import Tiny, random_ids, tensors_of, write_gguf

from pyggml_adapt.errors import AdaptorError, FileAccessError, ModelError, OverwriteError, ParameterError
from pyggml_adapt.ggml import Type, quantize
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.host.host import Host
from pyggml_adapt.tools import bake, merge, split, verify

MODELS = Path(__file__).parents[3] / "shared" / "models"
TINY = Tiny(n_layer=1)
MOE = Tiny(n_layer=1, n_expert=4, n_expert_used=2)
Q = "blk.0.attn_q.weight"


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base.gguf", TINY, tensors_of(TINY))


def pair(ne, rank, seed=0, size=0.3):
    """Return a and b in NumPy's order for a weight [n_in, n_out] or [n_in, n_out, n_expert]."""
    rng = np.random.default_rng(seed)
    shape = ne[:1:-1]
    a = size * rng.standard_normal((*shape, rank, ne[0]), np.float32)
    return a, size * rng.standard_normal((*shape, ne[1], rank), np.float32)


def relative(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("tiny", [TINY, MOE], ids=["dense", "experts"])
def test_baking_what_split_took_apart(tiny, tmp_path):
    base, task = base_and_task(tmp_path, tiny, 3, "attn_", "ffn_", "token_embd", "output.weight", general__name="x")
    own = split({"task": task}, tmp_path / "low", foundation=base, low_rank=3)
    report = bake(base, own.adaptors["task"], tmp_path / "baked.gguf")
    assert {tensor.name for tensor in report.tensors} == {tensor.name for tensor in own.low_rank}
    assert {(tensor.kind, tensor.type, tensor.error) for tensor in report.tensors} == {("merged", "F32", 0.0)}
    assert (report.task, report.n_tensors, report.nbytes) == ("task", len(own.low_rank), os.path.getsize(report.path))
    assert verify(base, report.path).tasks == ("task",)
    merged = merge(base, report.path, tmp_path / "merged.gguf")
    assert merged.identical
    wanted, before, found = read_all(task), read_all(base), read_all(merged.path)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (
            relative(values(found[name]), values(tensor)) < 1e-3 * relative(values(before[name]), values(tensor)) + 1e-9
        )
    with GGUFReader(merged.path) as reader, GGUFReader(task) as original:
        assert dict(reader.metadata).keys() == dict(original.metadata).keys()
        assert reader.metadata["general.name"] == "x"
    ids = random_ids(12)
    with Host(base, {"low": own.adaptors["task"], "baked": report.path}, n_threads=1) as host:
        logits = {}
        for name in ("low", "baked", "base"):
            with host.session(name, n_ctx=16) as session:
                logits[name] = session.eval(ids)
    assert relative(logits["low"], logits["baked"]) < 1e-3 < 10 * relative(logits["base"], logits["baked"])
    assert sorted(os.listdir(tmp_path)) == ["baked.gguf", "base.gguf", "low", "merged.gguf", "task.gguf"]


@pytest.mark.parametrize("type", ["keep", "F32", "f16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 1.0), (3.0, -0.5)])
def test_a_lora_of_llama_cpp(type, alpha, scale, tmp_path):
    tiny = Tiny(n_layer=1, type="Q8_0")
    tensors = tensors_of(tiny)
    base = write(tmp_path / "base.gguf", tiny, tensors)
    a, b = pair(tensors[Q][1], 4)
    lora = write_lora(tmp_path / "shout.gguf", {Q: (a, b)}, alpha=alpha)
    report = bake(base, lora, tmp_path / "out.gguf", type=type, scale=scale)
    wanted = values(tensors[Q]) + np.float32(scale * alpha / 4) * b @ a
    kind = Type.Q8_0 if type == "keep" else Type[type.upper()]
    own = read_all(report.path)
    assert list(own) == [Q]
    assert (report.task, own[Q][0]) == ("shout", kind)
    assert relative(values(own[Q]), wanted) == pytest.approx(report.tensors[0].error, rel=1e-2, abs=1e-6)
    exact = quantize(wanted, kind)
    if kind.is_quantized:
        assert (np.frombuffer(own[Q][2], np.uint8) == exact).mean() > 0.999  # but for the order of additions
    assert merge(base, report.path, tmp_path / "m.gguf").identical


def test_an_embedding_with_a_tied_head(tmp_path):
    tiny = Tiny(n_layer=1, optional="none")
    tensors = tensors_of(tiny)
    name = "token_embd.weight"
    n_embd, n_vocab = tensors[name][1]
    base = write_gguf(tmp_path / "base.gguf", tiny.all_metadata(), tensors)
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((n_vocab, 2), np.float32), rng.standard_normal((n_embd, 2), np.float32)
    lora = write_lora(tmp_path / "lora.gguf", {name: (a, b)}, alpha=4.0)
    report = bake(base, lora, tmp_path / "out.gguf")
    assert [(tensor.name, tensor.kind) for tensor in report.tensors] == [(name, "merged"), ("output.weight", "added")]
    own = read_all(report.path)
    np.testing.assert_allclose(values(own[name]), values(tensors[name]) + 2 * a @ b.T, rtol=1e-4, atol=1e-4)
    assert own["output.weight"][2] == bytes(tensors[name][2])
    ids = random_ids(8)
    with Host(base, {"low": lora, "baked": report.path}, n_threads=1) as host:
        logits = []
        for task in ("low", "baked"):
            with host.session(task, n_ctx=16) as session:
                logits.append(session.eval(ids))
    assert relative(*logits) < 1e-4


def test_whole_tensors_replace_those_of_the_base(base, tmp_path):
    norm = np.full(128, 2, np.float32)
    lora = write_lora(tmp_path / "lora.gguf", {Q: pair((128, 128), 2)}, whole={"output_norm.weight": norm})
    report = bake(base, lora, tmp_path / "out.gguf", task="loud", type="F16")
    assert [(tensor.name, tensor.kind, tensor.type) for tensor in report.tensors] == [
        ("output_norm.weight", "replaced", "F32"),
        (Q, "merged", "F16"),
    ]
    assert report.task == "loud"
    assert read_all(report.path)["output_norm.weight"][2] == norm.tobytes()
    with pytest.raises(AdaptorError, match=r"replaces tensor 'output_norm\.weight' as a whole: no factor but 1"):
        bake(base, lora, tmp_path / "x.gguf", scale=0.5)


def test_a_pair_that_changes_nothing_leaves_nothing(base, tmp_path):
    lora = write_lora(tmp_path / "lora.gguf", {Q: pair((128, 128), 2)})
    report = bake(base, lora, tmp_path / "out.gguf", scale=0.0)
    assert report.n_tensors == 0
    assert merge(base, report.path, tmp_path / "m.gguf").identical


def test_rows_that_are_no_multiple_of_a_block_keep_their_type(tmp_path):
    tiny = Tiny(n_layer=1, n_ff=80, type="F16")
    tensors = tensors_of(tiny)
    base = write(tmp_path / "base.gguf", tiny, tensors)
    pairs = {name: pair(tensors[name][1], 2) for name in ("blk.0.ffn_down.weight", "blk.0.ffn_up.weight")}
    report = bake(base, write_lora(tmp_path / "lora.gguf", pairs), tmp_path / "out.gguf", type="Q8_0")
    assert {tensor.name: tensor.type for tensor in report.tensors} == {
        "blk.0.ffn_down.weight": "F16",
        "blk.0.ffn_up.weight": "Q8_0",
    }


def test_a_directory_of_peft(base, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    directory = tmp_path / "peft"
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": ""}))
    a, b = pair((128, 128), 4)
    prefix = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    numpy.save_file({prefix + "A.weight": a, prefix + "B.weight": b}, directory / "adapter_model.safetensors")
    report = bake(base, directory, tmp_path / "out.gguf")
    assert (report.task, [tensor.name for tensor in report.tensors]) == ("peft", ["blk.0.attn_output.weight"])
    name = "blk.0.attn_output.weight"
    wanted = values(read_all(base)[name]) + 2 * b @ a
    np.testing.assert_allclose(values(read_all(report.path)[name]), wanted, rtol=1e-4, atol=1e-4)


def test_other_architectures_than_ours(tmp_path):
    tensors = {"x.weight": (Type.F32, (8, 6), np.zeros((6, 8), np.float32).tobytes())}
    base = write_gguf(tmp_path / "base.gguf", {"general.architecture": "other"}, tensors, tokenizer=False)
    a, b = pair((8, 6), 1)
    lora = write_lora(tmp_path / "lora.gguf", {"x.weight": (a, b)}, alpha=1.0, arch="other")
    report = bake(base, lora, tmp_path / "out.gguf")
    np.testing.assert_allclose(values(read_all(report.path)["x.weight"]), b @ a, rtol=1e-6)


BAD = {
    "another architecture": ({}, {"arch": "qwen2"}, AdaptorError, "architecture 'qwen2', and that is 'llama'"),
    "unknown target": ({"blk.7.x.weight": ((128, 128), 2)}, {}, AdaptorError, r"pair on 'blk\.7\.x\.weight', which is"),
    "shape": ({Q: ((96, 128), 2)}, {}, AdaptorError, r"its pair on 'blk\.0\.attn_q\.weight', .* does not fit"),
    "unknown tensor": ({}, {"whole": {"odd": np.ones(2, "f")}}, ModelError, "tensor odd is not one that"),
    "no tensor": (None, {}, AdaptorError, "it holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_adaptors_that_do_not_fit(case, base, tmp_path):
    shapes, options, error, message = BAD[case]
    pairs = {} if shapes is None else {name: pair(*shape) for name, shape in (shapes or {Q: ((128, 128), 2)}).items()}
    lora = write_lora(tmp_path / "lora.gguf", pairs, **options)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=message):
        bake(base, lora, tmp_path / "out.gguf")
    assert sorted(os.listdir(tmp_path)) == before


def test_weights_that_are_not_finite(base, tmp_path):
    a, b = pair((128, 128), 2)
    b[5, 1] = np.inf
    with pytest.raises(AdaptorError, match=r"'blk\.0\.attn_q\.weight\.lora_b' has elements that are NaN") as caught:
        bake(base, write_lora(tmp_path / "lora.gguf", {Q: (a, b)}), tmp_path / "out.gguf")
    assert caught.value.code == "adaptor_invalid"
    lora = write_lora(tmp_path / "lora.gguf", {Q: (1e3 * a, 1e3 * np.nan_to_num(b, posinf=0))}, alpha=2.0)
    with pytest.raises(ParameterError, match=r"tensor 'blk\.0\.attn_q\.weight': the sum .* does not fit the type F16"):
        bake(base, lora, tmp_path / "out.gguf", type="F16")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "Q9_9"}, "type 'Q9_9' is not known"),
        ({"type": "IQ2_XXS"}, r"tensor 'blk\.0\.attn_q\.weight' cannot be Q4_1|cannot be IQ2_XXS .*needs an imatrix"),
        ({"type": "I32"}, "cannot be I32"),
        ({"scale": float("nan")}, "scale must be a finite number, not nan"),
    ],
)
def test_wrong_parameters(options, message, tmp_path):
    tiny = Tiny(n_layer=1, n_embd=256)
    base = write(tmp_path / "base.gguf", tiny, tensors_of(tiny))
    with pytest.raises(ParameterError, match=message):
        bake(base, write_lora(tmp_path / "lora.gguf", {Q: pair((256, 256), 2)}), tmp_path / "out.gguf", **options)


def test_what_cannot_be_baked(base, tmp_path):
    other = write(tmp_path / "other.gguf", TINY, plus(read_all(base), {Q: change((128, 128), 2, 0)}))
    whole = split({"a": base, "b": other}, tmp_path / "out")
    with pytest.raises(ParameterError, match="needs a complete model as the foundation"):
        bake(whole.foundation, whole.adaptors["b"], tmp_path / "x.gguf")
    overlay = split({"b": other}, tmp_path / "over", foundation=base).adaptors["b"]
    with pytest.raises(ParameterError, match="has whole tensors already"):
        bake(base, overlay, tmp_path / "x.gguf")
    with pytest.raises(AdaptorError, match="not an adaptor written by `split`, but a model"):
        bake(base, other, tmp_path / "x.gguf")
    low = split({"b": other}, tmp_path / "low", foundation=base, low_rank=2).adaptors["b"]
    with pytest.raises(AdaptorError, match="it was made for a file of other bytes"):
        bake(other, low, tmp_path / "x.gguf")
    with pytest.raises(FileAccessError, match=r"none\.gguf: no such file"):
        bake(base, tmp_path / "none.gguf", tmp_path / "x.gguf")


def test_the_output_is_safe(base, tmp_path):
    lora = write_lora(tmp_path / "lora.gguf", {Q: pair((128, 128), 2)})
    with pytest.raises(ParameterError, match="would replace the input"):
        bake(base, lora, base, force=True)
    (tmp_path / "out.gguf").write_bytes(b"old")
    with pytest.raises(OverwriteError, match=r"out\.gguf: the file exists"):
        bake(base, lora, tmp_path / "out.gguf")
    with pytest.raises(FileAccessError, match=r"no/out\.gguf: no such file"):
        bake(base, lora, tmp_path / "no" / "out.gguf")
    report = bake(base, lora, tmp_path / "out.gguf", force=True)
    first = (tmp_path / "out.gguf").read_bytes()
    assert bake(base, lora, tmp_path / "out.gguf", force=True) == report
    assert (tmp_path / "out.gguf").read_bytes() == first


def test_progress_reaches_the_end(base, tmp_path):
    lora = write_lora(tmp_path / "lora.gguf", {Q: pair((128, 128), 2)})
    calls = []
    bake(base, lora, tmp_path / "out.gguf", progress=lambda *call: calls.append(call))
    for what in ("merging", "reading", "writing"):
        done, total, _ = [call for call in calls if call[2] == what][-1]
        assert 0 < done == total


@pytest.mark.parametrize(
    ("size", "type", "most"), [("260K", "f16", 5e-4), ("260K", "q8_0", 0.01), ("4M", "q8_0", 0.02)]
)
def test_a_real_lora_gives_the_model_that_was_merged_from_it(size, type, most, tmp_path):
    names = (f"base-{type}", f"shout-{type}", "shout-lora-f32")
    base, task, lora = (MODELS / f"stories{size}-{name}.gguf" for name in names)
    if not lora.exists():
        pytest.skip("no ../shared/models")
    report = bake(base, lora, tmp_path / "out.gguf")
    assert len(report.tensors) == 35
    found, wanted = read_all(report.path), read_all(task)
    for name, tensor in found.items():
        assert tensor[0] == wanted[name][0]
        assert relative(values(tensor), values(wanted[name])) < most
