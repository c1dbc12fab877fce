"""Llama 4 beyond its chunks of 8192 tokens, and its router: bit for bit llama.cpp's."""

import numpy as np
import pytest
from parity import assert_equal_to_llama_cpp
from reference import Reference
from tiny_models import Tiny, random_ids, tensors_of, write_gguf

import pyggml_adapt as pga
from pyggml_adapt.ggml import Type, quantize

N_CHUNK = 8192
SMALL = {"n_embd": 32, "n_ff": 32, "n_head": 1, "n_head_kv": 1, "head_dim": 16, "n_ctx_train": 16384}


def check(reference, session, ids, start, end, *, at_once=True):
    """Assert that tokens start to end, at once or one by one, have one result; what was after them is forgotten."""
    for model in (reference, session):
        model.rewind(start)
    for piece in [ids[start:end]] if at_once else [[token] for token in ids[start:end]]:
        want, got = (model.eval(piece, all_logits=at_once) for model in (reference, session))
        np.testing.assert_array_equal(want, got)
        assert want.std() > 0.1


@pytest.mark.parametrize("flash_attn", [True, False], ids=["flash", "soft-max"])
def test_across_the_border_of_a_chunk(tiny_gguf, flash_attn):
    """Layers with chunks see nothing before the border, and the others attend more sharply from it on.

    The former have 8448 cells, which are used again from position 8448 on.
    """
    path = tiny_gguf("llama4", **SMALL, metadata={"expert_feed_forward_length": 32})
    options = {"n_ubatch": 256, "n_threads": 1, "flash_attn": flash_attn}
    ids = random_ids(9200)
    with Reference(path, n_ctx=9472, **options) as reference, pga.Host(path, **options) as host:
        with host.session(n_ctx=9472) as session:
            np.testing.assert_array_equal(reference.eval(ids[:8180]), session.eval(ids[:8180]))
            check(reference, session, ids, 8180, N_CHUNK + 20, at_once=False)
            check(reference, session, ids, N_CHUNK - 2, N_CHUNK + 2)  # two chunks in one batch
            check(reference, session, ids, 8170, 8290)
            check(reference, session, ids, 8290, 8430)
            check(reference, session, ids, 8430, 8470, at_once=False)  # from the last cell to the first
            check(reference, session, ids, 8470, 8700)
            check(reference, session, ids, 8700, 9100)
            check(reference, session, ids, 9100, 9130, at_once=False)
            check(reference, session, ids, 9090, 9140)


def test_experts_are_chosen_by_logits(tmp_path):
    """Not by their sigmoid, which is 1 for many logits."""
    tiny = Tiny("llama4", metadata={"expert_count": 16, "interleave_moe_layer_step": 1})
    tensors = tensors_of(tiny)
    for spec in tiny.tensors():
        if "ffn_gate_inp" in spec.name:
            tensors[spec.name] = Type.F32, spec.ne, quantize(40 * tiny.data(spec), Type.F32)
    path = write_gguf(tmp_path / "sure.gguf", tiny.all_metadata(), tensors)
    assert_equal_to_llama_cpp(path, random_ids(120))
