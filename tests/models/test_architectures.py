"""Every registered architecture: its tensor table and its graph."""

import numpy as np
import pytest
from tiny_models import Tiny, random_ids

import pyggml_adapt as pga
from pyggml_adapt.models import HParams, architectures, model_class


@pytest.fixture(params=architectures())
def arch(request):
    return request.param


def test_tensor_table(arch):
    tiny = Tiny(arch)
    model = model_class(arch)(HParams.from_gguf(tiny.all_metadata(), 500))
    specs = list(model.all_tensors())
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names)
    assert all(1 <= len(spec.ne) <= 4 and min(spec.ne) > 0 for spec in specs)
    assert {"token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_output.weight", "blk.1.attn_q.weight"} <= set(names)
    assert {spec.unless for spec in specs} <= {"", *names}
    assert (model.arch, type(model).__module__) == (arch, f"pyggml_adapt.models.{arch.replace('-', '_')}")
    assert "Source:" in __import__(type(model).__module__, fromlist=["x"]).__doc__


@pytest.mark.parametrize(("names", "layer"), [
    ((), 4),
    (("output.weight",), 4),
    (("output_norm.weight", "output.weight"), 4),
    (("output_norm.weight", "blk.2.ffn_down.weight"), 2),
    (("blk.2.attn_q.bias", "blk.1.attn_norm.weight"), 1),
    (("blk.0.attn_v.weight",), 0),
    (("token_embd.weight", "blk.2.attn_q.weight"), 0),
    (("rope_freqs.weight",), 0),
    (("blk.4.attn_q.weight",), 0),  # there is no such layer: nothing is known of it
    (("outputs.weight",), 0),
    (("blk.x.weight",), 0),
])  # fmt: skip
def test_first_layer(arch, names, layer):
    tiny = Tiny(arch, n_layer=4)
    model = model_class(arch)(HParams.from_gguf(tiny.all_metadata(), 500))
    assert model.first_layer(names) == layer


def test_fork(arch, tiny_gguf, split_models):
    """The architecture's graph can begin at each layer and at the head."""
    models = {"base": tiny_gguf(arch, n_layer=4)}
    models |= {str(il): tiny_gguf(arch, n_layer=4, changed={rf"^blk\.{il}\.": 1}) for il in (1, 2)}
    models["head"] = tiny_gguf(arch, n_layer=4, changed={"^output": 1})
    ids, tasks = random_ids(40), ("1", "2", "head")
    with pga.Host(*split_models(models), n_threads=1, type_k="F32", type_v="F32") as host:
        with host.session("base", n_ctx=256, forks=tasks) as session:
            session.eval(ids)
            assert session.boundaries == (1, 2, 4)
            for task, saved in zip(tasks, (1 / 4, 2 / 4, 1.0), strict=True):
                with session.fork(task) as forked, host.session(task, n_ctx=256) as fresh:
                    np.testing.assert_array_equal(forked.logits, fresh.eval(ids))
                    np.testing.assert_array_equal(forked.eval([5]), fresh.eval([5]))
                    assert forked.fork_report.saved == pytest.approx(saved)


def test_prefill_equals_decode(arch, tiny_gguf):
    """In one piece and token by token, in F32: other kernels sum in another order, so equal to about 1e-6."""
    ids = random_ids(40)
    with pga.Host(tiny_gguf(arch), n_threads=1) as host:
        with host.session(n_ctx=256) as one, host.session(n_ctx=256) as other:
            rows = one.eval(ids, all_logits=True)
            steps = np.array([other.eval([token]) for token in ids])
    assert ((rows - steps) ** 2).sum() / (steps**2).sum() < 1e-5


def test_the_last_row_is_the_last_of_all(arch, tiny_gguf):
    """Only the output rows asked for are computed; one row takes another kernel than many, hence the bound."""
    ids = random_ids(40)
    with pga.Host(tiny_gguf(arch), n_threads=1) as host, host.session(n_ctx=256) as session:
        last = session.eval(ids)
        session.rewind(0)
        rows = session.eval(ids, all_logits=True)
    assert ((rows[-1] - last) ** 2).sum() / (last**2).sum() < 1e-9


def test_tokens_do_not_see_the_future(arch, tiny_gguf):
    a, b = random_ids(30), random_ids(30, seed=1)
    with pga.Host(tiny_gguf(arch), n_threads=1) as host, host.session(n_ctx=256) as session:
        one = session.eval(a, all_logits=True)
        session.rewind(0)
        other = session.eval(a[:20] + b[20:], all_logits=True)
    np.testing.assert_array_equal(one[:20], other[:20])
    assert not np.array_equal(one[20:], other[20:])
