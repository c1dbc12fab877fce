"""logits_error: nothing between equal models, and what NumPy finds between others."""

import numpy as np
import pytest
from low_rank_models import base_and_task
from tiny_models import BOS, Tiny, n_vocab, random_ids, tensors_of, write_gguf

from pyggml_adapt.errors import ParameterError
from pyggml_adapt.evals.compare import N_TOKENS, logits_error, sample_ids
from pyggml_adapt.host.host import Host
from pyggml_adapt.tools import split

TINY = Tiny(n_layer=1)


@pytest.fixture
def models(tmp_path):
    """Return a base and a task."""
    return base_and_task(tmp_path, TINY, 6, "attn_", "ffn_")


def test_whole_tensors_give_the_same_logits(models, tmp_path):
    base, task = models
    own = split({"x": task}, tmp_path / "out", foundation=base).adaptors["x"]
    found = logits_error(task, base, own, random_ids(40), n_threads=1)
    assert (found.n_tokens, found.nmse, found.max_abs, found.kl_mean, found.top1_agreement) == (40, 0, 0, 0, 1)


def test_the_figures(models, tmp_path):
    base, task = models
    own = split({"x": task}, tmp_path / "out", foundation=base, low_rank=2).adaptors["x"]
    ids = random_ids(40)
    found = logits_error(task, base, own, ids, n_threads=1)
    rows = []
    with Host(task, n_threads=1) as whole, Host(base, {"x": own}, n_threads=1) as host:
        for each, name in ((whole, "base"), (host, "x")):
            with each.session(name, n_ctx=40) as session:
                rows.append(session.eval(ids, all_logits=True).astype(np.float64))
    want, got = rows
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in rows)
    assert found.nmse == pytest.approx(np.square(got - want).sum() / np.square(want).sum(), rel=1e-3)
    assert found.max_abs == pytest.approx(np.abs(got - want).max(), rel=1e-3)
    assert found.kl_mean == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-3)
    assert found.top1_agreement == pytest.approx((want.argmax(1) == got.argmax(1)).mean(), abs=1 / 40)
    assert found.nmse > 1e-3


def test_pseudo_random_tokens(models):
    ids = sample_ids(models[0])
    assert len(ids) == N_TOKENS
    assert ids == sample_ids(models[1])
    assert ids[0] == BOS
    assert set(ids) <= set(range(n_vocab()))


def test_tokens_of_a_text(models):
    with Host(models[0], n_threads=1) as host:
        text = "the tea " * 200
        assert sample_ids(models[0], text) == host.tokenize(text)[:N_TOKENS]


def test_no_more_tokens_than_the_context_holds(tmp_path):
    tiny = Tiny(n_layer=1, n_ctx_train=16, tokenizer=False)
    path = write_gguf(tmp_path / "x.gguf", tiny.all_metadata(), tensors_of(tiny), tokenizer=False)
    assert len(sample_ids(path)) == 16


def test_no_tokens(models):
    with pytest.raises(ParameterError, match="there are no tokens to compare logits of"):
        logits_error(models[1], models[0], models[0], [])
