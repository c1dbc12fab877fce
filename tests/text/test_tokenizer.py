"""Tokenizers on small vocabularies made here: SentencePiece, byte-level BPE, decoding, streaming."""

import random
import re

import numpy as np
import pytest

from pyggml_adapt.errors import TokenError, TokenizerError
from pyggml_adapt.text import Tokenizer
from pyggml_adapt.text.bpe import CHAR_OF_BYTE

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def spm(pieces, *, bytes_=BYTES, scores=True, types=None, **keys):
    """Return a SentencePiece tokenizer.  pieces: text -> score, ids from 259 on; types: text -> token type."""
    texts = ["<unk>", "<s>", "</s>", *bytes_, *pieces]
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | dict.fromkeys(bytes_, 6) | (types or {})
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": np.array([kinds.get(text, 1) for text in texts], np.int32),
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if scores:
        metadata["tokenizer.ggml.scores"] = np.array([pieces.get(text, 0.0) for text in texts], np.float32)
    return Tokenizer.from_metadata(metadata)


def bpe(merges, *, tokens=(), special=(), pre="llama-bpe", **keys):
    """Return a byte-level tokenizer: 256 bytes, what `merges` give, then `tokens` and control tokens."""
    texts = [*CHAR_OF_BYTE.values(), *dict.fromkeys(merge.replace(" ", "") for merge in merges), *tokens, *special]
    types = [3 if text in special else 1 for text in texts]
    metadata = {"model": "gpt2", "pre": pre, "tokens": texts, "merges": list(merges), "token_type": np.array(types)}
    return Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in (metadata | keys).items()})


def texts(tok, ids):
    return [tok.token_to_piece(id, special=True) for id in ids]


def plain(tok, text, **options):
    return texts(tok, tok.encode(text, add_special=False, **options))


def test_spm_merges_best_score_first():
    tok = spm({"▁": -9, "a": -9, "b": -9, "c": -9, "ab": -2, "bc": -1, "abc": -5, "▁a": -4})
    assert plain(tok, "abc") == [b" a", b"bc"]
    assert tok.encode("abc") == [1, *tok.encode("abc", add_special=False)]


def test_spm_equal_scores_merge_from_the_left():
    tok = spm({"a": 0, "aa": 0, "aaa": 0, "ab": 0, "ba": 0, "b": 0}, scores=False, add_space_prefix=False)
    assert plain(tok, "aaaaa") == [b"aaa", b"aa"]
    assert plain(tok, "aba") == [b"ab", b"a"]


def test_spm_merges_characters_that_are_no_tokens():
    tok = spm({"é世": -1}, add_space_prefix=False)
    assert plain(tok, "é世é") == ["é世".encode(), b"\xc3", b"\xa9"]


def test_spm_bytes():
    tok = spm({"▁": 0})
    assert tok.encode("é\n\0", add_special=False) == [259, 3 + 0xC3, 3 + 0xA9, 3 + 10, 3]
    assert tok.decode([3 + 0xF0, 3 + 0x9F, 259, 3 + 0x98]) == "\ufffd \ufffd"


def test_spm_missing_byte():
    tok = spm({"▁": 0, "a": 0, "\n": 0}, bytes_=BYTES[:0x80])
    assert plain(tok, "a\n") == [b" ", b"a", b"\n"]
    with pytest.raises(TokenizerError, match=r"^tokenizer\.ggml\.tokens has no token <0xC3>, which the text needs"):
        tok.encode("aé")


@pytest.mark.parametrize("prefix", [True, False])
def test_spm_space_prefix(prefix):
    tok = spm({"▁": 0, "a": 0, "<x>": 0}, types={"<x>": 4}, add_space_prefix=prefix)
    space = [b" "] if prefix else []
    assert plain(tok, "a<x>a") == [*space, b"a", b"<x>", *space, b"a"]
    assert plain(tok, "") == []
    assert plain(tok, " ") == [*space, b" "]
    assert tok.decode(tok.encode("a a", add_special=False)) == "a a"
    assert tok.decode(tok.encode("a a"), remove_special=True) == (" a a" if prefix else "a a")  # so does llama.cpp


def test_special_tokens_only_if_asked():
    tok = spm({"▁": 0, **dict.fromkeys("<s>/unk", 0), "<u>": 0, "u>": 1}, types={"<u>": 4})
    assert tok.encode("<s>", parse_special=True) == [1, 1]
    assert 1 not in tok.encode("<s></s><unk>", add_special=False)
    assert tok.encode("<s></s><unk>", add_special=False, parse_special=True) == [1, 2, 0]
    assert b"<u>" in plain(tok, "s<u>s")  # user-defined: always


def test_longest_special_token_first():
    tok = bpe([], special=["<|a", "<|a>"])
    assert plain(tok, "<|a><|ac", parse_special=True) == [b"<|a>", b"<|a", b"c"]
    assert plain(tok, "<|a", parse_special=False) == [b"<", b"|", b"a"]


