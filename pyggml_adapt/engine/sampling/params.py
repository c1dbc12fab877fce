"""SamplerParams: how tokens are drawn, checked once.

Source: llama.cpp common/common.h, `common_params_sampling` (defaults); tools/server/README.md (names)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, cast

from pyggml_adapt.engine.sampling.dry import MAX_BREAKER_NBYTES
from pyggml_adapt.errors import ParameterError

MAX_BIAS = 1e6
_CONSTRAINTS = {"json_schema": 1 << 17, "regex": 1 << 13, "grammar": 1 << 16}  # name -> bytes at most
_MAX_COUNT = 1 << 30
_LIMITS: tuple[tuple[str, type[Any], float, float], ...] = (
    ("temperature", Real, 0, 10000),
    ("top_k", Integral, 0, _MAX_COUNT),
    ("top_p", Real, 0, 1),
    ("min_p", Real, 0, 1),
    ("repeat_penalty", Real, 0.0001, 10000),
    ("repeat_last_n", Integral, -1, _MAX_COUNT),
    ("frequency_penalty", Real, -10000, 10000),
    ("presence_penalty", Real, -10000, 10000),
    ("dry_multiplier", Real, 0, 10000),
    ("dry_base", Real, 1, 10000),
    ("dry_allowed_length", Integral, 0, _MAX_COUNT),
    ("dry_penalty_last_n", Integral, -1, _MAX_COUNT),
    ("top_n_sigma", Real, -1, 10000),
    ("typical_p", Real, 0, 1),
    ("xtc_probability", Real, 0, 1),
    ("xtc_threshold", Real, 0, 1),
    ("dynatemp_range", Real, 0, 10000),
    ("dynatemp_exponent", Real, 0, 10000),
    ("mirostat_tau", Real, 0, 10000),
    ("mirostat_eta", Real, 0, 10000),
    ("min_keep", Integral, 0, _MAX_COUNT),
)


@dataclass(frozen=True, slots=True)
class SamplerParams:
    """How the next token is drawn; names and defaults are llama.cpp's, and so are order and meaning of the steps.

    The steps, in order: logit_bias, penalties, DRY, top_n_sigma, top_k, typical_p, top_p, min_p, XTC, temperature.

    temperature: 0 takes the most probable token.  top_k: 0 keeps all.  top_p: 1 keeps all.  min_p: 0 keeps all.
    repeat_penalty: 1 for none.  repeat_last_n: tokens that the penalties look back at, -1 for all.
    seed: None draws a new one each time.
    logit_bias: token id -> what is added to its logit, -inf to forbid it; kept as pairs in the order of ids.
    frequency_penalty, presence_penalty: subtracted for each occurrence of a token, and once; 0 for none.
    dry_multiplier: 0 for no DRY, which subtracts multiplier * base ** (length - allowed length) from the logit of a
    token that would make a repeated sequence longer.  dry_penalty_last_n: tokens that it looks back at, -1 for all.
    dry_sequence_breakers: texts that no repeated sequence goes across, of at most 40 bytes.
    top_n_sigma: keeps logits within so many standard deviations of the largest; 0 or less keeps all.
    typical_p: 1 keeps all.  xtc_probability: of leaving out all but the least probable of the tokens that are at least
    as probable as xtc_threshold; a threshold over 0.5 leaves out none.
    dynatemp_range: the temperature is taken from as much below to as much above, by entropy; 0 for a fixed one.
    mirostat: 2 for Mirostat 2.0, which aims at mirostat_tau bits of surprise at the rate mirostat_eta, in place of all
    steps but logit_bias and temperature; 0 for none.
    min_keep: tokens that typical_p, top_p, min_p and XTC keep at least.
    json_schema, regex, grammar: at most one of them, which the whole output then meets; tokens that would not do are
    left out before all steps.  json_schema: a JSON Schema as a dictionary or as text, True for any JSON; kept as text.
    grammar: GBNF or llguidance's Lark.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    top_n_sigma: float = -1.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    min_keep: int = 0
    json_schema: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, kind, least, most in _LIMITS:
            value = getattr(self, name)
            if not _is(value, kind) or not least <= value <= most:
                what = "a number" if kind is Real else "a whole number"
                raise ParameterError(f"{name} = {value!r} is not {what} from {least} to {most}")
        if self.seed is not None and not (_is(self.seed, Integral) and 0 <= self.seed < 1 << 64):
            raise ParameterError(f"seed = {self.seed!r} is not a whole number from 0 to 2**64 - 1")
        if not _is(self.mirostat, Integral) or self.mirostat not in (0, 2):
            raise ParameterError(f"mirostat = {self.mirostat!r} is neither 0 nor 2, the version that there is")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        object.__setattr__(self, "dry_sequence_breakers", _breakers(self.dry_sequence_breakers))
        object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        _check_constraints({name: getattr(self, name) for name in _CONSTRAINTS})

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Token ids, ascending, and what is added to their logits."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)  # as __post_init__ has left it

    @property
    def constraint(self) -> tuple[str, str] | None:
        """What the output must meet: "json_schema", "regex" or "grammar", and its text; None for anything."""
        given = ((name, getattr(self, name)) for name in _CONSTRAINTS)
        return next(((name, text) for name, text in given if text is not None), None)

    @property
    def penalizes(self) -> bool:
        """Whether there are penalties for repeated tokens."""
        is_off = self.repeat_penalty == 1.0 and self.frequency_penalty == 0.0 and self.presence_penalty == 0.0
        return not (is_off or self.repeat_last_n == 0 or self.mirostat)

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raise ParameterError for a bias of a token that is not there."""
        for token, _ in self.biases:
            if token >= n_vocab:
                raise ParameterError(f"logit_bias: token {token} is not in the vocabulary of {n_vocab}")

    @property
    def has_dry(self) -> bool:
        """Whether there are penalties for repeated sequences."""
        return self.dry_multiplier > 0.0 and self.dry_penalty_last_n != 0 and not self.mirostat


def _is(value: object, kind: type[Any]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _bias_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """Return pairs of token id and bias, in the order of ids."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    try:
        given = [(token, value) for token, value in pairs]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ParameterError(f"logit_bias = {bias!r} is not a mapping of token ids to numbers") from None
    for token, value in given:
        if not _is(token, Integral) or not 0 <= token < 1 << 31:
            raise ParameterError(f"logit_bias: {token!r} is not a token id")
        if not _is(value, Real) or not (-MAX_BIAS <= value <= MAX_BIAS or value == -math.inf):
            raise ParameterError(
                f"logit_bias: {value!r}, of token {token}, is neither a number from {-MAX_BIAS:.0f} to {MAX_BIAS:.0f} "
                "nor -inf"
            )
    if len({token for token, _ in given}) < len(given):
        raise ParameterError("logit_bias: a token is given twice")
    return tuple(sorted((int(token), float(value)) for token, value in given))


