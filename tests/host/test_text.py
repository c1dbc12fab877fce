"""Text in, text out: generation through the host, streaming, and models whose tokenizer is not there."""

import pytest
from real_models import SHARED_MODELS
from tiny_models import BOS, EOS, n_vocab, random_ids, vocab

import pyggml_adapt as pga
from pyggml_adapt.errors import ContextFullError, ParameterError, TokenizerError


@pytest.fixture(scope="module")
def host(tiny_gguf):
    with pga.Host(tiny_gguf(), n_threads=1) as host:
        yield host


def test_tokenize(host):
    ids = host.tokenize("the é世")
    texts = vocab()[0]
    assert ids[0] == BOS
    assert "".join(texts[id] for id in ids[1:]).replace("▁", " ") == " the é世"
    assert host.detokenize(ids[1:]) == "the é世"
    assert host.tokenize("a", add_special=False)[0] != BOS


def test_pieces_join_to_the_text_of_the_tokens(host):
    for seed in range(5):
        with host.session(n_ctx=256) as session:
            generation = session.generate("the", max_tokens=100, temperature=3.0, top_k=0, min_p=0.0, seed=seed)
            pieces = list(generation)
            tail = b"".join(host.tokenizer().token_to_piece(token) for token in generation.tokens)
            assert "".join(pieces) == tail.decode(errors="replace")


def test_characters_are_not_broken(host):
    """Byte tokens of one character come one by one: nothing is given out before it is whole."""
    decoder = host.tokenizer().stream()
    pieces = [decoder.feed(3 + byte) for byte in "a€👍".encode()]
    assert pieces == ["a", "", "", "€", "", "", "", "👍"]
    assert decoder.feed(3 + 0xE2) == "" and decoder.flush() == "\ufffd"


def test_stops_at_the_end_of_generation(tiny_gguf, host):
    """A session whose end-of-generation token is the one that comes next stops before it."""
    with host.session(n_ctx=256) as session:
        tokens = [int(session.eval(random_ids(9)).argmax())]
        session.rewind(0)
        generation = session.generate_ids(
            random_ids(9), max_tokens=9, params=pga.SamplerParams(temperature=0.0), stop_ids=set(tokens)
        )
        assert (list(generation), generation.finish_reason) == ([], "stop")
    assert host.tokenizer().eog_ids == {EOS}


GREEDY = {"max_tokens": 40, "temperature": 0.0, "repeat_penalty": 1.3}


def test_stop_strings(host):
    """The text ends before the first of them, wherever tokens begin and end; what is no stop string is not lost."""
    with host.session(n_ctx=256) as session:
        text = "".join(session.generate("the", **GREEDY))
    assert len(text) > 20
    for start in range(1, len(text) - 8):
        for n in (1, 3, 8):
            stop = text[start : start + n]
            with host.session(n_ctx=256) as session:
                generation = session.generate("the", stop=[stop, "never"], **GREEDY)
                assert "".join(generation) == text[: text.find(stop)]
                assert generation.finish_reason == "stop"
    with host.session(n_ctx=256) as session:
        generation = session.generate("the", stop=[text + "more", text[-5:] + "!"], **GREEDY)
        assert ("".join(generation), generation.finish_reason) == (text, "length")
    assert host.generate("the", stop=[text[5:9]], **GREEDY) == text[: text.find(text[5:9])]


def test_a_session_goes_on_after_a_stop_string(host):
    with host.session(n_ctx=256) as session:
        first = "".join(session.generate("the", **GREEDY))
        session.rewind(0)
        "".join(session.generate("the", stop=[first[8:10]], **GREEDY))
        n_past = session.n_past
        assert n_past < 40 and "".join(session.generate("a", **GREEDY))


@pytest.mark.parametrize("stop", ["end", [""], [5], None, [b"x"]])
def test_stop_strings_that_cannot_be(host, stop):
    with host.session(n_ctx=64) as session, pytest.raises(ParameterError, match=r"^stop = .* is not a list of texts"):
        session.generate("the", stop=stop)
    with pytest.raises(ParameterError, match=r"^stop = .* is not a list of texts"):
        host.generate("the", stop=stop)


def test_special_tokens_at_the_start_only(host):
    with host.session(n_ctx=256) as session:
        list(session.generate("a", max_tokens=1, temperature=0.0))
        list(session.generate("a", max_tokens=1, temperature=0.0))
        assert session.tokens.count(BOS) == 1 + sum(token == BOS for token in session.tokens[1:])
        assert session.tokens[0] == BOS and session.tokens[4] != BOS


def test_generate_of_the_host(host):
    text = host.generate("the", max_tokens=8, temperature=0.0)
    with host.session(n_ctx=256) as session:
        assert text == "".join(session.generate("the", max_tokens=8, temperature=0.0))
    assert host.generate("the", max_tokens=0) == ""
    with pytest.raises(ContextFullError, match=r"^the context of 2 tokens holds 0: "):
        host.generate("the the the", max_tokens=1, n_ctx=2)
    assert not host._sessions


@pytest.mark.parametrize(("sampling", "message"), [
    ({"temperature": -1.0}, "temperature = -1.0 is not a number from 0 to 10000"),
    ({"temperature": float("nan")}, "temperature = nan is not a number from 0 to 10000"),
    ({"top_k": -1}, "top_k = -1 is not a "),
    ({"top_p": 1.5}, "top_p = 1.5 is not a number from 0 to 1"),
    ({"min_p": "x"}, "min_p = 'x' is not a number from 0 to 1"),
    ({"repeat_penalty": 0.0}, "repeat_penalty = 0.0 is not a number from 0.0001 to 10000"),
    ({"repeat_last_n": -2}, "repeat_last_n = -2 is not a "),
    ({"seed": -1}, r"seed = -1 is not a whole number from 0 to 2\*\*64 - 1"),
    ({"seed": 1.5}, "seed = 1.5 is not a whole number"),
    ({"heat": 1}, "heat is not a parameter here; of sampling there are temperature, top_k"),
])  # fmt: skip
def test_parameters_that_cannot_be(host, sampling, message):
    with pytest.raises(ParameterError, match=f"^{message}"):
        host.generate("a", **sampling)


@pytest.mark.parametrize("name", ["top_k", "repeat_last_n"])
def test_whole_numbers_must_be_whole(name):
    with pytest.raises(ParameterError, match=f"^{name} = 2.5 is not a whole number"):
        pga.SamplerParams(**{name: 2.5})


def test_model_without_a_tokenizer(tiny_gguf):
    with pga.Host(tiny_gguf(tokenizer=False), n_threads=1) as host:
        with host.session(n_ctx=256) as session:
            assert session.eval(random_ids(5)).shape == (n_vocab(),)
            ids = session.generate_ids([5], max_tokens=3, params=pga.SamplerParams(temperature=0.0))
            assert len(list(ids)) == 3
            with pytest.raises(TokenizerError, match="tokenizer"):
                session.generate("a")
        with pytest.raises(TokenizerError, match="tokenizer"):
            host.tokenize("a")


def test_a_real_model_tells_its_story():
    path = SHARED_MODELS / "stories260K-base-f16.gguf"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    with pga.Host(path, n_threads=1) as host:
        text = host.generate("Once upon a time", max_tokens=30, temperature=0.0)
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")