def test_add_eos():
    tok = spm({"▁a": 0}, add_bos_token=False, add_eos_token=True)
    ids = tok.encode("a")
    assert ids[-1] == 2 and ids[0] != 1
    assert tok.decode(ids, remove_special=True) == "a"
    assert tok.decode(ids, unparse_special=True) == "a</s>"


def test_bpe_merges_by_rank():
    tok = bpe(["b c", "a b", "Ġ a", "Ġa bc"])
    assert plain(tok, "abc abc") == [b"a", b"bc", b" abc"]
    tok = bpe(["a b", "b c", "b c"])
    assert plain(tok, "abc") == [b"ab", b"c"]


def test_bpe_takes_whole_words():
    tok = bpe(["a b"], tokens=["abc", "Ġabc"])
    assert plain(tok, "abc abcd") == [b"abc", b" ", b"ab", b"c", b"d"]


def test_bpe_ignores_merges_only_where_llama_cpp_does():
    for pre, words in (("glm4", [b"abc"]), ("chatglm-bpe", [b"ab", b"c"]), ("gpt-2", [b"ab", b"c"])):
        assert plain(bpe(["a b"], tokens=["abc"], pre=pre), "abc") == words


def test_bpe_symbols_that_are_no_tokens():
    chars = {char: i for i, char in enumerate(c for c in CHAR_OF_BYTE.values() if c not in "xĠ")}
    metadata = {"model": "gpt2", "pre": "llama3", "tokens": [*chars, "xa"], "merges": ["x a", "b c", "bad", " y"]}
    tok = Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    assert plain(tok, "xa") == [b"xa"]  # x is no token, xa is
    assert plain(tok, "bcx b") == [b"b", b"c", b"b"]  # bc falls apart; x and the space are lost


def test_bpe_pieces():
    tok = bpe([], tokens=["Ġé", "世"], special=["<|x|>"])
    assert tok.token_to_piece(256) == b" \xe9"
    assert tok.token_to_piece(257) == "[UNK_BYTE_0xe4b896世]".encode()
    assert tok.token_to_piece(258) == b""
    assert tok.token_to_piece(258, special=True) == b"<|x|>"


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("a , b . c ? d !", "a, b. c? d!"),
        ("a  ,", "a ,"),
        (" , .", ",."),
        ("a ' b ' ' c", "a'b'' c"),
        ("it 's i 'm we 're I 've he 'd 'll 't", "it's i'm we're I've he 'd 'll 't"),
        ("x '", "x '"),
    ],
)
def test_bpe_cleans_spaces(text, cleaned):
    tok = bpe([])
    assert tok.decode(tok.encode(text, add_special=False)) == cleaned


def test_bpe_keeps_spaces():
    tok = bpe([], pre="qwen2", add_bos_token=False)
    assert tok.decode(tok.encode("a , b 's ' c .")) == "a , b 's ' c ."


def test_round_trip():
    tok = bpe(["Ġ a", "a b"])
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(chr(rng.choice([97, 98, 32, 10, 0xE9, 0x4E16, 0x1F600])) for _ in range(30))
        assert tok.decode(tok.encode(text, add_special=False)) == text
    tok = spm({"▁": 0, "a": 0, "▁a": -1, "é": 0})
    assert tok.decode(tok.encode(text, add_special=False)) == text


@pytest.mark.parametrize("tok", [spm({"a": 0}), bpe([])], ids=["spm", "bpe"])
def test_lone_surrogate(tok):
    with pytest.raises(TokenizerError, match=re.escape("the text has a lone surrogate, U+D800, at 2")):
        tok.encode("aé\ud800b")


@pytest.mark.parametrize("token", [-1, 259, 2**40])
def test_token_outside_the_vocabulary(token):
    tok = spm({})
    for call in (tok.token_to_piece, tok.stream().feed, lambda token: tok.decode([5, token])):
        with pytest.raises(TokenError, match=f"^token {token} is outside the vocabulary of 259$"):
            call(token)


def test_decode_accepts_arrays():
    tok = bpe([])
    assert tok.decode(np.array(tok.encode("hé", add_special=False), np.int32)) == "hé"
    assert tok.decode([]) == ""


def test_stream():
    tok = bpe([])
    ids = tok.encode("a世👍", add_special=False)
    stream = tok.stream()
    assert [stream.feed(id) for id in ids] == ["a", "", "", "世", "", "", "", "👍"]
    assert stream.flush() == ""
    assert stream.feed(ids[1]) == ""
    assert stream.flush() == "\ufffd"
    assert [stream.feed(id) for id in (ids[1], ids[0])] == ["", "\ufffda"]


def test_stream_hides_control_tokens():
    tok = spm({"▁a": 0})
    stream = tok.stream()
    assert [stream.feed(id) for id in (1, 259, 2)] == ["", " a", ""]


def test_long_words():
    tok = bpe(["a a", "aa aa"])
    assert len(tok.encode("a" * 100_000, add_special=False)) == 25_000
    tok = spm({"a": 0, "aa": 0, "aaaa": 0}, add_space_prefix=False)
    assert len(tok.encode("a" * 100_000, add_special=False)) == 25_000
