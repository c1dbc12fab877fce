"""Embeddings: llama.cpp's hidden states bit for bit, and what is made of them."""

import numpy as np
import pytest
from reference import Reference
from tiny_models import Tiny, random_ids, tensors_of, write_gguf

import pyggml_adapt as pga
from pyggml_adapt.errors import ContextFullError, ParameterError, TokenizerError
from pyggml_adapt.models import architectures

TEXTS = ["the in a", "upon", "the the in a upon " * 9]
POOLINGS = {"mean": 1, "cls": 2, "last": 3}  # llama.cpp's numbers


@pytest.fixture(scope="module")
def host(tiny_gguf):
    with pga.Host(tiny_gguf(), n_threads=1, n_ubatch=8) as host:
        yield host


@pytest.mark.parametrize("arch", architectures())
def test_hidden_states_of_every_architecture(arch, tiny_gguf):
    ids, path = random_ids(60), tiny_gguf(arch)
    with Reference(path, n_threads=1, n_ubatch=32, embeddings=True, pooling_type=0) as reference:
        with pga.Host(path, n_threads=1, n_ubatch=32) as host, host.session(n_ctx=512) as session:
            for part in (ids[:48], ids[48:49], ids[49:]):
                expected = reference.embed(part)
                np.testing.assert_array_equal(session.eval_hidden(part), expected)
                assert expected.std() > 0.01
            assert session.tokens == ids and session.logits is None


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooled_ones_are_those_of_llama_cpp(tiny_gguf, pooling):
    """A mean of llama.cpp's is a product with 1/n in F32: a relative error of 1e-6 or so."""
    path = tiny_gguf()
    with pga.Host(path, n_threads=1) as host:
        ids = host.tokenize(TEXTS[2])
        params = {"embeddings": True, "pooling_type": POOLINGS[pooling], "n_ubatch": 512}
        with Reference(path, n_threads=1, **params) as reference:
            expected = reference.embed_pooled(ids)
        found = host.embed(TEXTS[2], pooling=pooling, normalize=False)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        if pooling != "mean":
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_pooling(host, normalize):
    """Against NumPy on the hidden states of fresh sessions."""
    for i, text in enumerate(TEXTS):
        ids = host.tokenize(text)
        with host.session(n_ctx=256) as session:
            rows = session.eval_hidden(ids)
        expected = {"mean": rows.astype(np.float64).mean(axis=0), "cls": rows[0], "last": rows[-1], "none": rows}
        for pooling, vectors in expected.items():
            if normalize:
                vectors = vectors / np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
            found = host.embed(text, pooling=pooling, normalize=normalize)
            assert found.dtype == np.float32 and found.shape == vectors.shape
            np.testing.assert_allclose(found, vectors, rtol=1e-6)
            of_many = host.embed(TEXTS, pooling=pooling, normalize=normalize, n_ctx=256)
            np.testing.assert_array_equal(of_many[i], found)
            assert isinstance(of_many, list) if pooling == "none" else of_many.shape == (3, 128)
    assert not host._sessions


def test_of_no_texts(host):
    assert host.embed([]).shape == (0, 128)
    assert host.embed([], pooling="none") == []


def test_a_session_goes_on_after_hidden_states(host):
    """Their K and V are those of eval(); there are no logits to go on from."""
    ids = random_ids(40)
    with host.session(n_ctx=64) as session, host.session(n_ctx=64) as fresh:
        session.eval_hidden(ids)
        fresh.eval(ids)
        with pytest.raises(pga.errors.TokenError):
            session.generate_ids([], max_tokens=1, params=pga.SamplerParams())
        np.testing.assert_array_equal(session.eval([5]), fresh.eval([5]))


