"""Tokenizers against llama.cpp: its vocabularies with the expected ids beside them, and its own functions."""

import ctypes
import random
from pathlib import Path

import pytest

from pyggml_adapt.text import Tokenizer

MODELS = Path(__file__).parents[3] / "shared" / "models"
VOCABS = [
    "ggml-vocab-llama-spm.gguf",
    "ggml-vocab-llama-bpe.gguf",
    "ggml-vocab-phi-3.gguf",
    "stories260K-base-q8_0.gguf",
]
RANGES = (
    (0, 0x20), (0x20, 0x7F), (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x780), (0x900, 0xE80),
    (0x1100, 0x1200), (0x1C80, 0x1CC0), (0x2000, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3100), (0x4E00, 0xA000),
    (0xAC00, 0xD7A4), (0xE000, 0xFE10), (0xFE10, 0x10000), (0x10000, 0x14700), (0x16000, 0x19000), (0x1D000, 0x1F000),
    (0x1F000, 0x1FB00), (0x20000, 0x33480), (0xE0000, 0xE01F0), (0x10FF00, 0x110000),
)  # fmt: skip
WORDS = (
    "Hello", " world", " the", "it's", "I'LL", "'Re", "don't", "naïve", "Straße", "Привет", "世界", "안녕하세요",
    "مرحبا", "नमस्ते", "▁", "▁▁", "<0x0A>", "<unk>", "<s>", "...", "3.14159", "1234567", "²Ⅷ٣½", "İſK",
    "👍🏽", "👨‍👩‍👧", "🇩🇪", "1️⃣",
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\u2028", "\u200b", "e\u0301",
)  # fmt: skip


def random_text(rng, special):
    """Return words, runs of one character, random characters and special tokens, some cut short."""
    out = []
    for _ in range(rng.randrange(12)):
        kind = rng.random()
        if kind < 0.4:
            out.append(rng.choice(WORDS))
        elif kind < 0.5:
            out.append(rng.choice(" \n.ae=-'") * rng.randrange(30))
        elif kind < 0.7:
            text = rng.choice(special)
            out.append(text if kind < 0.65 else text[: rng.randrange(len(text))])
        else:
            low, high = rng.choice(RANGES)
            out.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(8))))
    return "".join(out)


class Reference:
    """llama.cpp's tokenizer functions on one GGUF file."""

    def __init__(self, path):
        self.lib = pytest.importorskip("llama_cpp")
        params = self.lib.llama_model_default_params()
        params.vocab_only = True
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def encode(self, text, add_special, parse_special):
        data = text.encode()
        out = (self.lib.llama_token * (len(data) + 16))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), out, len(out), add_special, parse_special)
        return out[:n]

    def decode(self, ids, remove_special, unparse_special):
        tokens = (self.lib.llama_token * len(ids))(*ids)
        out = ctypes.create_string_buffer(256 * (len(ids) + 1))
        n = self.lib.llama_detokenize(self.vocab, tokens, len(ids), out, len(out), remove_special, unparse_special)
        return out.raw[:n].decode(errors="replace")

    def piece(self, token, special):
        out = ctypes.create_string_buffer(512)
        n = self.lib.llama_token_to_piece(self.vocab, token, out, len(out), 0, special)
        return out.raw[:n]

    def id(self, name):
        id = getattr(self.lib, f"llama_vocab_{name}")(self.vocab)
        return None if id < 0 else id


@pytest.fixture(scope="module", params=VOCABS)
def path(request, vocab_dir):
    path = (MODELS if request.param.startswith("stories") else vocab_dir) / request.param
    if not path.exists():
        pytest.skip(f"no {path.name}")
    return path


@pytest.fixture(scope="module")
def tok(path):
    from pyggml_adapt.ggml import GGUFReader

    return Tokenizer.from_metadata(GGUFReader(path).metadata)


@pytest.fixture(scope="module")
def ref(path):
    reference = Reference(path)
    yield reference
    reference.lib.llama_model_free(reference.model)


def test_expected_ids(tok, path):
    if not path.with_suffix(".gguf.inp").exists():
        pytest.skip("no expected ids")
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().splitlines()
    assert len(lines) >= len(texts) - 1 > 40
    for text, line in zip(texts, lines, strict=False):
        assert tok.encode(text, add_special=False) == [int(id) for id in line.split()], text


def test_random_text_equals_llama_cpp(tok, ref):
    rng = random.Random(1)
    special = [text for text, _ in tok._special][:60]
    for _ in range(2000):
        text = random_text(rng, special)
        for add, parse in ((False, False), (True, True)):
            ids = tok.encode(text, add_special=add, parse_special=parse)
            assert ids == ref.encode(text, add, parse), text
        for remove, unparse in ((False, False), (True, True)):
            text = tok.decode(ids, remove_special=remove, unparse_special=unparse)
            assert text == ref.decode(ids, remove, unparse), ids


def test_random_ids_equal_llama_cpp(tok, ref):
    rng = random.Random(2)
    for _ in range(1000):
        ids = [rng.randrange(tok.n_vocab) for _ in range(rng.randrange(20))]
        assert tok.decode(ids) == ref.decode(ids, False, False), ids


def test_pieces_equal_llama_cpp(tok, ref):
    for special in (False, True):
        ours = [tok.token_to_piece(id, special=special) for id in range(tok.n_vocab)]
        assert ours == [ref.piece(id, special) for id in range(tok.n_vocab)]


def test_special_ids_equal_llama_cpp(tok, ref):
    assert tok.n_vocab == ref.lib.llama_vocab_n_tokens(ref.vocab)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (ref.id("bos"), ref.id("eos"), ref.id("pad"))
    assert tok.add_bos == ref.lib.llama_vocab_get_add_bos(ref.vocab)
    assert tok.add_eos == ref.lib.llama_vocab_get_add_eos(ref.vocab)
    assert tok.eog_ids == {id for id in range(tok.n_vocab) if ref.lib.llama_vocab_is_eog(ref.vocab, id)}
