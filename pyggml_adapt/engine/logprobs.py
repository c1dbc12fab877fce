"""Log-probabilities of tokens under the model's own distribution: softmax of the logits as they were evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.engine.parameters import count
from pyggml_adapt.engine.sampling.steps import largest
from pyggml_adapt.errors import TokenError

MAX_TOP = 100  # of the most probable tokens that may be asked for


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most probable tokens: its id, its bytes, and the natural logarithm of its probability."""

    token: int
    bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        """Return the bytes as text; those that are not UTF-8, as of a part of a character, become U+FFFD."""
        return self.bytes.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of a text, and what the model expected in its place.

    bytes: the token's, of a special token its name; empty where a session knows token ids only.
    logprob: the natural logarithm of its probability; None for the first token of a text: nothing is before it.
    top: the most probable tokens, in descending order; of equal ones the lower id first.
    """

    token: int
    bytes: bytes
    logprob: float | None
    top: tuple[TopLogprob, ...]

    @property
    def text(self) -> str:
        """Return the bytes as text; those that are not UTF-8, as of a part of a character, become U+FFFD."""
        return self.bytes.decode(errors="replace")


class Scorer:
    """Makes TokenLogprobs with the n_top most probable tokens each."""

    def __init__(self, n_top: int, piece_of: Callable[[int], bytes] | None = None):
        """piece_of: returns a token's bytes.  Raises: ParameterError unless n_top is from 0 to MAX_TOP."""
        self._n_top = count("logprobs", n_top, least=0, most=MAX_TOP)
        self._piece_of = piece_of or _no_piece

    def first(self, token: int) -> TokenLogprob:
        """Return a token that nothing is before."""
        return TokenLogprob(token, self._piece_of(token), None, ())

    def score(self, logits: np.ndarray, token: int) -> TokenLogprob:
        """Return a token that follows from logits, F32 [n_vocab], which are not changed.

        Raises: TokenError if the logits give no probabilities, since all are -inf or one is not a number.
        """
        most = logits.max()
        if not -np.inf < most < np.inf:
            raise TokenError(f"there are no log-probabilities: the largest logit is {most}")
        powers = logits - most
        np.exp(powers, out=powers)
        log_sum = float(most) + math.log(float(powers.sum(dtype=np.float64)))
        n = min(self._n_top, len(logits))
        best = largest(logits, n).tolist() if n else ()
        top = tuple(TopLogprob(i, self._piece_of(i), float(logits[i]) - log_sum) for i in best)
        return TokenLogprob(token, self._piece_of(token), float(logits[token]) - log_sum, top)


def _no_piece(token: int) -> bytes:
    return b""
