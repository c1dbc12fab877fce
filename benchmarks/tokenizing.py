"""Bytes of text per second through the tokenizers, and how long a vocabulary takes to be ready."""

from __future__ import annotations

import ctypes
from typing import Any

from engines import llama_cpp  # which it keeps quiet
from speed import seconds
from text import STYLES, make_text

from pyggml_adapt.ggml import GGUFReader
from pyggml_adapt.text import Tokenizer

N_BYTES = 1_000_000  # of all styles together


class Ours:
    """The tokenizer of a file."""

    name = "pyggml_adapt"

    def __init__(self, path: str):
        """path: of a GGUF file."""
        with GGUFReader(path) as reader:
            self.tokenizer = Tokenizer.from_metadata(reader.metadata)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.tokenizer.encode(text, add_special=False)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(ids)

    def close(self) -> None:
        """Free nothing: there is nothing that has to be."""


class Llama:
    """llama.cpp's, by its C functions; what is between these and Python is no loop over bytes or tokens."""

    name = "llama.cpp"

    def __init__(self, path: str):
        """path: of a GGUF file."""
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        data = text.encode()
        out = (llama_cpp.llama_token * (len(data) + 16))()
        return out[: llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), False, False)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        out = ctypes.create_string_buffer(64 * len(ids))
        n = llama_cpp.llama_detokenize(self.vocab, tokens, len(ids), out, len(out), False, False)
        return out.raw[:n].decode(errors="replace")

    def close(self) -> None:
        """Free the vocabulary."""
        llama_cpp.llama_model_free(self._model)


def _round(kind: type[Ours] | type[Llama], path: str, texts: list[dict[str, str]]) -> tuple[dict[str, Any], list[int]]:
    """Return the ms until a new tokenizer is ready and the MB/s that it makes of texts, and the ids of the last."""
    engines = []
    ready = seconds(lambda: engines.append(kind(path)))
    engine, ids = engines[0], []
    found: dict[str, Any] = {"ready": ready * 1e3}
    for when, by_style in zip(("first", "later"), texts, strict=True):
        taken = {style: seconds(lambda text=text: ids.append(engine.encode(text))) for style, text in by_style.items()}
        sizes = {style: len(text.encode()) for style, text in by_style.items()}
        found[when] = {style: sizes[style] / taken[style] / 1e6 for style in taken}
        found[when]["all"] = sum(sizes.values()) / sum(taken.values()) / 1e6
    found["decode"] = N_BYTES / seconds(lambda: [engine.decode(each) for each in ids[-len(STYLES) :]]) / 1e6
    engine.close()
    return found, ids


def tokenizing(path: str, rounds: int) -> dict[str, Any]:
    """Return each round's figures by engine, which take turns, and whether their ids are equal.

    Each round has a new tokenizer; "first": of the first MB of text that it gets; "later": of another, like the first.
    """
    found: dict[str, Any] = {kind.name: [] for kind in (Ours, Llama)}
    equal = True
    for i in range(rounds):
        texts = [
            {style: make_text(style, N_BYTES // len(STYLES), seed) for style in STYLES} for seed in (2 * i, 2 * i + 1)
        ]
        ids = []
        for kind in (Ours, Llama)[:: 1 - i % 2 * 2]:
            figures, encoded = _round(kind, path, texts)
            found[kind.name].append(figures)
            ids.append(encoded)
        equal = equal and ids[0] == ids[1]
    return {"rounds": found, "equal_ids": equal}
