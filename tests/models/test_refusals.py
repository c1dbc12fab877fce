"""What architectures cannot have, or have but not here: one sentence that names the key or the tensor."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import EXPERTS, NOTHING, Tiny, layer_sizes, tensors_of, write_gguf

import pyggml_adapt as pga
from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import Type
from pyggml_adapt.models import HParams, architectures, model_class


def model_of(arch, changes=None, **variant):
    metadata = {**Tiny(arch, **variant).all_metadata(), **(changes or {})}
    return model_class(arch)(HParams.from_gguf({k: v for k, v in metadata.items() if v is not None}, 500))


def found_in(model, specs=None):
    """Return the required tensors of a model as check_tensors sees them."""
    specs = [spec for spec in model.all_tensors() if spec.required] if specs is None else specs
    return {s.name: SimpleNamespace(ne=s.ne + (1,) * (4 - len(s.ne)), type=Type.F32) for s in specs}


@pytest.mark.parametrize("arch", architectures())
def test_every_required_tensor_is_missed(arch):
    model = model_of(arch)
    found = found_in(model)
    model.check_tensors(found)
    for name in found:
        with pytest.raises(ModelError, match=f"^tensor {name} is missing$"):
            model.check_tensors({other: tensor for other, tensor in found.items() if other != name})


@pytest.mark.parametrize("arch", architectures())
def test_every_tensor_has_a_shape(arch):
    model = model_of(arch)
    for spec in model.all_tensors():
        found = found_in(model)
        found[spec.name] = SimpleNamespace(ne=(*spec.ne[:-1], spec.ne[-1] + 1, 1, 1, 1)[:4], type=Type.F32)
        with pytest.raises(ModelError, match=rf"^tensor {spec.name} has shape \[.+\], not \[.+\]$"):
            model.check_tensors(found)


@pytest.mark.parametrize("arch", architectures())
def test_a_tensor_of_another_architecture(arch):
    model = model_of(arch)
    with pytest.raises(ModelError, match=f"^tensor blk.0.ssm_in.weight is not one that architecture {arch} has$"):
        model.check_tensors({**found_in(model), "blk.0.ssm_in.weight": SimpleNamespace(ne=(1, 1, 1, 1), type=Type.F32)})


def test_tensors_that_exclude_each_other():
    model = model_of("qwen2")
    fused = [spec for spec in model.all_tensors() if spec.required or spec.name == "blk.0.attn_qkv.weight"]
    with pytest.raises(ModelError, match=r"^tensors blk.0.attn_q.weight and blk.0.attn_qkv.weight exclude each other$"):
        model.check_tensors(found_in(model, fused))


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize("value", [-1, 1 << 40, "8", 2.5])
def test_counts_that_cannot_be(arch, value):
    for key, usual in Tiny(arch).all_metadata().items():
        if type(usual) is int and not key.endswith("vocab_size"):
            with pytest.raises(ModelError, match=f"^{key} (= |must be a whole number, not )"):
                model_of(arch, {key: value})


@pytest.mark.parametrize(("arch", "key", "value", "message"), [
    ("stablelm", "attention.layer_norm_epsilon", None, "the metadata has no stablelm.attention.layer_norm_epsilon"),
    ("stablelm", "attention.layer_norm_epsilon", -1.0, "stablelm.attention.layer_norm_epsilon = -1.0 is not"),
    ("stablelm", "rope.dimension_count", 64, "stablelm.rope.dimension_count = 64 is above the head size 32"),
    ("stablelm", "rope.dimension_count", 15, "stablelm.rope.dimension_count = 15 is not the head size 32, or odd"),
    ("qwen2", "rope.dimension_count", 16, "qwen2.rope.dimension_count = 16 is not the head size 32"),
    ("qwen2", "expert_group_count", 4, "qwen2.expert_group_count = 4 is not implemented"),
    ("qwen3", "nextn_predict_layers", 1, "qwen3.nextn_predict_layers = 1 is not implemented"),
    ("qwen3", "attention.causal", False, "qwen3.attention.causal = False is not implemented"),
    ("qwen3", "rope.scaling.type", "longrope", "qwen3.rope.scaling.type = 'longrope' is not one that architecture"),
    ("qwen3", "rope.scaling.type", np.array([1, 2]), r"qwen3.rope.scaling.type = \[1, 2\] is not implemented"),
    ("qwen3", "rope.scaling.attn_factor", 1e30, r"qwen3.rope.scaling.attn_factor = 1e\+30 is above 1000$"),
    ("qwen3", "rope.freq_base", np.ones(99), r"qwen3.rope.freq_base must be a number, not \[1.0, 1.0, .*\.\.\.$"),
    ("qwen3", "attention.causal", np.array([]), r"qwen3.attention.causal = \[\] is not implemented$"),
    ("qwen3", "attention.key_length", 33, "qwen3.attention.key_length, or embedding_length / head_count, is odd$"),
    ("gemma3", "rope.dimension_count_swa", 16, "gemma3.rope.dimension_count_swa = 16 is not implemented$"),
    ("gpt-oss", "attention.key_length_swa", 16, "gpt-oss.attention.key_length_swa = 16 is not implemented$"),
    ("cohere2", "attention.value_length_swa", 16, "cohere2.attention.value_length_swa = 16 is not implemented$"),
    ("qwen3", "rope.scaling.type", "su", "qwen3.rope.scaling.type = 'su' is not implemented; implemented are none, "),
    ("granite", "logit_scale", None, "the metadata has no granite.logit_scale"),
    ("granite", "logit_scale", 0.0, "granite.logit_scale = 0.0 is not a finite number of at least 1e-30"),
    ("granite", "rope.scaling.finetuned", 1, "granite.rope.scaling.finetuned must be true or false, not 1"),
    ("granite", "deepstack_mapping", np.array([-1, 0]), r"granite.deepstack_mapping = \[-1, 0\] is not implemented"),
    ("olmo2", "attention.sliding_window", -1, "olmo2.attention.sliding_window = -1 is not from 0 to 16777216"),
    ("gemma2", "attention.sliding_window", 0, "gemma2.attention.sliding_window = 0 is not from 1 to 16777216"),
    ("gemma2", "attn_logit_softcapping", 0.0, "gemma2.attn_logit_softcapping = 0.0 is not positive"),
    ("gemma2", "attention.sliding_window_pattern", [True], "gemma2.attention.sliding_window_pattern must be true or "),
    ("gemma2", "attention.sliding_window_pattern", "ab", "gemma2.attention.sliding_window_pattern must be a whole num"),
    ("gemma3", "rope.freq_base_swa", 0.0, "gemma3.rope.freq_base_swa = 0.0 is not positive"),
    ("gemma3", "final_logit_softcapping", -1.0, "gemma3.final_logit_softcapping = -1.0 is not a finite number of at"),
    ("cohere2", "attention.sliding_window", None, "the metadata has no cohere2.attention.sliding_window"),
    ("cohere2", "logit_scale", None, "the metadata has no cohere2.logit_scale"),
    ("exaone4", "nextn_predict_layers", 2, "exaone4.nextn_predict_layers = 2 leaves none of block_count = 2"),
    ("olmoe", "attention.head_count_kv", 2, "olmoe.attention.head_count_kv = 2 is not head_count 4"),
    ("dots1", "attention.head_count_kv", 2, "dots1.attention.head_count_kv = 2 is not head_count 4"),
    ("dots1", "expert_gating_func", 3, "dots1.expert_gating_func = 3 is not implemented; implemented are 1 and "),
    ("dots1", "expert_gating_func", None, "the metadata has no dots1.expert_gating_func"),
    ("gpt-oss", "attention.sliding_window", None, "the metadata has no gpt-oss.attention.sliding_window"),
    ("gpt-oss", "attention.sliding_window", 0, "gpt-oss.attention.sliding_window = 0 is not from 1 to"),
    ("gpt-oss", "expert_feed_forward_length", None, "the metadata has no gpt-oss.expert_feed_forward_length"),
    ("gpt-oss", "rope.dimension_count", 16, "gpt-oss.rope.dimension_count = 16 is not the head size 32"),
    ("llama4", "block_count", 3, "llama4.block_count = 3 is not from 4 to 512"),
    ("llama4", "attention.sliding_window", 0, "llama4.attention.sliding_window = 0 is not implemented"),
    ("llama4", "interleave_moe_layer_step", None, "the metadata has no llama4.interleave_moe_layer_step"),
    ("llama4", "interleave_moe_layer_step", 1000, "llama4.interleave_moe_layer_step = 1000 is not from 0 to 512"),
    ("llama4", "expert_feed_forward_length", 0, "llama4.expert_feed_forward_length = 0 is not from 1 to"),
    ("llama4", "rope.scaling.type", "longrope", "llama4.rope.scaling.type = 'longrope' is not one that"),
    ("mistral3", "attention.temperature_scale", "a", "mistral3.attention.temperature_scale must be a number, not 'a'"),
    ("ernie4_5-moe", "interleave_moe_layer_step", 0, "ernie4_5-moe.interleave_moe_layer_step = 0 is not implem"),
    ("qwen3", "context_length", 1 << 31, "qwen3.context_length = 2147483648 is not from 1 to 2147483647"),
    ("hunyuan-dense", "rope.dimension_sections", np.array([8, 8, 0, 0]), r"hunyuan-dense.rope.dimension_sections = \["),
    ("hunyuan-dense", "rope.scaling.alpha", 1e30, "hunyuan-dense.rope.scaling.alpha = 1e.30 is too large"),
    ("phi3", "attention.key_length", 64, "phi3.attention.value_length = 32 is not key_length 64"),
    ("phi3", "rope.dimension_count", 64, "phi3.rope.dimension_count = 64 is above the head size 32"),
    ("phi3", "rope.scaling.original_context_length", 0, "phi3.rope.scaling.original_context_length = 0 is not from 1"),
    ("phi3", "rope.scaling.attn_factor", "a", "phi3.rope.scaling.attn_factor must be a number, not 'a'"),
    ("phimoe", "expert_used_count", 5, "phimoe.expert_used_count = 5 does not fit expert_count = 4"),
    ("glm4moe", "rope.dimension_sections", np.array([8, 8, 0, 0]), r"glm4moe.rope.dimension_sections = \[8, 8, "),
    ("glm4moe", "expert_gating_func", 3, "glm4moe.expert_gating_func = 3 is not implemented; implemented are 1 and 2"),
    ("glm4moe", "expert_feed_forward_length", None, "the metadata has no glm4moe.expert_feed_forward_length"),
    ("glm4moe", "expert_shared_count", None, "the metadata has no glm4moe.expert_shared_count"),
    ("glm4moe", "expert_shared_count", 0, "glm4moe.expert_shared_count = 0 is not from 1 to 512"),
    ("glm4moe", "expert_weights_norm", 1, "glm4moe.expert_weights_norm must be true or false, not 1"),
    ("glm4moe", "nextn_predict_layers", 2, "glm4moe.nextn_predict_layers = 2 leaves none of block_count = 2"),
    ("deci", "rope.dimension_count", 16, "deci.rope.dimension_count = 16 is not the head size 32, or odd"),
    ("glm4", "rope.dimension_sections", np.array([8, 8, 0, 0]), r"glm4.rope.dimension_sections = \[8, 8, 0, 0\] "),
])  # fmt: skip
def test_keys(arch, key, value, message):
    with pytest.raises(ModelError, match=f"^{message}"):
        model_of(arch, {f"{arch}.{key}": value})


@pytest.mark.parametrize("value", [None, [0.5], [0.5, 0.5, 0.5], ["a", "b"], float("nan"), True])
def test_one_xielu_for_each_layer(value):
    message = "the metadata has no xielu.beta" if value is None else "xielu.beta must be a finite number for each of 2"
    with pytest.raises(ModelError, match=f"^{message}"):
        model_of("apertus", {"xielu.beta": value})


@pytest.mark.parametrize("arch", architectures())
def test_experts_or_none(arch):
    kind = model_class(arch).experts
    if kind == "none":
        with pytest.raises(ModelError, match=f"^{arch}.expert_count = 4, but architecture {arch} has no experts$"):
            model_of(arch, metadata=EXPERTS)
    elif kind == "required":
        with pytest.raises(
            ModelError, match=f"^{arch}.expert_count is absent or 0, but architecture {arch} has experts"
        ):
            model_of(arch, metadata={"expert_count": None, "expert_used_count": None})


def test_what_phi3_cannot_have():
    message = "phi3.attention.key_length = 64 times head_count 4 is not embedding_length 128"
    with pytest.raises(ModelError, match=f"^{message}$"):
        model_of("phi3", head_dim=64)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("attention.head_count", [4, 4, 4], r" must be a whole number for each of 2 layers, not \[4, 4, 4\]$"),
    ("attention.head_count", [[4, 4]], " must be a whole number for each of 2 layers, not"),
    ("attention.head_count", [4.0, 4.0], " must be a whole number for each of 2 layers, not"),
    ("attention.head_count", [], " must be a whole number for each of 2 layers, not"),
    ("attention.head_count", [4, 6], " = 6 is not a multiple of head_count_kv = 4$"),
    ("attention.head_count", [4, 0], " = 0 is not a multiple of head_count_kv = 4$"),
    ("attention.head_count", [0, 4], " = 0 in layer 0, whose heads' size is that of all heads$"),
    ("attention.head_count", 0, " = 0 in layer 0, whose heads' size is that of all heads$"),
    ("attention.head_count_kv", [-1, 2], " = -1 is not from 0 to 16777216$"),
    ("attention.head_count_kv", 1 << 40, " = 1099511627776 is not from 0 to 16777216$"),
    ("attention.head_count_kv", [0, 0], " = 0 in all layers: one must have attention over tokens$"),
    ("attention.head_count_kv", 0, " = 0 in all layers: one must have attention over tokens$"),
    ("feed_forward_length", [96, 1 << 40], " = 1099511627776 is not from 0 to 16777216$"),
    ("feed_forward_length", "8", " must be a whole number, not '8'$"),
    ("feed_forward_length", [0, 96], " = 0 in layer 0, which has attention, is not implemented$"),
])  # fmt: skip
def test_sizes_of_layers(key, value, message):
    sizes = layer_sizes((4, 2, 96), (4, 4, 64))
    with pytest.raises(ModelError, match=f"^deci.{key}{message}"):
        model_of("deci", {f"deci.{key}": np.array(value) if isinstance(value, list) else value}, **sizes)


@pytest.mark.parametrize("key", ["attention.head_count", "feed_forward_length"])
def test_absent_sizes_of_layers(key):
    with pytest.raises(ModelError, match=f"^the metadata has no deci.{key}$"):
        model_of("deci", {f"deci.{key}": None})


def test_a_last_layer_that_does_nothing():
    """llama.cpp mixes up the rows of its results then."""
    with pytest.raises(ModelError, match=r"^deci.feed_forward_length = 0 in layer 1, the last one, is not implement"):
        model_of("deci", **layer_sizes((4, 2, 96), NOTHING))


def test_the_file_is_named(tmp_path):
    tiny = Tiny("granite", tokenizer=False)
    metadata = {**tiny.all_metadata(), "granite.logit_scale": 0.0}
    path = write_gguf(tmp_path / "zero.gguf", metadata, tensors_of(tiny), tokenizer=False)
    with pytest.raises(ModelError, match=f"^{path}: granite.logit_scale = 0.0 is not"):
        pga.Host(path)
