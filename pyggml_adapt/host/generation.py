"""Generation: the token ids that follow a session's, one by one, and what is known of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyggml_adapt.engine.logprobs import Scorer, TokenLogprob
from pyggml_adapt.engine.sampling import Sampler
from pyggml_adapt.errors import BusyError

if TYPE_CHECKING:
    from pyggml_adapt.host.session import Session


@dataclass(slots=True)
class Timings:
    """Numbers of tokens, and milliseconds that their evaluation took."""

    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0


class Generation:
    """Iterate over generated token ids; one generation at a time goes on in a session.

    Afterwards `finish_reason`, `tokens`, `logprobs` and `timings` tell what happened.
    finish_reason: "stop" (an end-of-generation token), "length" (max_tokens, or the context is full), or None before
    the end.  tokens: the ids so far, without the one that stopped it.  logprobs: of each of the tokens, None if they
    were not asked for.  prompt_logprobs: those of the prompt's tokens that were evaluated, None if not asked for.
    """

    def __init__(
        self,
        session: Session,
        prompt: list[int],
        max_tokens: int | None,
        sampler: Sampler,
        stop_ids: Collection[int],
        *,
        is_whole: bool = False,
        scorer: Scorer | None = None,
        scores_prompt: bool = False,
    ):
        """is_whole: whether the prompt stands for all tokens of the session: see Session.reuse()."""
        self.session, self._sampler, self._scorer = session, sampler, scorer
        self._prompt, self._is_whole, self._scores_prompt = prompt, is_whole, scores_prompt
        self._has_begun = False
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if scorer is None else []
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.timings = Timings()
        self._steps = self._run(session.n_ctx if max_tokens is None else max_tokens, stop_ids)

    def __iter__(self) -> Iterator[int]:
        return self._steps

    def __next__(self) -> int:
        return next(self._steps)

    def start(self) -> None:
        """Evaluate the prompt, if that is not done yet; until the first token is drawn the session may be forked.

        Raises: as Session.eval().
        """
        if self._has_begun:
            return
        session, timings = self.session, self.timings
        session._generation = self
        start = time.perf_counter()
        prompt = session.reuse(self._prompt) if self._is_whole else self._prompt
        if not prompt:
            session._go_on()
        elif self._scorer is not None and self._scores_prompt:
            self.prompt_logprobs = self._score(prompt, self._scorer)
        else:
            session.eval(prompt)
        self._has_begun = True
        timings.prompt_n, timings.prompt_ms = len(prompt), (time.perf_counter() - start) * 1e3

    def _score(self, prompt: list[int], scorer: Scorer) -> list[TokenLogprob]:
        """Evaluate the prompt and return the log-probabilities of its tokens; of one that nothing is before, none."""
        session = self.session
        found = [scorer.score(session._go_on(), prompt[0]) if session._can_go_on else scorer.first(prompt[0])]

        def take(rows: np.ndarray) -> None:
            n = len(found)
            found.extend(scorer.score(row, token) for row, token in zip(rows, prompt[n:], strict=False))

        session.eval_each(prompt, take)
        return found

    def _run(self, max_tokens: int, stop_ids: Collection[int]) -> Iterator[int]:
        session, timings, scorer = self.session, self.timings, self._scorer
        self.start()
        while self.finish_reason is None:
            if len(self.tokens) >= max_tokens or session.n_past >= session.n_ctx:
                self.finish_reason = "length"
                return
            start = time.perf_counter()
            if session._generation is not self:
                raise BusyError("this generation cannot go on: another one has begun in its session")
            logits = session._advance([])[0] if self.tokens else session._go_on()
            token = self._sampler.sample(logits, session._tokens)
            scored = scorer.score(logits, token) if scorer is not None and token not in stop_ids else None
            session._tokens.append(token)
            timings.predicted_n += 1
            timings.predicted_ms += (time.perf_counter() - start) * 1e3
            if token in stop_ids:
                self.finish_reason = "stop"
                return
            self.tokens.append(token)
            if scored is not None and self.logprobs is not None:
                self.logprobs.append(scored)
            yield token
