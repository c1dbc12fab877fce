"""PEFT directories: what is read from them, in GGUF's names and orientation, and what is refused."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from tiny_models import Tiny

from pyggml_adapt.errors import AdaptorError, FileAccessError, FileFormatError
from pyggml_adapt.ggml import Type
from pyggml_adapt.models import HParams, model_class
from pyggml_adapt.models.hf import hf_target
from pyggml_adapt.weights.peft import Target, is_peft, read_peft

DATA = Path(__file__).parent / "data"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "org/base"}
UP = "model.layers.0.mlp.up_proj"
TARGETS = {
    "model.layers.0.mlp.up_proj.weight": Target("blk.0.ffn_up.weight"),
    "model.layers.0.mlp.up_proj.bias": Target("blk.0.ffn_up.bias"),
    "model.layers.0.self_attn.q_proj.weight": Target("blk.0.attn_q.weight", 2),
    "model.layers.0.self_attn.q_proj.bias": Target("blk.0.attn_q.bias", 2),
    "model.embed_tokens.weight": Target("token_embd.weight"),
    "model.norm.weight": Target("output_norm.weight"),
    "norm.weight": Target("output_norm.weight"),
    "lm_head.weight": Target("output.weight"),
    "also.weight": Target("blk.0.ffn_up.weight"),
    **{f"experts.{i}.w1.weight": Target("blk.0.ffn_gate_exps.weight", 0, i, 3) for i in range(3)},
    "experts.0.w1.bias": Target("blk.0.ffn_gate_exps.bias", 0, 0, 3),
}
PERMUTED = [0, 2, 1, 3, 4, 6, 5, 7]  # 8 rows in 2 heads of 4: each head's halves interleaved


def bf16(values):
    """Return the upper halves of F32 values that have nothing in the lower ones."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def safetensors_of(tensors):
    """Return a safetensors file; NumPy's uint16 stands for BF16."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int8": "I8"}
    header, data = {}, b""
    for key, value in tensors.items():
        end = len(data) + value.nbytes
        header[key] = {"dtype": names[value.dtype.name], "shape": value.shape, "data_offsets": [len(data), end]}
        data += value.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def values(*shape, seed=0):
    """Return small multiples of 1/8, which every type holds."""
    return np.random.default_rng(seed).integers(-16, 16, shape).astype(np.float32) / 8


def pair(module=UP, rank=2, n_in=4, n_out=8):
    return {
        f"base_model.model.{module}.lora_A.weight": values(rank, n_in),
        f"base_model.model.{module}.lora_B.weight": values(n_out, rank, seed=1),
    }


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a PEFT directory and returns its path."""

    def write(tensors, **config):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
        (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_of(tensors))
        return tmp_path

    return write


def read(path, bias_of=None):
    return read_peft(path, TARGETS.get, bias_of)


def refused(path, bias_of=None):
    """Return why a directory is refused, without the path of the file."""
    with pytest.raises(AdaptorError) as error:
        read(path, bias_of)
    assert error.value.code == "adaptor_invalid"
    where, _, why = str(error.value).partition(": ")
    assert Path(where).parent == path and "\n" not in why
    return why


# --- what is read -----------------------------------------------------------------------------------------------


def test_pair(write):
    path = write(pair())
    assert is_peft(path) and not is_peft(path / "adapter_config.json") and not is_peft(path.parent)
    found = read(path)
    assert list(found.pairs) == ["blk.0.ffn_up.weight"] and found.whole == {}
    a, b, alpha = found.pairs["blk.0.ffn_up.weight"]
    assert (a.type, a.ne, b.type, b.ne, alpha) == (Type.F32, (4, 2), Type.F32, (2, 8), 6.0)
    assert np.array_equal(a.data, values(2, 4)) and np.array_equal(b.data, values(8, 2, seed=1))
    assert found.base == "org/base"
    assert found.files == (str(path / "adapter_config.json"), str(path / "adapter_model.safetensors"))


