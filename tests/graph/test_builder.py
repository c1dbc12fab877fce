"""The graph, node by node, against llama.cpp's: names and values."""

import ctypes
from types import SimpleNamespace

import pytest
from reference import Reference, lib
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine import runner
from pyggml_adapt.ggml import Context, Slots, Type
from pyggml_adapt.ggml.backend import Buffer, Device
from pyggml_adapt.ggml.graph import CGraph
from pyggml_adapt.graph.weights import Weights
from pyggml_adapt.models import architectures

VARIANTS = {
    "dense": {"optional": r"^output\.weight|\.bias"},
    "experts": {"n_expert": 4, "n_expert_used": 2},
    "experts-no-gate": {"n_expert": 4, "n_expert_used": 1, "optional": r"^output\.weight"},
}


# where ggml_tensor keeps its name, after: type, buffer, ne, nb, op, op_params, flags, src, view_src, view_offs, data
NAME_OFFSET = (4 + 4) + 8 + 4 * 8 + 4 * 8 + 4 + 64 + 4 + 10 * 8 + 8 + 8 + 8


def reference_names(path, flash_attn):
    """Return the names of the nodes that llama.cpp computes for three tokens, in order."""
    names = []

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def see(tensor, ask, _):
        if ask:
            names.append(ctypes.string_at(tensor + NAME_OFFSET).decode())
        return False

    cb_eval = ctypes.cast(see, type(lib.llama_context_params().cb_eval))
    with Reference(path, n_threads=1, flash_attn=flash_attn, cb_eval=cb_eval) as reference:
        names.clear()
        reference.eval(random_ids(3))
    return names


def our_names(path, flash_attn, monkeypatch):
    programs = []

    class Kept(runner.Program):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            programs.append(self)

    monkeypatch.setattr(runner, "Program", Kept)
    with pga.Host(path, n_threads=1, flash_attn=flash_attn) as host, host.session(n_ctx=512) as session:
        session.eval(random_ids(3))
        graph = programs[0].graph
        return [graph.node(i).name for i in range(graph.n_nodes)]


FORMS = [r"^output\.weight|_exps", r"^(?!.*attn_qkv)", "attn_qkv"]  # which optional tensors there are


@pytest.mark.parametrize("flash_attn", [True, False], ids=["flash", "soft-max"])
@pytest.mark.parametrize(
    "variant",
    [*VARIANTS.values(), *({"arch": arch, "optional": form} for arch in architectures() for form in FORMS)],
    ids=[*VARIANTS, *(f"{arch}-{i}" for arch in architectures() for i in range(len(FORMS)))],
)
def test_nodes_are_named_as_llama_cpp_names_them(tiny_gguf, variant, flash_attn, monkeypatch):
    path = tiny_gguf(**variant)
    want = reference_names(path, flash_attn)
    got = our_names(path, flash_attn, monkeypatch)
    # argsort_top_k makes two nodes: the inner one cannot be named from outside
    assert got == [f"node_{i}" if name.startswith("ffn_moe_argsort") else name for i, name in enumerate(want)]


def weights():
    ctx = Context(Context.size_for(64, 64))
    data = Context(Context.size_for(8))
    buffer = Buffer.allocate(Device.cpu().buffer_type, 4096)
    sources = {}
    for i, name in enumerate(("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_q.bias")):
        sources[name] = data.new_tensor(Type.F32, (4,), name)
        buffer.place(sources[name], 64 * i)
    return Weights(Slots(CGraph(ctx, 64)), SimpleNamespace(tensors=sources, factors={}, pairs={})), sources


def test_weights_by_name():
    w, _ = weights()
    assert w.layer(0).attn_q.name == "blk.0.attn_q.weight"
    assert w.layer(0).attn_q_b.name == "blk.0.attn_q.bias"
    assert w.token_embd.name == "token_embd.weight"
    assert w.layer(0).model.token_embd is w.token_embd
    assert w.names == ("blk.0.attn_q.weight", "blk.0.attn_q.bias", "token_embd.weight")


def test_absent_weights_are_none():
    w, _ = weights()
    assert w.output is None and w.layer(0).attn_k is None and w.layer(0).attn_k_b is None and w.layer(1).attn_q is None
    assert w.names == ()


def test_a_weight_has_one_slot():
    w, _ = weights()
    assert w.layer(0).attn_q is w.layer(0).attn_q
    assert len(w.names) == 1