def test_forks_of_hidden_states(tiny_gguf, split_models):
    models = {"base": tiny_gguf(n_layer=4), "other": tiny_gguf(n_layer=4, changed={r"^blk\.2\.": 1})}
    models["head"] = tiny_gguf(n_layer=4, changed={"^output": 1})
    ids = random_ids(40)
    with pga.Host(*split_models(models), n_threads=1, n_ubatch=16) as host:
        with host.session("base", n_ctx=256, forks=["other", "head"]) as session:
            session.eval_hidden(ids)
            for task in ("other", "head"):
                with session.fork(task) as forked, host.session(task, n_ctx=256) as fresh:
                    np.testing.assert_array_equal(forked.logits, fresh.eval(ids))


def test_what_takes_pieces_may_fail(host):
    ids = random_ids(40)

    def fail(rows):
        raise ZeroDivisionError

    with host.session(n_ctx=64) as session, host.session(n_ctx=64) as fresh:
        session.eval(ids[:9])
        fresh.eval(ids[:9])
        with pytest.raises(ZeroDivisionError):
            session.eval_each(ids[9:], fail)
        assert session.tokens == ids[:9]
        np.testing.assert_array_equal(session.eval(ids[9:]), fresh.eval(ids[9:]))


def test_pieces_are_one_call(host):
    ids, pieces = random_ids(37), []
    with host.session(n_ctx=64) as session, host.session(n_ctx=64) as fresh:
        session.eval_each(ids, lambda rows: pieces.append(rows.copy()))
        np.testing.assert_array_equal(np.concatenate(pieces), fresh.eval(ids, all_logits=True))
        assert [len(rows) for rows in pieces] == [8, 8, 8, 8, 5]
        np.testing.assert_array_equal(session.logits, fresh.logits)


def test_tasks_have_their_own(tiny_gguf, split_models):
    models = {
        "base": tiny_gguf(),
        "norm": tiny_gguf(changed={"^output_norm": 1}),
        "head": tiny_gguf(changed={"^output\\.": 1}),
    }
    with pga.Host(*split_models(models), n_threads=1) as host:
        found = {task: host.embed("the", task=task) for task in host.tasks}
        np.testing.assert_array_equal(found["base"], found["head"])  # the head is not computed
        assert not np.allclose(found["base"], found["norm"])


@pytest.mark.parametrize(("number", "pooling"), [(None, "mean"), (0, "none"), (1, "mean"), (2, "cls"), (3, "last")])
def test_the_models_own_pooling(tmp_path, number, pooling):
    tiny = Tiny(metadata={"pooling_type": number})
    with pga.Host(write_gguf(tmp_path / "m.gguf", tiny.all_metadata(), tensors_of(tiny)), n_threads=1) as host:
        np.testing.assert_array_equal(host.embed("the in"), host.embed("the in", pooling=pooling))


@pytest.mark.parametrize(("number", "what"), [(4, "rank, which is for scores of pairs of texts"), (9, "9")])
def test_a_models_pooling_that_cannot_be(tmp_path, number, what):
    tiny = Tiny(metadata={"pooling_type": number})
    with pga.Host(write_gguf(tmp_path / "m.gguf", tiny.all_metadata(), tensors_of(tiny)), n_threads=1) as host:
        with pytest.raises(
            ParameterError, match=f"^the model's pooling_type is {what}: choose a pooling, one of none, "
        ):
            host.embed("the")
        assert host.embed("the", pooling="mean").shape == (128,)


@pytest.mark.parametrize(("options", "kind", "message"), [
    ({"pooling": "max"}, ParameterError, "pooling = 'max' is not one of none, mean, cls, last$"),
    ({"texts": 5}, ParameterError, "texts must be a text or a list of texts, not int$"),
    ({"texts": b"the"}, ParameterError, "texts must be a text or a list of texts, not bytes$"),
    ({"texts": ["a", 5]}, TokenizerError, "only text can be tokenized, not int$"),
    ({"n_ctx": 0}, ParameterError, "n_ctx = 0 is not from 1"),
    ({"texts": ["a", "the the the"], "n_ctx": 3}, ContextFullError, r"text 1 takes \d tokens, more than the context"),
])  # fmt: skip
def test_what_is_wrong(host, options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        host.embed(**{"texts": "the", **options})
    assert not host._sessions
