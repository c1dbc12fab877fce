"""DRY ("don't repeat yourself"): penalties for tokens that would make a repeated sequence longer.

Source: llama.cpp src/llama-sampler.cpp, `llama_sampler_dry_apply`, `get_overlapping_token_sequences`
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np

MAX_BREAKER_NBYTES = 40  # what llama.cpp would cut off, we refuse
_MAX_TAIL = 20  # tokens
_LOG_MAX = 88.7228391  # of the largest float32: more than this no exponent may reach

Breakers: TypeAlias = Mapping[int, Sequence[tuple[int, ...]]]  # a breaker's first token -> what may follow, or ()


class Vocabulary(Protocol):
    """What is asked of a tokenizer."""

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of one token."""

    def decode(self, ids: Sequence[int], *, remove_special: bool = False, unparse_special: bool = False) -> str:
        """Return the text of tokens."""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a text."""


_known: weakref.WeakKeyDictionary[Vocabulary, dict[tuple[str, ...], Breakers]] = weakref.WeakKeyDictionary()


def find_breakers(vocabulary: Vocabulary, texts: tuple[str, ...]) -> Breakers:
    """Return the token sequences in which one of the texts begins: its first token -> the tokens after it.

    A token that has a whole text in it breaks alone: ().  Kept for each vocabulary, since all its tokens are looked at.
    """
    known = _known.setdefault(vocabulary, {})
    if texts not in known:
        found: dict[int, list[tuple[int, ...]]] = {}
        pieces = [vocabulary.token_to_piece(token, special=True) for token in range(vocabulary.n_vocab)]
        for text in texts:
            for token, tail in _overlaps(vocabulary, pieces, text.encode()):
                tails = found.setdefault(token, [])
                if tail not in tails:
                    tails.append(tail)
        known[texts] = found
    return known[texts]


def _overlaps(vocabulary: Vocabulary, pieces: Sequence[bytes], text: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield (token, tail) for each token in which the text, or a part of it that the tail completes, begins."""
    first = text[:1]
    for token, piece in enumerate(pieces):
        if first not in piece:
            continue
        word = _word(vocabulary, token, piece)
        if text in word:
            yield token, ()
            continue
        for n in range(1, min(len(text), len(word) + 1)):
            rest = text[n:]
            if word.endswith(text[:n]) and _begins_a_character(rest):
                tail = vocabulary.encode(rest.decode(), add_special=False, parse_special=False)
                yield token, tuple(tail[:_MAX_TAIL])


def _word(vocabulary: Vocabulary, token: int, piece: bytes) -> bytes:
    """Return a token's text when it is alone, without the spaces that some tokenizers then leave out."""
    if b" " not in piece:
        return piece
    word = vocabulary.decode([token], unparse_special=True)
    return piece if "\ufffd" in word else word.encode()


def _begins_a_character(data: bytes) -> bool:
    return data[0] & 0xC0 != 0x80


def dry_penalties(
    last: Sequence[int], breakers: Breakers, *, multiplier: float, base: float, allowed_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, F32 penalties) of the tokens that would make longer a sequence that `last` ends with again.

    last: the last tokens.  multiplier, base: taken as F32.
    """
    nothing = np.empty(0, np.int64), np.empty(0, np.float32)
    if len(last) <= allowed_length:
        return nothing
    limit = _limit(last[::-1], breakers)
    if limit < allowed_length:
        return nothing
    back = np.asarray(last, dtype=np.int64)[::-1]
    base = float(np.float32(base))
    max_exponent = int(np.float32(_LOG_MAX) / np.float32(math.log(base))) if base > np.float32(1.000001) else 0
    n_most = min(limit, allowed_length + max_exponent) if max_exponent or base == 1.0 else limit  # more weigh the same
    lengths = _repeat_lengths(back, n_most)
    is_long = lengths >= allowed_length
    following, lengths = back[:-1][is_long], lengths[is_long]
    ids, places = np.unique(following, return_inverse=True)
    longest = np.zeros(len(ids), dtype=np.int64)
    np.maximum.at(longest, places, lengths)
    is_penalized = np.array([() not in breakers.get(token, ()) for token in ids.tolist()], dtype=bool)
    exponents = (longest[is_penalized] - allowed_length).tolist()
    with np.errstate(over="ignore"):  # an infinite penalty forbids the token
        penalties = np.array([np.float32(multiplier) * np.float64(base) ** n for n in exponents]).astype(np.float32)
    return ids[is_penalized], penalties


def _limit(back: Sequence[int], breakers: Breakers) -> int:
    """Return how long a repeated sequence may be, so that it does not go across the last breaker.

    back: the last tokens, the last one first.
    """
    for i, token in enumerate(back if breakers else ()):
        if token not in breakers:
            continue
        matches = [
            len(tail)
            for tail in breakers[token]
            if len(tail) <= i and all(back[i - 1 - at] == other for at, other in enumerate(tail))
        ]
        if matches:
            return i - max(matches)
    return len(back)


def _repeat_lengths(back: np.ndarray, n_most: int) -> np.ndarray:
    """Return for k = 1, 2, ... how many tokens that end k tokens before the end are those that end there.

    back: the last tokens, the last one first.  n_most: no more are counted.
    """
    n = len(back)
    lengths = np.zeros(n - 1, dtype=np.int64)
    alike = np.arange(1, n)  # the k's that are not yet known to differ
    for at in range(min(n_most, n - 1)):
        alike = alike[: np.searchsorted(alike, n - at)]  # ascending: the end of the window is reached by the last ones
        alike = alike[back[alike + at] == back[at]]
        if not len(alike):
            break
        lengths[alike - 1] += 1
    return lengths
