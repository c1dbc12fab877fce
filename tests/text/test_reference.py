"""Tokenizers against llama.cpp: its vocabularies with the expected ids beside them, and its own functions."""

import random
from pathlib import Path

import pytest
from llama_tokenizer import Reference, assert_equal, random_text, write_gemma_vocab

from pyggml_adapt.ggml import GGUFReader
from pyggml_adapt.text import Tokenizer

MODELS = Path(__file__).parents[3] / "shared" / "models"
VOCABS = [
    "ggml-vocab-baichuan.gguf",
    "ggml-vocab-command-r.gguf",
    "ggml-vocab-deepseek-coder.gguf",
    "ggml-vocab-deepseek-llm.gguf",
    "ggml-vocab-falcon.gguf",
    "ggml-vocab-gpt-2.gguf",
    "ggml-vocab-gpt-neox.gguf",
    "ggml-vocab-llama-bpe.gguf",
    "ggml-vocab-llama-spm.gguf",
    "ggml-vocab-mpt.gguf",
    "ggml-vocab-phi-3.gguf",
    "ggml-vocab-qwen2.gguf",
    "ggml-vocab-qwen35.gguf",
    "ggml-vocab-refact.gguf",
    "ggml-vocab-starcoder.gguf",
    "stories260K-base-q8_0.gguf",
]


@pytest.fixture(scope="module", params=VOCABS)
def path(request, vocab_dir):
    path = (MODELS if request.param.startswith("stories") else vocab_dir) / request.param
    if not path.exists():
        pytest.skip(f"no {path.name}")
    return path


@pytest.fixture(scope="module")
def tok(path):
    return Tokenizer.from_metadata(GGUFReader(path).metadata)


@pytest.fixture(scope="module")
def ref(path):
    reference = Reference(path)
    yield reference
    reference.close()


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
    special = [text for text, _ in tok._special.tokens][:60]
    for _ in range(400):
        assert_equal(tok, ref, random_text(rng, special))


def test_gemma_equals_llama_cpp(vocab_dir, tmp_path):
    path = tmp_path / "gemma.gguf"
    n_user_defined = write_gemma_vocab(path, vocab_dir / "ggml-vocab-gemma-4.gguf")
    with GGUFReader(path) as reader:
        tok, ref = Tokenizer.from_metadata(reader.metadata), Reference(path)
    assert n_user_defined == len(tok._user_defined.tokens) + 2 == 6368  # two end a generation
    assert tok.encode("a b\n\n\n<b>", add_special=False) == ref.encode("a b\n\n\n<b>", False, False)
    rng = random.Random(3)
    special = [text for text, _ in tok._special.tokens]
    for _ in range(150):
        assert_equal(tok, ref, random_text(rng, special))
    ref.close()


def test_random_ids_equal_llama_cpp(tok, ref):
    rng = random.Random(2)
    for _ in range(200):
        ids = [rng.randrange(tok.n_vocab) for _ in range(rng.randrange(20))]
        assert tok.decode(ids) == ref.decode(ids, False, False), ids


def test_pieces_equal_llama_cpp(tok, ref):
    ids = sorted({*range(0, tok.n_vocab, 7), *range(min(300, tok.n_vocab)), *(id for _, id in tok._special.tokens)})
    for special in (False, True):
        assert [tok.token_to_piece(id, special=special) for id in ids] == [ref.piece(id, special) for id in ids]


def test_special_ids_equal_llama_cpp(tok, ref):
    assert tok.n_vocab == ref.lib.llama_vocab_n_tokens(ref.vocab)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (ref.id("bos"), ref.id("eos"), ref.id("pad"))
    assert tok.add_bos == ref.lib.llama_vocab_get_add_bos(ref.vocab)
    assert tok.add_eos == ref.lib.llama_vocab_get_add_eos(ref.vocab)
    assert tok.eog_ids == {id for id in range(tok.n_vocab) if ref.lib.llama_vocab_is_eog(ref.vocab, id)}
