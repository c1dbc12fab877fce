"""Perplexity, against llama.cpp's logits put through llama-perplexity's formula, and as a command."""

import json
import math

import numpy as np
import pytest
from reference import Reference

import pyggml_adapt as pga
from pyggml_adapt.cli.main import main
from pyggml_adapt.errors import AdaptorError, ParameterError

WORDS = ["Once", "upon", "a", "time", "the", "earth", "in", "sea", "tea", "he", "ate", "toast", "on", "heath"]


def words(n, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def from_llama_cpp(path, ids, n_ctx, bos):
    """Return the perplexity as tools/perplexity computes it, and its error: each piece in one batch, in F64."""
    loss = []
    with Reference(path, n_ctx=n_ctx, n_threads=1) as reference:
        for start in range(0, len(ids) - n_ctx + 1, n_ctx):
            chunk = ids[start : start + n_ctx]
            reference.rewind(0)
            first = n_ctx // 2
            logits = reference.decode([bos, *chunk[1:]], range(n_ctx), [0] * n_ctx, range(first, n_ctx))
            for j in range(first, n_ctx - 1):
                row = logits[j - first].astype(np.float64) - logits[j - first].max()
                loss.append(math.log(np.exp(row).sum()) - row[chunk[j + 1]])
    mean, square = np.mean(loss), np.mean(np.square(loss))
    return math.exp(mean), math.exp(mean) * math.sqrt((square - mean**2) / (len(loss) - 1)), len(loss)


@pytest.fixture(scope="module")
def path(tiny_gguf):
    return tiny_gguf(type="Q8_0", n_layer=2)


@pytest.mark.parametrize("n_ctx", [32, 75])
def test_equal_to_llama_perplexity(path, n_ctx):
    text = words(200)
    with pga.Host(path, n_threads=1) as host:
        seen = []
        found = pga.perplexity(host, text, n_ctx=n_ctx, on_chunk=lambda *args: seen.append(args))
        ids = host.tokenize(text)
    value, error, n_tokens = from_llama_cpp(path, ids, n_ctx, ids[0])
    # the logits are equal; sums over the vocabulary are of F32 here
    assert found.value == pytest.approx(value, rel=1e-6)
    assert found.error == pytest.approx(error, rel=1e-5)
    assert (found.task, found.n_tokens, found.n_ctx) == ("base", n_tokens, n_ctx)
    assert found.n_chunks == len(ids) // n_ctx
    assert [each[:2] for each in seen] == [(i + 1, found.n_chunks) for i in range(found.n_chunks)]
    assert seen[-1][2] == pytest.approx(found.value)


def test_the_first_pieces_only(path):
    with pga.Host(path, n_threads=1) as host:
        one = pga.perplexity(host, words(200), n_ctx=32, max_chunks=1)
        assert (one.n_chunks, one.n_tokens) == (1, 15)
        assert one.value != pga.perplexity(host, words(200), n_ctx=32).value


@pytest.mark.parametrize(("options", "message"), [
    ({"n_ctx": 3}, "n_ctx = 3 is not from 4 to"),
    ({"n_ctx": 512}, r"the text has \d+ tokens: perplexity with n_ctx = 512 needs 1024"),
    ({"max_chunks": 0}, "max_chunks = 0 is not from 1 to"),
])  # fmt: skip
def test_what_cannot_be(path, options, message):
    with pga.Host(path, n_threads=1) as host, pytest.raises(ParameterError, match=f"^{message}"):
        pga.perplexity(host, words(50), **{"n_ctx": 8, **options})


def test_unknown_task(path):
    with pga.Host(path, n_threads=1) as host, pytest.raises(AdaptorError, match="unknown task 'x'"):
        pga.perplexity(host, words(50), task="x", n_ctx=8)


def test_command(path, tiny_gguf, tmp_path, capsys):
    """A table of all tasks; JSON of those that are asked for."""
    other = tiny_gguf(type="Q8_0", n_layer=2, changed={"attn_q": 3})
    report = pga.split({"one": path, "two": other}, tmp_path / "split")
    text = tmp_path / "text.txt"
    text.write_text(words(100))
    host = ["-m", str(report.foundation), *(f"-a{task}={file}" for task, file in report.adaptors.items()), "-t1"]
    assert main(["perplexity", *host, "-f", str(text), "-c", "16"]) == 0
    table = capsys.readouterr().out
    assert "perplexity" in table and "one" in table and "two" in table
    assert main(["perplexity", *host, "-f", str(text), "-c", "16", "--task", "two", "--chunks", "3", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tasks"]
    with pga.Host(other, n_threads=1) as alone:
        want = pga.perplexity(alone, words(100), n_ctx=16, max_chunks=3)
    assert (found["task"], found["value"], found["n_chunks"]) == ("two", want.value, 3)
    text.write_bytes(b"ab\xff")
    assert main(["perplexity", *host, "-f", str(text)]) == 1
    assert capsys.readouterr().err == f"pyggml-adapt: error: {text}: the text is not UTF-8 at byte 2\n"
