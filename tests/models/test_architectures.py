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
    assert {"token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.1.attn_norm.weight"} <= set(names)
    assert (model.arch, type(model).__module__) == (arch, f"pyggml_adapt.models.{arch}")
    assert "Source:" in __import__(type(model).__module__, fromlist=["x"]).__doc__


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
