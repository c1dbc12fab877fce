"""Sampler: the chain of steps, in llama.cpp's order, and the draw, which is ours.

Source: llama.cpp common/sampling.cpp, `common_sampler_init` (order); src/llama-sampler.cpp, `mirostat_v2`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pyggml_adapt.engine.sampling import steps
from pyggml_adapt.engine.sampling.dry import Breakers, dry_penalties
from pyggml_adapt.engine.sampling.params import SamplerParams
from pyggml_adapt.engine.sampling.steps import Candidates
from pyggml_adapt.errors import TokenError

_NO_BREAKERS: Breakers = {}


class Constraint(Protocol):
    """What is asked of what the output must meet."""

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Return F32 logits with -inf for the tokens that may not follow.  Raises: TokenError if none may."""

    def accept(self, token: int) -> None:
        """Take the next token."""


def uniform(seed: int | None) -> Callable[[], float]:
    """Return a function that returns numbers from 0 to below 1; a seed's are the same on all platforms and versions.

    They are the upper 53 bits of what PCG64, seeded through SeedSequence, gives: NumPy keeps both as they are, but not
    what its Generator makes of them.
    """
    bits = np.random.PCG64(seed)
    return lambda: (int(bits.random_raw()) >> 11) * 2.0**-53


class Sampler:
    """Draws the tokens of one generation: the parameters, random numbers, and what Mirostat has learnt."""

    def __init__(
        self,
        params: SamplerParams,
        breakers: Breakers = _NO_BREAKERS,
        random: Callable[[], float] | None = None,
        constraint: Constraint | None = None,
    ):
        """breakers: DRY's, as find_breakers() returns them.  random: by default uniform() of the seed.

        constraint: of this generation only; it is given each token that is drawn.
        """
        self.params = params
        self._constraint = constraint
        self.mu = np.float32(2 * params.mirostat_tau)
        self._breakers = breakers
        self._ids = np.arange(0)  # of the whole vocabulary
        self._random = uniform(params.seed) if random is None else random
        keeps_best = params.mirostat or (
            params.typical_p >= 1.0 and not self._has_xtc and params.dynatemp_range == 0.0
        )  # of all steps only these may take the largest logit away, or not end with it
        self._is_greedy = params.temperature == 0.0 and keeps_best

    @property
    def _has_xtc(self) -> bool:
        return self.params.xtc_probability > 0.0 and np.float32(self.params.xtc_threshold) <= 0.5

    def sample(self, logits: np.ndarray, recent: Sequence[int]) -> int:
        """Return the next token id.  logits: F32 [n_vocab], not changed.  recent: the tokens so far.

        Raises: TokenError if the logits leave none, since all are -inf or one is not a number, or the constraint does.
        """
        token = self._sample(logits, recent)
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _sample(self, logits: np.ndarray, recent: Sequence[int]) -> int:
        if self._is_greedy:
            logits = self._adjust(logits, recent)
            best = int(np.argmax(logits))
            _check(logits[best])
            return best
        ids, probs = self.candidates(logits, recent)
        index = self._draw(probs)
        if self.params.mirostat:
            error = steps.surprise(probs[index]) - np.float32(self.params.mirostat_tau)
            self.mu -= np.float32(self.params.mirostat_eta) * error
        return int(ids[index])

    def candidates(self, logits: np.ndarray, recent: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of the tokens that are left, and the probabilities, F32, that each is drawn with.

        If XTC is on, it takes one random number.  Raises: as sample().
        """
        logits = self._adjust(logits, recent)
        _check(logits.max())
        with np.errstate(over="ignore", invalid="ignore"):  # a penalty may make logits so small that these overflow
            if self.params.mirostat:
                candidates = steps.temperature(self._all(logits), self.params.temperature)
                candidates = steps.below_surprise(candidates, self.mu)
                return candidates.ids, steps.softmax(candidates)
            candidates = self._filter(logits)
            return candidates.ids, steps.final_softmax(candidates)

    def _adjust(self, logits: np.ndarray, recent: Sequence[int]) -> np.ndarray:
        """Return logits of the tokens that may follow, with biases, penalties, and DRY's penalties."""
        p = self.params
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        if p.biases:
            logits = steps.bias(logits, p.biases)
        if p.penalizes:
            last = _last(recent, p.repeat_last_n)
            logits = steps.penalize(logits, last, p.repeat_penalty, p.frequency_penalty, p.presence_penalty)
        if p.has_dry:
            ids, penalties = dry_penalties(
                _last(recent, p.dry_penalty_last_n),
                self._breakers,
                multiplier=p.dry_multiplier,
                base=p.dry_base,
                allowed_length=p.dry_allowed_length,
            )
            logits = steps.subtract(logits, ids, penalties)
        return logits

    def _all(self, logits: np.ndarray) -> Candidates:
        if len(self._ids) != len(logits):
            self._ids = np.arange(len(logits))
        return Candidates(self._ids, logits)

    def _filter(self, logits: np.ndarray) -> Candidates:
        """Return the candidates with their temperature."""
        p = self.params
        logits = steps.top_n_sigma(logits, p.top_n_sigma)
        candidates = steps.top_k(self._all(logits), p.top_k)
        candidates = steps.typical_p(candidates, p.typical_p, p.min_keep)
        candidates = steps.top_p(candidates, p.top_p, p.min_keep)
        candidates = steps.min_p(candidates, p.min_p, p.min_keep)
        if self._has_xtc and len(candidates.ids) > 1 and self._random() <= p.xtc_probability:
            candidates = steps.xtc(candidates, p.xtc_threshold, p.min_keep)
        if p.dynatemp_range > 0.0:
            return steps.dynamic_temperature(candidates, p.temperature, p.dynatemp_range, p.dynatemp_exponent)
        return steps.temperature(candidates, p.temperature)

    def _draw(self, probs: np.ndarray) -> int:
        """Return the index of one of the probabilities, drawn with one random number."""
        sums = np.cumsum(probs, dtype=np.float64)
        index = int(np.searchsorted(sums, self._random() * sums[-1], side="right"))
        return min(index, int(np.searchsorted(sums, sums[-1], side="left")))  # the product may be rounded up to the sum


def _last(recent: Sequence[int], n: int) -> Sequence[int]:
    return recent if n < 0 else recent[max(len(recent) - n, 0) :]


def _check(top: np.floating) -> None:
    if not -np.inf < top < np.inf:
        raise TokenError(f"no token can be drawn: the largest logit is {top}")