def _breakers(texts: object) -> tuple[str, ...]:
    """Return the texts, checked."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ParameterError(f"dry_sequence_breakers = {texts!r} is not a list of texts")
    for text in texts:
        try:
            nbytes = len(text.encode())
        except UnicodeEncodeError:
            raise ParameterError(f"dry_sequence_breakers: {text!r} has a lone surrogate") from None
        if not 0 < nbytes <= MAX_BREAKER_NBYTES:
            raise ParameterError(
                f"dry_sequence_breakers: {text!r} is of {nbytes} bytes, not of 1 to {MAX_BREAKER_NBYTES}"
            )
    return tuple(texts)


def _schema_text(schema: object) -> str | None:
    """Return a JSON Schema as text; True is the schema that all JSON meets."""
    if schema is None:
        return None
    if not isinstance(schema, Mapping | str | bool):
        raise ParameterError(f"json_schema: {type(schema).__name__} is neither a dictionary, text, nor True")
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"json_schema: it is not JSON: {error}") from None
    if not isinstance(value, Mapping | bool):
        raise ParameterError("json_schema: the text is JSON, but neither an object nor true or false")
    return "{}" if value is True else text


def _check_constraints(given: Mapping[str, object]) -> None:
    """Raise ParameterError if there is more than one, or one that is no text, or too long."""
    texts = {name: text for name, text in given.items() if text is not None}
    if len(texts) > 1:
        raise ParameterError(f"{' and '.join(texts)} are given: the output can meet one of them only")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ParameterError(f"{name}: {type(text).__name__} is not text")
        try:
            nbytes = len(text.encode())
        except UnicodeEncodeError:
            raise ParameterError(f"{name}: it has a lone surrogate") from None
        if nbytes > _CONSTRAINTS[name]:
            raise ParameterError(f"{name}: it has {nbytes} bytes, more than {_CONSTRAINTS[name]}")