def test_content_id(write):
    ids = [read(write(*args[:1], **args[1])).content_id for args in (
        (pair(), {}), (pair(), {}), (pair(), {"lora_dropout": 0.5}), (pair(n_in=5), {}),
    )]  # fmt: skip
    assert ids[0] == ids[1] and len(set(ids)) == 3 and len(ids[0]) == 64


@pytest.mark.parametrize("convert", [np.float16, bf16])
def test_pairs_become_f32(write, convert):
    found = read(write({key: convert(value) for key, value in pair().items()}))
    a, b, _ = found.pairs["blk.0.ffn_up.weight"]
    assert (a.data.dtype, b.data.dtype) == (np.float32, np.float32)
    assert np.array_equal(a.data, values(2, 4)) and np.array_equal(b.data, values(8, 2, seed=1))


def test_rows_of_heads_are_permuted(write):
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    found = read(write(pair("model.layers.0.self_attn.q_proj")))
    a, b, _ = found.pairs["blk.0.attn_q.weight"]
    assert np.array_equal(a.data, values(2, 4)) and np.array_equal(b.data, values(8, 2, seed=1)[PERMUTED])
    assert b.data.flags.c_contiguous
    found = read(write({f"{q}.weight": np.float16(values(8, 4)), f"{q}.bias": values(8)}))
    assert np.array_equal(found.whole["blk.0.attn_q.weight"].data, values(8, 4)[PERMUTED])
    assert np.array_equal(found.whole["blk.0.attn_q.bias"].data, values(8)[PERMUTED])


