"""PEFT directories in a host: as llama.cpp with the converted LoRA, and what tied heads mean."""

import json

import numpy as np
import pytest
from loras import LINEARS, factors, write_lora
from parity import differences
from reference import Reference
from safetensors.numpy import save_file
from tiny_models import Tiny, random_ids, tensors_of, write_gguf, write_tiny

import pyggml_adapt as pga
from pyggml_adapt.errors import AdaptorError
from pyggml_adapt.ggml import Type, quantize

SMALL = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 1}
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {"attn_q": 2, "attn_k": 1}


@pytest.fixture(scope="module")
def ids():
    return random_ids(160)


def unpermuted(rows, n_head):
    """Return rows in Hugging Face's order: the two halves of each head one after the other, not interleaved."""
    n = rows.shape[0] // n_head // 2
    return np.ascontiguousarray(rows.reshape(n_head, n, 2, -1).swapaxes(1, 2).reshape(rows.shape))


def write_peft(path, tiny, *, rank=4, seed=0, more=None, linears=True, **config):
    """Write the pairs of loras.write_lora as PEFT does; more: other tensors."""
    tensors = {}
    for spec in tiny.tensors() if linears else ():
        block, il, *rest = spec.name.split(".")
        if block == "blk" and rest[0] in MODULES and rest[-1] == "weight":
            a, b = factors(spec, rank, seed)
            name = f"base_model.model.model.layers.{il}.{MODULES[rest[0]]}"
            tensors[f"{name}.lora_A.weight"] = a
            tensors[f"{name}.lora_B.weight"] = unpermuted(b, HEADS[rest[0]]) if rest[0] in HEADS else b
    path.mkdir()
    save_file({**tensors, **(more or {})}, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "us/tiny", **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def test_equal_to_llama_cpp_with_the_converted_file(tiny_gguf, tmp_path, ids):
    """The same pairs as a PEFT directory here and as a LoRA GGUF there: equal bit for bit."""
    base, tiny = tiny_gguf(**SMALL), Tiny(**SMALL)
    directory, lora = write_peft(tmp_path / "peft", tiny), write_lora(tmp_path / "lora.gguf", tiny, LINEARS)
    with Reference(base, n_threads=1) as reference, pga.Host(base, {"peft": directory}, n_threads=1) as host:
        reference.set_loras({lora: 1.0})
        with host.session("peft", n_ctx=512) as session:
            assert differences(reference, session, ids) == []
        host.define_task("some", ["peft:0.3"])
        reference.rewind(0)
        reference.set_loras({lora: 0.3})
        with host.session("some", n_ctx=512) as session:
            assert differences(reference, session, ids) == []
        (info,) = host.adaptors
        assert (info.kind, info.resident, info.path) == ("peft", True, str(directory))
        assert host.memory().adaptors["peft"].private >= info.nbytes


def test_rank_stabilised(tiny_gguf, tmp_path, ids):
    base, tiny = tiny_gguf(**SMALL), Tiny(**SMALL)
    directory = write_peft(tmp_path / "peft", tiny, use_rslora=True)
    lora = write_lora(tmp_path / "lora.gguf", tiny, LINEARS, alpha=16.0)  # 8 / sqrt(4) = 16 / 4
    with pga.Host(base, {"peft": directory, "lora": lora}, n_threads=1) as host:
        with host.session("peft", n_ctx=512) as session, host.session("lora", n_ctx=512) as wanted:
            assert differences(wanted, session, ids) == []


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_was_saved(tmp_path, ids, tied):
    """It replaces the embedding; a head that is tied to it stays what it was, as in PEFT."""
    tiny = Tiny(**SMALL, optional="^$" if tied else r"^output\.weight")
    base = write_tiny(tmp_path / "base.gguf", tiny)
    tensors = tensors_of(tiny)
    _, ne, _ = tensors["token_embd.weight"]
    new = np.random.default_rng(1).standard_normal(ne[::-1], dtype=np.float32)
    more = {"base_model.model.model.embed_tokens.weight": new}
    directory = write_peft(tmp_path / "peft", tiny, linears=False, more=more, modules_to_save=["embed_tokens"])
    tensors.setdefault("output.weight", tensors["token_embd.weight"])
    tensors["token_embd.weight"] = (Type.F32, ne, quantize(new, Type.F32))
    whole = write_gguf(tmp_path / "whole.gguf", tiny.all_metadata(), tensors)
    with pga.Host(base, {"peft": directory}, n_threads=1) as host, pga.Host(whole, n_threads=1) as other:
        with host.session("peft", n_ctx=512) as session, other.session(n_ctx=512) as wanted:
            assert differences(wanted, session, ids) == []


def test_a_pair_on_a_tied_head(tmp_path, ids):
    """It acts on the head only: what the embedding is stays."""
    tied, untied = Tiny(**SMALL, optional="^$"), Tiny(**SMALL)
    base = write_tiny(tmp_path / "base.gguf", tied)
    tensors = tensors_of(tied)
    tensors["output.weight"] = tensors["token_embd.weight"]
    whole = write_gguf(tmp_path / "whole.gguf", tied.all_metadata(), tensors)
    lora = write_lora(tmp_path / "lora.gguf", untied, r"^output\.weight")
    with pga.Host(base, {"lora": lora}, n_threads=1) as host, pga.Host(whole, {"lora": lora}, n_threads=1) as other:
        with host.session("lora", n_ctx=512) as session, other.session("lora", n_ctx=512) as wanted:
            assert differences(wanted, session, ids) == []


def test_a_directory_that_changes(tiny_gguf, tmp_path):
    base, tiny = tiny_gguf(**SMALL), Tiny(**SMALL)
    one, two = (write_peft(tmp_path / f"p{i}", tiny, seed=i) for i in range(2))
    with pga.Host(base, {"one": one, "two": two}, n_threads=1) as host:
        size = host.adaptors[0].nbytes
    with pga.Host(base, {"one": one, "two": two}, n_threads=1, max_adaptor_bytes=size) as host:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (one / name).write_bytes((two / name).read_bytes())
        with pytest.raises(AdaptorError, match="has other content than when it was loaded") as error:
            host.session("one")
        assert error.value.code == "adaptor_changed"
        assert host.reload_adaptor("one") is True
        with host.session("one", n_ctx=64) as session:
            got = session.eval([1, 5, 9])
        with host.session("two", n_ctx=64) as session:
            np.testing.assert_array_equal(session.eval([1, 5, 9]), got)


def test_a_bias_of_a_foundation_that_was_written_to(tmp_path):
    """It is read from mapped pages, which may be gone."""
    tiny = Tiny(**SMALL, optional=r"attn_q\.bias")
    base = write_tiny(tmp_path / "base.gguf", tiny)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    lora = write_peft(tmp_path / "lora", tiny, more={name: np.ones(64, np.float32)}, lora_bias=True)
    with pga.Host(base, n_threads=1) as host:
        host.load_adaptor("before", lora)
        with open(base, "ab") as file:
            file.write(b" ")
        with pytest.raises(AdaptorError, match=r"the foundation was written to while it was in use$") as error:
            host.load_adaptor("after", lora)
        assert error.value.code == "foundation_changed"
        assert host.tasks == ("base", "before")


def test_another_base(tmp_path):
    tiny = Tiny(**SMALL)
    named = {**tiny.all_metadata(), "general.source.repo_url": "https://huggingface.co/us/other"}
    base = write_gguf(tmp_path / "base.gguf", named, tensors_of(tiny))
    directory = write_peft(tmp_path / "peft", tiny)
    wider = write_peft(tmp_path / "wider", Tiny(**{**SMALL, "n_ff": 128}), base_model_name_or_path="/models/wider")
    with pga.Host(base, n_threads=1) as host:
        for path, message in (
            (directory, "it was made for tiny, and that comes from other$"),
            (wider, r"its pair on 'blk.0.ffn_down.weight', .* does not fit \[96, 64, 1\]$"),
        ):
            with pytest.raises(AdaptorError, match=message) as error:
                host.load_adaptor("peft", path)
            assert error.value.code == "adaptor_base_mismatch"
        assert host.adaptors == () and host.tasks == ("base",)


def test_without_a_whole_model_below(tiny_gguf, split_models, tmp_path, ids):
    models = {"base": tiny_gguf(**SMALL), "code": tiny_gguf(**SMALL, changed={"attn_q": 1})}
    foundation, adaptors = split_models(models)
    directory = write_peft(tmp_path / "peft", Tiny(**SMALL))
    with pga.Host(foundation, n_threads=1) as host:
        with pytest.raises(AdaptorError, match="load an adaptor of whole tensors before a PEFT directory") as error:
            host.load_adaptor("style", directory)
        assert error.value.code == "adaptor_invalid"
        host.load_adaptor("code", adaptors["code"])
        host.load_adaptor("style", directory)
        host.define_task("both", ["code", "style"])
        assert host.tasks == ("code", "both")
        with pga.Host(models["code"], {"both": directory}, n_threads=1) as other:
            with host.session("both", n_ctx=512) as session, other.session("both", n_ctx=512) as wanted:
                assert differences(wanted, session, ids) == []
