"""Pre-tokenizers: where they cut text, and ids equal to llama.cpp's on a vocabulary in which the borders show."""

import random
import time
import unicodedata

import pytest
from llama_tokenizer import Reference, assert_equal, pair_vocabulary, random_text, write_vocab

from pyggml_adapt.ggml import GGUFReader
from pyggml_adapt.text import Tokenizer
from pyggml_adapt.text.pre_tokenizers import PRE_TOKENIZERS, Splitter
from pyggml_adapt.text.unicode_classes import ranges

SPECIAL_IDS = {"bos_token_id": (3, "u32"), "eos_token_id": (4, "u32")}
# llama.cpp compiles the regular expressions of these anew for each text, which takes milliseconds
SLOW = {"jais-2": 8, "gpt-4o": 15, "llama4": 4, "kanana2": 4, "talkie": 4, "minimax-m2": 4, "tiny_aya": 15}
SLOW |= {"cohere2moe": 4, "youtu": 15}


def words(pre, text):
    splitter = Splitter(PRE_TOKENIZERS[pre].rules)
    return [word for words in splitter.words(splitter.parts(text)) for word in words]


@pytest.mark.parametrize(
    "pre, text, expected",
    [
        ("llama3", "It's I'LL x'ſ", ["It", "'s", " I", "'LL", " x", "'ſ"]),
        ("llama3", "12345 67", ["123", "45", " ", "67"]),
        ("llama3", "a  b \n\n c  ", ["a", " ", " b", " \n\n", " c", "  "]),
        ("llama3", "!? ¡\r\n.", ["!?", " ¡\r\n", "."]),
        ("llama3", "x\u1c89\U00010d40y", ["x", "\u1c89\U00010d40", "y"]),  # unknown to Unicode 15.1
        ("llama3", "世界\u3000你²½", ["世界", "\u3000你", "²½"]),
        ("llama3", "a\x1c\x85b", ["a", "\x1c", "\x85b"]),  # a control character is no white space, the next line is
        ("qwen2", "12 I'Re", ["1", "2", " I", "'Re"]),
        ("qwen35", "ne\u0301e \u0301x", ["ne\u0301e", " \u0301x"]),
        ("qwen2", "ne\u0301e", ["ne", "\u0301e"]),
        ("gpt-2", "I'LL it's 12345  x\n\n", ["I", "'", "LL", " it", "'s", " 12345", " ", " x", "\n\n"]),
        ("starcoder", "ab 12\n1", ["ab", " ", "1", "2", "\n", "1"]),
        ("tekken", "HTTPServer ÄÖüß", ["HTTPServer", " ÄÖüß"]),
        ("tekken", "camelCase's", ["camel", "Case", "'s"]),
        ("gpt-4o", "camelCase's 1234", ["camel", "Case's", " ", "123", "4"]),
        ("tiny_aya", "ab1234567.12", ["ab", "1", "234", "567", ".", "12"]),
        ("afmoe", "x1234 ไทย12", ["x", "1", "234", " ", "ไ", "ทย", "12"]),
        ("superbpe", "a b 1234567", ["a b ", "1", "234", "567"]),
        ("superbpe", "1234²567", ["1", "234²", "567"]),
        (
            "deepseek-llm",
            "a, b\n\n12 。\u3000。  ",
            ["a", ",", " b", "\n", "\n", "12", " ", "。", "\u3000", "。", "  "],
        ),
        ("deepseek-coder", "a, 世12", ["a", ",", " ", "世", "1", "2"]),
        ("deepseek-v3", "x.abc 世カ1234", ["x", ".abc", " ", "世カ", "123", "4"]),
        ("hunyuan-dense", "\x00\x01a\x01", ["\x00", "\x01a", "\x01"]),
        ("bailingmoe", "a\n\n\n b", ["a", "\n\n\n", " b"]),
        ("exaone-moe", "a b ./", ["a b", " ./"]),
        ("laguna", "!\n\n?", ["!", "\n\n", "?"]),
        ("seed-coder", "!\n?", ["!", "\n", "?"]),
        ("falcon", "a+=`b`1234", ["a", "+=`", "b", "`", "123", "4"]),
        ("default", "a+=`b", ["a", "+=", "`", "b"]),
        ("bloom", " a,b。", [" a", ",", "b", "。"]),
        ("chameleon", "IMGIMGABZ  a", ["IMGIMGABZ", "  ", "a"]),
        ("jais-2", " " * 7 + "a", [" " * 4, " " * 2, " a"]),
    ],
)
def test_words(pre, text, expected):
    assert words(pre, text) == expected


def test_words_join_to_the_text():
    rng = random.Random(4)
    texts = [random_text(rng) for _ in range(50)]
    for pre in PRE_TOKENIZERS:
        for text in texts:
            parts = words(pre, text)
            assert "".join(parts) == text and all(parts), (pre, text)


@pytest.mark.parametrize("char", [" ", "\n", "7", "²", "A", "é", "!", "\u0301", "\x00", "\u3000", "A ", " \n", "7a"])
def test_long_runs_take_linear_time(char):
    text = "x" + char * 8000 + "y"
    start = time.process_time()
    for pre in PRE_TOKENIZERS:
        assert "".join(words(pre, text)) == text
    assert time.process_time() - start < 10  # seconds; quadratic time would be minutes


def test_classes_are_of_unicode_15_1():
    counts = {category: sum(last - first + 1 for first, last in ranges(category)) for category in "LNMPS"}
    assert counts == {"L": 136674, "N": 1821, "M": 2450, "P": 819, "S": 7766}
    older = unicodedata.unidata_version < "15.1"
    for category in "LNMPS":
        for char in (chr(c) for first, last in ranges(category) for c in (first, last)):
            if older or unicodedata.unidata_version == "15.1.0":
                assert unicodedata.category(char)[0] == category or (older and unicodedata.category(char) == "Cn"), char


@pytest.fixture(scope="module")
def vocabulary():
    return pair_vocabulary(8192)


@pytest.mark.parametrize("pre", [None, *PRE_TOKENIZERS])
def test_random_text_equals_llama_cpp(pre, vocabulary, tmp_path):
    path = tmp_path / "vocab.gguf"
    write_vocab(path, *vocabulary, pre, **SPECIAL_IDS)
    tok, ref = Tokenizer.from_metadata(GGUFReader(path).metadata), Reference(path)
    assert tok.add_bos == ref.lib.llama_vocab_get_add_bos(ref.vocab)
    rng = random.Random(str(pre))
    special = [text for text, _ in tok._special.tokens]
    for _ in range(SLOW.get(pre, 60)):
        assert_equal(tok, ref, random_text(rng, special))
    ref.close()


@pytest.mark.parametrize("pre", ["glm4", "chatglm-bpe", "qwen2", "tekken"])
def test_special_ids_without_keys_equal_llama_cpp(pre, tmp_path):
    path = tmp_path / "vocab.gguf"
    write_vocab(path, *pair_vocabulary(16), pre)
    tok, ref = Tokenizer.from_metadata(GGUFReader(path).metadata), Reference(path)
    assert (tok.bos_id, tok.eos_id, tok.add_bos) == (ref.id("bos"), ref.id("eos"), pre == "tekken")
    ref.close()
