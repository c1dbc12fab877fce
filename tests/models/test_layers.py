"""Layers that are not all alike: of other sizes, without a part, or kept and not computed."""

from pathlib import Path

import numpy as np
import pytest
from loras import write_lora
from parity import assert_equal_to_llama_cpp, differences
from reference import Reference
from tiny_models import LINEAR, NEMOTRON, NO_ATTENTION, NOTHING, Tiny, layer_sizes, random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine.kv_cache import KVCache
from pyggml_adapt.models import HParams

FULL = (4, 4, 96)
MODELS = {
    "nemotron": NEMOTRON,
    "last-linear": layer_sizes(FULL, NOTHING, (8, 8, 64), LINEAR),
    "last-without-attention": layer_sizes(FULL, (4, 4, 64), NOTHING, NOTHING, NO_ATTENTION),
    "first-linear": layer_sizes(LINEAR, FULL, NOTHING, LINEAR, (4, 1, 32)),
}
NEXTN = {
    "n_layer": 4,
    "optional": r"^output\.|_norm|^blk\.3\.(?!attn_qkv)",
    "metadata": {"nextn_predict_layers": 1},
}


@pytest.mark.parametrize("flash_attn", [True, False], ids=["flash", "soft-max"])
@pytest.mark.parametrize("model", MODELS)
def test_forks(model, tiny_gguf, split_models, flash_attn):
    """Wherever a task begins to differ, its fork is a fresh session; so is the fork's fork."""
    shape = MODELS[model]
    n_layer, n_ff = shape["n_layer"], shape["metadata"]["feed_forward_length"]
    layers = [il for il in range(1, n_layer) if n_ff[il]]
    models = {"base": tiny_gguf("deci", **shape)}
    models |= {str(il): tiny_gguf("deci", **shape, changed={rf"^blk\.{il}\.": 1}) for il in layers}
    models["head"] = tiny_gguf("deci", **shape, changed={"^output": 1})
    ids, tasks = random_ids(40), {**{str(il): il for il in layers}, "head": n_layer}
    last = str(layers[-1])
    options = {"n_ubatch": 16, "flash_attn": flash_attn, "type_k": "F32", "type_v": "F32"}
    with pga.Host(*split_models(models), n_threads=1, **options) as host:
        for task, il in tasks.items():
            with host.session("base", n_ctx=256, forks=(task, last)) as session:
                session.eval(ids)
                assert session.boundaries == tuple(sorted({il, layers[-1]}))
                with session.fork(task, forks=(last,)) as forked, host.session(task, n_ctx=256) as fresh:
                    np.testing.assert_array_equal(forked.logits, fresh.eval(ids))
                    assert forked.fork_report.saved == pytest.approx(il / n_layer)
                    with forked.fork(last) as again, host.session(last, n_ctx=256) as fresh_again:
                        np.testing.assert_array_equal(again.logits, fresh_again.eval(ids))
                    np.testing.assert_array_equal(forked.eval([5]), fresh.eval([5]))


def test_tasks(tiny_gguf, split_models):
    """Each task answers as its own file does under llama.cpp, though each layer has tensors of its own shapes."""
    changed = [r"attn_output|ffn_up", "norm|attn_k"]
    models = {str(i): tiny_gguf("deci", **NEMOTRON, changed={each: 1}) for i, each in enumerate(changed)}
    with pga.Host(*split_models(models), n_threads=1, n_ubatch=48) as host:
        for task, path in models.items():
            with Reference(path, n_threads=1, n_ubatch=48) as reference, host.session(task, n_ctx=512) as session:
                assert differences(reference, session, random_ids(120)) == []


def test_low_rank(tiny_gguf, tmp_path):
    """Pairs on what stands for attention count as llama.cpp lets them."""
    lora = write_lora(tmp_path / "lora.gguf", Tiny("deci", **NEMOTRON), r"(attn_(q|output)|ffn_up)\.weight")
    path = tiny_gguf("deci", **NEMOTRON)
    with Reference(path, n_threads=1, n_ubatch=48) as reference:
        reference.set_loras({lora: 1.0})
        with pga.Host(path, {"lora": lora}, n_threads=1, n_ubatch=48) as host, host.session("lora", n_ctx=512) as ours:
            assert differences(reference, ours, random_ids(120)) == []


