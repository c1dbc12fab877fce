"""Constraint: which tokens may follow, so that the text meets a JSON Schema, a regular expression or a grammar.

Source: llguidance (docs/syntax.md, docs/json_schema.md); llama.cpp grammars/README.md (GBNF)
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from pyggml_adapt.errors import ParameterError, TokenError
from pyggml_adapt.text.gbnf import is_gbnf, to_lark
from pyggml_adapt.text.json_schema import check as check_schema
from pyggml_adapt.text.tokenizer import Tokenizer

_WHITE_SPACE = r" |\n{1,2}[ \t]{0,20}"  # as in llama.cpp's grammars: without an end a model may go on with it for ever
_N_MESSAGE = 160  # characters of llguidance's messages
_N_STACK = 512 << 20  # bytes: the compiler goes down one level for each rule or reference in a row
_LARK = re.compile(r"(?m)^[ \t]*[?!]*start\b(?![ \t]*::=)")
_REGEX_PREFIX = re.compile(r'^at 1\(\d+\): (?:invalid regex ".*" \(in regex\): )?')
_OUTER = '%llguidance {"no_forcing": true}\nstart: @inner'  # no_forcing: see Constraint
_LIMITS = LLParserLimits(
    max_lexer_states=50_000, step_lexer_fuel=1_000_000, step_max_items=1_000_000, verbose_errors=False
)

_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[Tokenizer, LLTokenizer] = weakref.WeakKeyDictionary()


class Constraint:
    """What may follow what has been accepted.

    Any token is allowed whose bytes can be continued to a text that meets the constraint, however the tokenizer would
    cut that text, as in llama.cpp; a control token only where a Lark grammar names it.  The tokens that end a
    generation are all allowed exactly where the text is complete.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, text: str):
        """name: "json_schema", "regex" or "grammar".  The first use of a tokenizer takes up to a second.

        Raises: ParameterError if the text is not one, has what is not supported, or nothing meets it, or if the
        vocabulary has no token that ends a generation.
        """
        self._name = name
        if not tokenizer.eog_ids:
            raise ParameterError(f"{name}: the vocabulary has no token that ends a generation, so nothing could end")
        self._n_vocab, self._eog = tokenizer.n_vocab, np.array(sorted(tokenizer.eog_ids))
        try:
            grammar = json.dumps({"grammars": [{"lark_grammar": _OUTER}, {"name": "inner", **_SOURCES[name](text)}]})
            self._matcher = _compile(_tokenizer(tokenizer), grammar)
        except RecursionError as error:
            raise ParameterError(f"{name}: it is nested too deeply") from error
        if self._matcher.is_error():
            raise ParameterError(f"{name}: {self._reason()}")
        try:
            self.allowed()
        except TokenError as error:
            raise ParameterError(f"{name}: nothing meets it") from error

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def allowed(self) -> np.ndarray:
        """Return for each token of the vocabulary, bool, whether it may follow.

        Raises: TokenError if none may, or to find out takes more than llguidance's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if not self._matcher.is_error():
            allowed = np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(np.bool_)
            allowed[self._eog] = self.is_complete
            if allowed.any():
                return allowed
        raise TokenError(f"{self._name}: no token may follow, and the text is not complete: {self._reason()}")

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Return F32 logits with -inf for the tokens that may not follow.  Raises: as allowed()."""
        allowed = self.allowed()
        n = min(len(logits), len(allowed))
        masked = np.full_like(logits, -np.inf)
        np.copyto(masked[:n], logits[:n], where=allowed[:n])
        return masked

    def accept(self, token: int) -> None:
        """Take the next token.  Raises: TokenError if it may not follow."""
        if not self._matcher.consume_token(token):
            raise TokenError(f"{self._name}: token {token} may not follow: {self._reason()}")

    def _reason(self) -> str:
        return _reason(self._name, self._matcher.get_error())


class _Pieces:
    """A vocabulary as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer):
        n_vocab = tokenizer.n_vocab
        self.tokens = [tokenizer.token_to_piece(token, special=True) for token in range(n_vocab)]
        hidden = (token for token, piece in enumerate(self.tokens) if piece and not tokenizer.token_to_piece(token))
        self.special_token_ids = sorted({*hidden, *tokenizer.eog_ids})
        self.eos_token_id, self.bos_token_id = min(tokenizer.eog_ids), None

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("only constraints that force tokens ask how a text is cut")


def _tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """Return llguidance's form of a tokenizer, kept as long as that is: all its tokens are looked at."""
    with _lock:
        if tokenizer not in _known:
            pieces = TokenizerWrapper(_Pieces(tokenizer))
            _known[tokenizer] = LLTokenizer(pieces, eos_token=sorted(tokenizer.eog_ids))
        return _known[tokenizer]


def _compile(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Return the matcher, made in a thread whose stack is as large as the compiler may need."""
    made: list[LLMatcher] = []
    thread = threading.Thread(
        target=lambda: made.append(LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)), daemon=True
    )
    with _lock:
        before = threading.stack_size(_N_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return made[0]


def _json_schema(text: str) -> dict[str, object]:
    schema = json.loads(text)
    check_schema(schema)
    options = {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}}
    return {"json_schema": schema | options if isinstance(schema, dict) else schema}


def _regex(text: str) -> dict[str, object]:
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise ParameterError("regex: it ends within an escape")
    return {"lark_grammar": f"start: /{regex_to_lark(text, 'd')}/"}


def _grammar(text: str) -> dict[str, object]:
    if is_gbnf(text):
        return {"lark_grammar": to_lark(text)}
    if not _LARK.search(text):
        raise ParameterError("grammar: it has neither a rule root ::= as GBNF, nor a rule start: as Lark")
    return {"lark_grammar": text}


_SOURCES: dict[str, Callable[[str], dict[str, object]]] = {
    "json_schema": _json_schema,
    "regex": _regex,
    "grammar": _grammar,
}


def _reason(name: str, message: str) -> str:
    """Return what matters of a message of llguidance, in one line."""
    lines = [line for line in message.splitlines() if line.strip()] or ["it cannot be used"]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    if reason.startswith("NoExtension"):
        reason = "nothing can continue it"
    if "coerce_one_of" in reason:
        reason = "oneOf is supported only where its parts exclude each other"
    if name == "regex":
        reason = _REGEX_PREFIX.sub("", reason)
    return reason if len(reason) <= _N_MESSAGE else reason[: _N_MESSAGE - 3] + "..."
