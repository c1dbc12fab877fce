"""Hyper-parameters: what is read, llama.cpp's defaults, and what is refused, by name of the key."""

import numpy as np
import pytest
from tiny_models import Tiny

from pyggml_adapt.errors import ModelError
from pyggml_adapt.models import HParams, architectures, model_class

GOOD = Tiny().all_metadata()


def read(**changes):
    metadata = {**GOOD, **{f"llama.{key}".replace("__", "."): value for key, value in changes.items()}}
    return HParams.from_gguf({key: value for key, value in metadata.items() if value is not None}, 500)


def test_defaults():
    hp = read(attention__head_count_kv=None)
    assert (hp.n_head, hp.n_head_kv, hp.n_embd_head_k, hp.n_embd_head_v, hp.n_rot) == (4, 4, 32, 32, 32)
    assert (hp.rope_freq_base, hp.rope_freq_scale, hp.rope_scaling_type) == (10000.0, 1.0, "linear")
    assert (hp.n_ctx_orig_yarn, hp.yarn_ext_factor, hp.yarn_attn_factor) == (1024, 0.0, 1.0)
    assert (hp.n_expert, hp.n_expert_used, hp.n_vocab) == (0, 0, 500)
    assert (hp.n_embd_k_gqa, hp.n_embd_v_gqa) == (128, 128)


def test_arrays_whose_elements_agree():
    assert read(attention__head_count_kv=np.array([2, 2], np.int32)).n_head_kv == 2


def test_yarn():
    """The magnitude scale is 0.1 ln(s) + 1 in the end: ggml's rope multiplies by it, so it is 1 here."""
    hp = read(rope__scaling__type="yarn", rope__scaling__factor=8.0, rope__scaling__original_context_length=128)
    assert (hp.rope_freq_scale, hp.yarn_ext_factor, hp.n_ctx_orig_yarn) == (0.125, 1.0, 128)
    assert hp.yarn_attn_factor == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("key", [
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention__head_count",
    "attention__layer_norm_rms_epsilon",
])  # fmt: skip
def test_absent(key):
    with pytest.raises(ModelError, match=f"^the metadata has no llama.{key.replace('__', '.')}$"):
        read(**{key: None})


def test_no_architecture():
    for metadata in ({}, {"general.architecture": 3}):
        with pytest.raises(ModelError, match=r"^the metadata has no general\.architecture$"):
            HParams.from_gguf(metadata, 500)


@pytest.mark.parametrize("key", [
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention__head_count",
    "attention__head_count_kv", "attention__key_length", "attention__value_length", "rope__dimension_count",
    "rope__scaling__original_context_length",
])  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, 1 << 40, "8", 8.0, True, [], np.array([]), np.array([1, 2])])
def test_counts_that_cannot_be(key, value):
    name = f"llama.{key.replace('__', '.')}"
    messages = rf"{name} (= -?\d+ is not from \d+ to \d+|must be a whole number, not .+|differs from layer to layer.*)$"
    with pytest.raises(ModelError, match=f"^{messages}"):
        read(**{key: value})


@pytest.mark.parametrize("key", [
    "attention__layer_norm_rms_epsilon", "rope__freq_base", "rope__scaling__factor", "rope__scale_linear",
])  # fmt: skip
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", True, np.array([1.0])])
def test_numbers_that_cannot_be(key, value):
    name = f"llama.{key.replace('__', '.')}"
    with pytest.raises(
        ModelError, match=rf"^{name} (= .+ is not a finite number of at least 0.0|must be a number, not )"
    ):
        read(**{key: value})


@pytest.mark.parametrize(("changes", "message"), [
    ({"attention__head_count_kv": 3}, "llama.attention.head_count = 4 is not a multiple of head_count_kv = 3"),
    ({"embedding_length": 130}, "llama.embedding_length = 130 is not a multiple of head_count = 4"),
    ({"expert_count": 4}, "llama.expert_used_count = 0 does not fit expert_count = 4"),
    ({"expert_count": 4, "expert_used_count": 5}, "llama.expert_used_count = 5 does not fit expert_count = 4"),
    ({"expert_used_count": 2}, "llama.expert_used_count = 2 does not fit expert_count = 0"),
    ({"expert_count": -1}, "llama.expert_count = -1 is not from 0 to 512"),
    ({"rope__freq_base": 0.0}, "llama.rope.freq_base = 0.0 is not positive"),
    ({"rope__scaling__type": "su"}, "llama.rope.scaling.type = 'su' is not implemented; implemented "),
    ({"rope__scaling__type": 3}, "llama.rope.scaling.type = 3 is not implemented"),
])  # fmt: skip
def test_combinations_that_cannot_be(changes, message):
    with pytest.raises(ModelError, match=f"^{message}"):
        read(**changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"attention__value_length": 64}, "llama.attention.value_length = 64 is not key_length 32"),
    ({"rope__dimension_count": 16}, "llama.rope.dimension_count = 16 is not the head size 32, or odd"),
    ({"attention__key_length": 33, "attention__value_length": 33}, "llama.attention.key_length, or embedding.* is odd"),
])  # fmt: skip
def test_what_llama_cannot_have(changes, message):
    with pytest.raises(ModelError, match=f"^{message}"):
        model_class("llama")(read(**changes))


def test_unknown_architecture():
    with pytest.raises(ModelError, match=r"^architecture 'gpt9' is not supported; supported: .*\bllama\b"):
        model_class("gpt9")
    assert "llama" in architectures()