@pytest.mark.parametrize("type_v", ["F32", "F16"])
def test_v_of_several_widths(tiny_gguf, type_v):
    """Transposed, each layer's V is padded to the widest; more tokens than one padded step of n_kv holds."""
    assert_equal_to_llama_cpp(tiny_gguf("deci", **NEMOTRON), flash_attn=False, type_v=type_v, n_ubatch=7)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_the_cache_has_no_layers_without_attention(tiny_gguf, flash_attn):
    with pga.Host(tiny_gguf("deci", **NEMOTRON), n_threads=1) as host, host.session(n_ctx=1) as session:
        hp = session._model.hp
    cache = KVCache(hp, 256, flash_attn=flash_attn)
    heads_k, heads_v = [2, 8, 1], [2, 8, 1] if flash_attn else [8, 8, 8]  # transposed, V is as wide in all layers
    assert [cache.k_l[il].ne[0] for il in (0, 1, 5)] == [32 * n for n in heads_k]
    assert [cache.v_l[il].ne[0] for il in (0, 1, 5)] == [32 * n for n in heads_v]
    assert list(cache.k_l) == list(cache.v_l) == [0, 1, 5]
    assert cache.nbytes == 256 * 2 * 32 * (sum(heads_k) + sum(heads_v))
    assert cache.copy(KVCache(hp, 256, flash_attn=flash_attn), 10, 4) == 10 * 2 * 32 * (
        sum(heads_k[:2]) + sum(heads_v[:2])
    )


def test_sizes_of_layers(tiny_gguf):
    with pga.Host(tiny_gguf("deci", **NEMOTRON), n_threads=1) as host, host.session(n_ctx=1) as session:
        hp: HParams = session._model.hp
    assert (hp.n_head, hp.n_head_kv, hp.n_ff, hp.n_embd_head_k) == (8, 8, 192, 32)
    assert (hp.of_layer(2).n_head, hp.of_layer(2).n_head_kv, hp.of_layer(5).n_head_kv) == (4, 0, 1)


@pytest.mark.parametrize("arch", ["glm4moe", "exaone4"])
def test_layers_that_predict_further_tokens(arch, tiny_gguf, split_models, tmp_path):
    """They are kept, byte for byte, and change nothing; llama.cpp loads the same files."""
    models = {"base": tiny_gguf(arch, **NEXTN), "next": tiny_gguf(arch, **NEXTN, changed={r"^blk\.3\.": 1})}
    models["code"] = tiny_gguf(arch, **NEXTN, changed={r"^blk\.1\.attn": 1})
    foundation, adaptors = split_models(models)
    name, ids, rows = "blk.3.nextn.eh_proj.weight", random_ids(120), {}
    with pga.Host(foundation, adaptors, n_threads=1, n_ubatch=48) as host:
        for task, path in models.items():
            merged = Path(tmp_path / f"{task}.gguf")
            pga.merge(foundation, adaptors[task], merged)
            assert merged.read_bytes() == path.read_bytes()
            assert host.where(name, task)[0] == "adaptor"
            assert host.where("blk.2.attn_q.weight", task)[0] == "foundation"
            files = [adaptors[task], foundation]
            with Reference(files, n_threads=1, n_ubatch=48) as reference, host.session(task, n_ctx=512) as session:
                assert differences(reference, session, ids) == []
                rows[task] = session.logits
        with host.session("base", n_ctx=512) as session:
            session.eval(ids)
            with session.fork("next") as forked:
                np.testing.assert_array_equal(forked.logits, session.logits)
    np.testing.assert_array_equal(rows["base"], rows["next"])
    assert not np.array_equal(rows["base"], rows["code"])
