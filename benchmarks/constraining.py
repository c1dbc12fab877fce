"""What constrained output and log-probabilities cost a token, with llama.cpp's grammars beside ours."""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from engines import llama_cpp
from llama_cpp.llama_grammar import json_schema_to_gbnf
from sampling import peaked_logits
from speed import seconds
from text import make_text
from tokenizing import Llama, Ours

from pyggml_adapt.engine.logprobs import Scorer
from pyggml_adapt.text.constraint import Constraint

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "kind": {"enum": ["note", "task", "event"]},
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}, "done": {"type": "boolean"}},
                    "required": ["name", "n", "done"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["title", "kind", "items"],
        "additionalProperties": False,
    }
)
REGEX = r"[A-Z][a-z]{2,20} \d{1,4}-\d{2}: (yes|no|unknown)"
GRAMMAR = 'root ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" root ")"'
N_TOP = (0, 5, 20)  # of the most probable tokens, whose log-probabilities are wanted
N_CHECKED = 8  # of the document's tokens llama.cpp's whole mask is measured at every so many: it takes long


def _document() -> str:
    """Return JSON that meets SCHEMA."""
    rng = random.Random(3)
    items = [
        {"name": make_text("prose", 20, i).strip(), "n": rng.randrange(9999), "done": rng.random() < 0.5}
        for i in range(12)
    ]
    return json.dumps({"title": make_text("prose", 60, 99).strip(), "kind": "task", "items": items})


class _LlamaGrammar:
    """llama.cpp's sampler for a grammar."""

    def __init__(self, vocab: object, n_vocab: int, grammar: str):
        self._sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        if not self._sampler:
            raise RuntimeError("llama.cpp does not take the grammar")
        self._data = (llama_cpp.llama_token_data * n_vocab)(*((i, 0.0, 0.0) for i in range(n_vocab)))

    def mask(self) -> None:
        """Look at every token of the vocabulary."""
        self._apply(self._data, len(self._data))

    def check(self, token: int) -> bool:
        """Look at one token."""
        one = (llama_cpp.llama_token_data * 1)((token, 0.0, 0.0))
        self._apply(one, 1)
        return one[0].logit == 0.0

    def _apply(self, data: ctypes.Array, n: int) -> None:
        array = llama_cpp.llama_token_data_array(data, n, -1, False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))

    def accept(self, token: int) -> None:
        """Take the next token."""
        llama_cpp.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        """Free the sampler."""
        llama_cpp.llama_sampler_free(self._sampler)


def _ms(call: Callable[[], object], rounds: int) -> float:
    return median(seconds(call) for _ in range(rounds)) * 1e3


def constraining(path: str, rounds: int) -> dict[str, Any]:
    """Return ms of setting up, microseconds a token of masks beside llama.cpp's, and of log-probabilities.

    path: of a vocabulary.  The text is a document that meets the schema; both look at its tokens one by one.
    """
    ours, llama = Ours(path), Llama(path)
    tokenizer, n_vocab = ours.tokenizer, ours.tokenizer.n_vocab
    vocabulary = seconds(lambda: Constraint(tokenizer, "regex", "a")) * 1e3
    sources = {"json_schema": SCHEMA, "regex": REGEX, "grammar": GRAMMAR}
    compiled = {
        name: _ms(lambda name=name, text=text: Constraint(tokenizer, name, text), rounds)
        for name, text in sources.items()
    }
    tokens = ours.encode(_document())
    logits = list(peaked_logits(n_vocab, 16))
    us = _mask_us(Constraint(tokenizer, "json_schema", SCHEMA), tokens, logits)
    us |= _llama_us(_LlamaGrammar(llama.vocab, n_vocab, json_schema_to_gbnf(SCHEMA)), tokens)
    scorers = {n: Scorer(n, lambda token: tokenizer.token_to_piece(token, special=True)) for n in N_TOP}
    scores = {
        str(n): median(seconds(lambda row=row, scorer=scorer: scorer.score(row, 300)) for row in logits * rounds) * 1e6
        for n, scorer in scorers.items()
    }
    llama.close()
    return {"n_vocab": n_vocab, "n_tokens": len(tokens), "vocabulary_ms": vocabulary - compiled["regex"],
            "compile_ms": compiled, "us": us, "logprobs_us": scores}  # fmt: skip


def _mask_us(constraint: Constraint, tokens: list[int], logits: list[np.ndarray]) -> dict[str, Any]:
    """Return the median and the longest of our masks, and the median of taking a token."""
    masks, accepts = [], []
    for i, token in enumerate(tokens):
        row = logits[i % len(logits)]
        masks.append(seconds(lambda row=row: constraint.mask(row)))
        accepts.append(seconds(lambda token=token: constraint.accept(token)))
    if not constraint.is_complete:
        raise RuntimeError("the document does not meet the schema")
    us = {"mask": median(masks), "longest mask": max(masks), "accept": median(accepts)}
    return {f"ours, {name}": taken * 1e6 for name, taken in us.items()}


def _llama_us(grammar: _LlamaGrammar, tokens: list[int]) -> dict[str, Any]:
    """Return the same of llama.cpp's, and the median of looking at the one token that was drawn."""
    masks, checks, accepts = [], [], []
    for i, token in enumerate(tokens):
        if i % N_CHECKED == 0:
            masks.append(seconds(grammar.mask))
        checks.append(seconds(lambda token=token: grammar.check(token)))
        if not grammar.check(token):
            raise RuntimeError(f"llama.cpp's grammar refuses token {i} of the document")
        accepts.append(seconds(lambda token=token: grammar.accept(token)))
    grammar.close()
    us = {"mask": median(masks), "longest mask": max(masks), "one token": median(checks), "accept": median(accepts)}
    return {f"llama.cpp, {name}": taken * 1e6 for name, taken in us.items()}