@pytest.mark.parametrize(("config", "alpha"), [
    ({}, 6.0),
    ({"lora_alpha": 0.5}, 0.5),
    ({"lora_alpha": -3}, -3.0),
    ({"use_rslora": True}, 6 * 2**0.5),
    ({"alpha_pattern": {"up_proj": 3}}, 3.0),
    ({"alpha_pattern": {"proj": 3, "down_proj": 4, "p_proj": 5}}, 6.0),  # a pattern begins at a dot
    ({"alpha_pattern": {"mlp.up_proj": 3, "up_proj": 4}}, 3.0),  # the first that matches
    ({"alpha_pattern": {r"^model\.layers\.[0-9]+\.mlp\.(?:up|down)_proj": 3}}, 3.0),
    ({"alpha_pattern": {"model.*up_proj": 3}}, 3.0),
    ({"alpha_pattern": {"layers.0": 3}}, 6.0),  # it ends where the name does
    ({"r": 8, "rank_pattern": {UP: 2}}, 6.0),
    ({"r": 8, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 1}, "use_rslora": True}, 2**0.5),
    ({"fan_in_fan_out": True, "lora_dropout": 0.1, "exclude_modules": ["x"], "layers_to_transform": [0]}, 6.0),
    ({"init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}}, 6.0),
    ({"init_lora_weights": False, "peft_version": "0.21.2", "auto_mapping": {"x": 1}}, 6.0),
])  # fmt: skip
def test_scale(write, config, alpha):
    """The module's scale is alpha / 2, its rank."""
    assert read(write(pair(), **config)).pairs["blk.0.ffn_up.weight"].alpha == pytest.approx(alpha, rel=1e-15)


def test_alpha_of_0_changes_nothing(write):
    """For llama.cpp an alpha of 0 is a scale of 1, so the factors have to say it."""
    _, b, alpha = read(write(pair(), lora_alpha=0)).pairs["blk.0.ffn_up.weight"]
    assert alpha == 2.0 and b.ne == (2, 8) and not b.data.any()


def test_embedding(write):
    """A token's row of a, times b; PEFT's copy of the frozen embedding is left out."""
    key = "base_model.model.model.embed_tokens"
    tensors = {
        f"{key}.lora_embedding_A": values(2, 10),
        f"{key}.lora_embedding_B": values(4, 2, seed=1),
        f"{key}.base_layer.weight": values(10, 4, seed=2),
    }
    found = read(write(tensors))
    a, b, alpha = found.pairs["token_embd.weight"]
    assert (a.ne, b.ne, alpha) == ((2, 10), (2, 4), 6.0) and found.whole == {}
    assert np.array_equal(a.data, values(2, 10).T) and np.array_equal(b.data, values(4, 2, seed=1))
    assert a.data.flags.c_contiguous


@pytest.mark.parametrize(("spelling", "convert", "type"), [
    ("lm_head.weight", np.float32, Type.F32),
    ("lm_head.modules_to_save.weight", np.float16, Type.F16),
    ("lm_head.weight", bf16, Type.BF16),
])  # fmt: skip
def test_whole_matrices_keep_their_type(write, spelling, convert, type):
    tensors = {
        f"base_model.model.{spelling}": convert(values(10, 4)),
        "base_model.model.lm_head.original_module.weight": values(10, 4, seed=1),
    }
    whole = read(write(tensors)).whole
    assert list(whole) == ["output.weight"]
    assert whole["output.weight"][:2] == (type, (4, 10))
    assert whole["output.weight"].data.tobytes() == convert(values(10, 4)).tobytes()


@pytest.mark.parametrize("convert", [np.float32, np.float16, bf16])
def test_whole_vectors_become_f32(write, convert):
    tensors = {
        "base_model.model.model.norm.weight": convert(values(4)),
        f"base_model.model.{UP}.base_layer.bias": convert(values(8)),
        **pair(),
    }
    whole = read(write(tensors)).whole
    assert {name: array[:2] for name, array in whole.items()} == {
        "output_norm.weight": (Type.F32, (4,)), "blk.0.ffn_up.bias": (Type.F32, (8,)),
    }  # fmt: skip
    assert np.array_equal(whole["output_norm.weight"].data, values(4))
    assert np.array_equal(whole["blk.0.ffn_up.bias"].data, values(8))


def test_one_parameter_under_two_names(write):
    tensors = {"base_model.model.lm_head.weight": values(3, 4)}
    tensors["base_model.model.lm_head.modules_to_save.weight"] = values(3, 4)
    assert np.array_equal(read(write(tensors)).whole["output.weight"].data, values(3, 4))
    tensors["base_model.model.lm_head.modules_to_save.weight"] = values(3, 4, seed=1)
    assert refused(write(tensors)) == (
        "tensors 'base_model.model.lm_head.modules_to_save.weight' and 'base_model.model.lm_head.weight' are one "
        "parameter, but differ"
    )


def test_bias_of_b(write):
    """Scaled by 6 / 2 it is added to the model's bias, or to that of the file, or is the bias if there is none."""
    q = "model.layers.0.self_attn.q_proj"
    tensors = {**pair(q), f"base_model.model.{q}.lora_B.bias": values(8)}
    path = write(tensors, lora_bias=True)
    own = values(8, seed=3)
    assert refused(path) == "lora_bias changes blk.0.attn_q.bias, which needs the model's own bias"
    asked = []
    for base, expected in ((None, 3 * values(8)[PERMUTED]), (own, own + 3 * values(8)[PERMUTED])):
        whole = read(path, lambda name, base=base: asked.append(name) or base).whole
        assert whole["blk.0.attn_q.bias"][:2] == (Type.F32, (8,))
        assert np.array_equal(whole["blk.0.attn_q.bias"].data, expected)
    assert asked == ["blk.0.attn_q.bias"] * 2
    assert refused(path, lambda name: values(6)) == "lora_bias changes blk.0.attn_q.bias by 8 values, where 6 are"
    path = write({**tensors, f"base_model.model.{q}.base_layer.bias": own}, lora_bias=True)
    assert np.array_equal(read(path).whole["blk.0.attn_q.bias"].data, (own + 3 * values(8))[PERMUTED])


# --- experts ----------------------------------------------------------------------------------------------------


def experts(*ranks):
    """Return pairs of experts; rank 0: none of that expert."""
    return {k: v for i, rank in enumerate(ranks) if rank for k, v in pair(f"experts.{i}.w1", rank).items()}


def test_experts_are_stacked(write):
    """One without a pair gets zeros: its product changes nothing."""
    a, b, alpha = read(write(experts(2, 0, 2))).pairs["blk.0.ffn_gate_exps.weight"]
    assert (a.ne, b.ne, alpha) == ((4, 2, 3), (2, 8, 3), 6.0)
    zero = np.zeros_like
    assert np.array_equal(a.data, [values(2, 4), zero(values(2, 4)), values(2, 4)])
    assert np.array_equal(b.data, [values(8, 2, seed=1), zero(values(8, 2)), values(8, 2, seed=1)])


@pytest.mark.parametrize("config", [{}, {"alpha_pattern": {"experts.1.w1": 12}}, {"lora_alpha": 7}])
def test_experts_of_other_ranks(write, config):
    """Smaller ranks are filled up with zeros; scales that differ by powers of two are made one, exactly."""
    path = write(experts(2, 4, 1), rank_pattern={"experts.1.w1": 4, "experts.2.w1": 1}, **config)
    a, b, alpha = read(path).pairs["blk.0.ffn_gate_exps.weight"]
    assert (a.ne, b.ne) == ((4, 4, 3), (4, 8, 3))
    for i, rank in enumerate((2, 4, 1)):
        own = config.get("alpha_pattern", {}).get(f"experts.{i}.w1", config.get("lora_alpha", 6))
        want = np.float64(own / rank) * values(8, rank, seed=1) @ values(rank, 4)
        assert np.array_equal(alpha / 4 * b.data[i].astype(np.float64) @ a.data[i], want)
        assert not a.data[i, rank:].any() and not b.data[i, :, rank:].any()


def test_experts_without_scale(write):
    path = write(experts(2, 2, 2), alpha_pattern={"experts.0.w1": 0})
    a, b, alpha = read(path).pairs["blk.0.ffn_gate_exps.weight"]
    assert alpha == 6.0 and not a.data[0].any() and np.array_equal(b.data[1], values(8, 2, seed=1))
    a, b, alpha = read(write(experts(2, 2, 2), lora_alpha=0)).pairs["blk.0.ffn_gate_exps.weight"]
    assert alpha == 2.0 and b.ne == (2, 8, 3) and not b.data.any()


def test_experts_that_cannot_be_stacked(write):
    key = "base_model.model.experts.1.w1.lora_A.weight"
    why = refused(write(experts(2, 2), alpha_pattern={"experts.1.w1": 7}))
    assert why == f"tensor {key!r}: the experts of blk.0.ffn_gate_exps.weight differ in scale, here 3.5, of others 3"
    mixed = {**pair("experts.0.w1"), **pair("experts.1.w1", n_in=5)}
    assert refused(write(mixed)) == f"tensor {key!r} has another shape than blk.0.ffn_gate_exps.weight's other experts"
    large = {**experts(2, 2), "base_model.model.experts.1.w1.lora_B.weight": np.full((8, 2), 3e38, np.float32)}
    assert refused(write(large, alpha_pattern={"experts.1.w1": 24})) == (
        f"tensor {key!r} has values too large or small to be scaled by 4"
    )


def test_whole_experts(write):
    tensors = {f"base_model.model.experts.{i}.w1.weight": values(8, 4, seed=i) for i in (2, 0, 1)}
    whole = read(write(tensors)).whole
    assert whole["blk.0.ffn_gate_exps.weight"][:2] == (Type.F32, (4, 8, 3))
    assert np.array_equal(whole["blk.0.ffn_gate_exps.weight"].data, [values(8, 4, seed=i) for i in range(3)])
    first = min(tensors)
    other = {**tensors, "base_model.model.experts.1.w1.weight": np.float16(values(8, 4))}
    assert refused(write(other)).startswith(f"tensor {first!r} has another type or shape than blk.0.ffn_gate_exps")
    del tensors["base_model.model.experts.1.w1.weight"]
    assert refused(write(tensors)) == (
        f"tensor {first!r} replaces one expert, but not every other of blk.0.ffn_gate_exps.weight"
    )


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "why"), [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is implemented"),
    ({"peft_type": None}, "peft_type is None; only 'LORA' is implemented"),
    ({"use_dora": True}, "use_dora asks for DoRA, which is not implemented"),
    ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters asks for LoRA for parameters instead of"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices asks for training of single tokens, which"),
    ({"layer_replication": [[0, 1]]}, "layer_replication asks for layer replication, which is not implemented"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens asks for activated LoRA, which is not implemented"),
    ({"kasa_config": {"x": 1}}, "kasa_config asks for KaSA, which is not implemented"),
    ({"use_novel": True}, "'use_novel' is a setting that is not known here and may change what LoRA means"),
    ({"novel_config": {"x": 1}}, "'novel_config' is a setting that is not known here"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base's weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base's weights too; save the"),
    ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', which changes"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changes"),
    ({"r": None}, "r is missing"),
    ({"lora_alpha": None}, "lora_alpha is missing"),
    ({"r": 0}, "r must be a whole number of at least 1, not 0"),
    ({"r": 2.0}, "r must be a whole number of at least 1, not 2.0"),
    ({"r": True}, "r must be a whole number of at least 1, not True"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number that F32 can hold, not nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number that F32 can hold, not inf"),
    ({"lora_alpha": 10**400}, "lora_alpha must be a finite number that F32 can hold, not 1000"),
    ({"lora_alpha": 1e-60}, "lora_alpha must be a finite number that F32 can hold, not 1e-60"),
    ({"lora_alpha": "6"}, "lora_alpha must be a finite number that F32 can hold, not '6'"),
    ({"rank_pattern": [1]}, "rank_pattern must be an object, not [1]"),
    ({"rank_pattern": {"up_proj": 0}}, "rank_pattern['up_proj'] must be a whole number of at least 1, not 0"),
    ({"alpha_pattern": {"up_proj": None}}, "alpha_pattern['up_proj'] must be a finite number that F32 can hold, not"),
    ({"alpha_pattern": {"[": 1}}, "alpha_pattern has '[', which is not a regular expression: "),
    ({"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern has '(a+)+', a kind of pattern that could take for ever to"),
    ({"alpha_pattern": {".*.*.*.*.*.*.*x": 1}}, "rank_pattern and alpha_pattern are too many or too complicated"),
    ({"alpha_pattern": {"(.|.)" * 40 + "x": 1}}, "rank_pattern and alpha_pattern are too many or too complicated"),
    ({"alpha_pattern": {"a" * 2000: 1}}, "alpha_pattern has 'aaaa"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a string, not 3"),
])  # fmt: skip
def test_settings_that_are_refused(write, config, why):
    assert refused(write(pair(), **config)).startswith(why)


UP_A, UP_B = pair()
Q = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(("tensors", "why"), [
    ({UP_B: None}, f"tensor {UP_A!r} is half of a pair: the module has no lora_B"),
    ({UP_A: None}, f"tensor {UP_B!r} is half of a pair: the module has no lora_A"),
    ({UP_A: values(3, 4)}, f"tensor {UP_A!r} has rank 3, but adapter_config.json says 2"),
    ({UP_B: values(8, 3)}, f"tensor {UP_B!r} has rank 3, but adapter_config.json says 2"),
    ({UP_A: values(2, 4, 1, 1)}, f"tensor {UP_A!r} has the shape [2, 4, 1, 1], not a matrix's"),
    ({UP_A: values(2, 0)}, f"tensor {UP_A!r} has the shape [2, 0], which no weight has"),
    ({UP_A: np.float32(1)}, f"tensor {UP_A!r} has the shape [], which no weight has"),
    ({UP_A: np.float64(values(2, 4))}, f"tensor {UP_A!r} has type F64; LoRA weights are F32, F16 or BF16"),
    ({UP_A: np.int8(values(2, 4))}, f"tensor {UP_A!r} has type I8; LoRA weights are F32, F16 or BF16"),
    ({UP_A: np.full((2, 4), np.nan, np.float32)}, f"tensor {UP_A!r} has NaN or infinite values"),
    ({UP_B: np.full((8, 2), np.inf, np.float16)}, f"tensor {UP_B!r} has NaN or infinite values"),
    ({UP_B: np.full((8, 2), 0xFFC0, np.uint16)}, f"tensor {UP_B!r} has NaN or infinite values"),
    ({"x.lora_A.weight": values(2, 4)}, "tensor 'x.lora_A.weight' is not one that PEFT saves: its name does not begin"),
    (pair("score"), "tensor 'base_model.model.score.lora_A.weight' is for 'score.weight', which the model does not"),
    ({"base_model.model.y.bias": values(2)}, "tensor 'base_model.model.y.bias' is for 'y.bias', which the model does"),
    (pair("also"), f"tensor {UP_A!r} is a second pair for blk.0.ffn_up.weight"),
    ({f"base_model.model.{UP}.weight": values(8, 4)}, f"tensor 'base_model.model.{UP}.weight' replaces blk.0.ffn_up"),
    ({f"base_model.model.{UP}.lora_magnitude_vector": values(8)},
     f"tensor 'base_model.model.{UP}.lora_magnitude_vector' belongs to DoRA, which is not implemented"),
    ({f"base_model.model.{UP}.lora_diag": values(2)}, f"tensor 'base_model.model.{UP}.lora_diag' is of a kind of LoRA"),
    (pair("model.layers.0.self_attn.q_proj", n_out=6), f"tensor '{Q}.lora_B.weight' has 6 rows, which are not 2 heads"),
    ({f"{Q}.bias": values(5)}, f"tensor '{Q}.bias' has 5 rows, which are not 2 heads of even size"),
    (pair("model.embed_tokens"), f"tensor '{EMBED}.lora_A.weight' is LoRA for a linear layer, which token_embd.weight"),
    ({f"base_model.model.{UP}.lora_embedding_A": values(2, 4)}, f"tensor {UP_A!r} is half of a pair: the module has no "
     "lora_embedding_B"),
    ({f"base_model.model.{UP}.lora_embedding_{x}": values(2, 2) for x in "AB"},
     f"tensor {UP_A!r} is of a module with two kinds of LoRA"),
    ({f"base_model.model.lm_head.lora_embedding_{x}": values(2, 2) for x in "AB"},
     "tensor 'base_model.model.lm_head.lora_embedding_A' is LoRA for an embedding, which output.weight is not"),
    ({"base_model.model.model.norm.weight": values(4), "base_model.model.norm.weight": values(4)},
     "tensor 'base_model.model.norm.weight' is a second one for output_norm.weight"),
    ({f"base_model.model.{UP}.lora_B.bias": values(7)},
     f"tensor 'base_model.model.{UP}.lora_B.bias' has the shape [7], not its pair's rows"),
    ({f"base_model.model.{UP}.lora_B.bias": np.full(8, 3e38, np.float32)},
     f"tensor 'base_model.model.{UP}.lora_B.bias' has values too large to be scaled by 3"),
    ({**pair("experts.0.w1"), "base_model.model.experts.0.w1.lora_B.bias": values(8)},
     "tensor 'base_model.model.experts.0.w1.lora_B.bias' is a bias of an expert, which is not implemented"),
    ({f"base_model.model.{UP}.base_layer.lora_A.weight": values(2, 4)}, "tensor 'base_model.model.model.layers.0.mlp."),
])  # fmt: skip
def test_tensors_that_are_refused(write, tensors, why):
    all_tensors = {key: value for key, value in {**pair(), **tensors}.items() if value is not None}
    assert refused(write(all_tensors)).startswith(why)


HEADER = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(("weights", "why"), [
    (b"", "header too small"),
    (safetensors_of(pair())[:-1], "not fully covered"),
    (safetensors_of(pair()) + b"x", "not fully covered"),
    (safetensors_of(pair())[:50], "header"),
    (struct.pack("<Q", 1 << 60) + b"{}", "header too large"),
    (struct.pack("<Q", 4) + b"\xff\xfe{}", "UTF-8"),
    (struct.pack("<Q", 4) + b"[[[[", "JSON"),
    (struct.pack("<Q", len(HEADER)) + HEADER % b"4611686018427387904,4" + b"0000", ""),
    (struct.pack("<Q", len(HEADER) - 1) + HEADER % b"2" + b"0000", "shape"),
])  # fmt: skip
def test_weights_that_are_broken(write, weights, why):
    path = write({})
    (path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(FileFormatError, match=f"adapter_model.safetensors: not a sound safetensors file: .*{why}"):
        read(path)


@pytest.mark.parametrize(("config", "why"), [
    (b"", "the text is not JSON: "),
    (b'{"r": 2', "the text is not JSON: "),
    (b"[" * 100000, "the text is not JSON: "),
    (b'{"r": ' + b"9" * 5000 + b"}", "the text is not JSON: "),
    (b"[1]", "the text is not a JSON object"),
    (b'{"r": "\xff"}', "the text is not UTF-8"),
    (b" " * ((16 << 20) + 1), "16777217 bytes are more than the 16777216 that it can have"),
])  # fmt: skip
def test_configs_that_are_broken(write, config, why):
    path = write(pair())
    (path / "adapter_config.json").write_bytes(config)
    with pytest.raises(FileFormatError) as error:
        read(path)
    assert f"adapter_config.json{', byte 7' if 'UTF-8' in why else ''}: {why}" in str(error.value)


def test_files_that_are_not_there(write):
    path = write(pair())
    weights = path / "adapter_model.safetensors"
    weights.unlink()
    with pytest.raises(FileAccessError, match=r"adapter_model\.safetensors: no such file or directory$"):
        read(path)
    os.mkfifo(weights)
    with pytest.raises(FileAccessError, match=r"adapter_model\.safetensors: not a regular file$"):
        read(path)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(FileAccessError, match=r"adapter_model\.safetensors: .*$"):
        read(path)
    weights.rmdir()
    (path / "adapter_model.bin").write_bytes(b"")
    assert refused(path) == (
        "the weights are there only as a pickle, adapter_model.bin, which can run code when it is read"
    )
    shutil.rmtree(path)
    assert not is_peft(path)
    with pytest.raises(FileAccessError, match=r"adapter_config\.json: no such file or directory$"):
        read(path)


def test_nothing_in_it(write):
    assert refused(write({})) == "the file has no tensors"


# --- PEFT's own -------------------------------------------------------------------------------------------------


def test_equals_peft():
    """data/make_peft_golden.py: rsLoRA, patterns, embedding, head, norms and biases, as PEFT saves and merges them."""
    shape = {"n_embd": 16, "n_head": 4, "n_head_kv": 2, "n_ff": 24, "n_layer": 2, "head_dim": 4}
    target_of = hf_target(model_class("llama")(HParams.from_gguf(Tiny(**shape).all_metadata(), 20)))
    found = read_peft(DATA / "peft", target_of)
    assert found.base == "tiny/llama"
    deltas, whole = {}, {}
    with np.load(DATA / "peft.npz") as golden:
        for key, value in golden.items():
            kind, _, parameter = key.partition(".")
            name = target_of(parameter).name
            if n_head := {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2]):
                rows = np.arange(len(value)).reshape(n_head, 2, -1).transpose(0, 2, 1).ravel()
                value = value[rows]
            (deltas if kind == "delta" else whole)[name] = value
    assert found.pairs.keys() == deltas.keys() and found.whole.keys() == whole.keys()
    for name, (a, b, alpha) in found.pairs.items():
        product = a.data @ b.data.T if name == "token_embd.weight" else b.data @ a.data
        assert np.allclose(alpha / b.ne[0] * product, deltas[name], rtol=0, atol=1e-6), name
    for name, array in found.whole.items():
        assert array.type == Type.F32 and np.array_equal(array.data, whole[name]), name
