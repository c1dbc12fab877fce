"""Completions: several texts that follow one prompt, whose KV is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyggml_adapt.engine.logprobs import TokenLogprob
from pyggml_adapt.engine.parameters import count
from pyggml_adapt.host.generation import Timings
from pyggml_adapt.host.text import TextGeneration, TextSession, sampler_params

N_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class Completion:
    """One text that follows a prompt; with `echo`, prompt and text.

    index: which of the completions it is, from 0 on.  tokens: of the text, without the one that stopped it, but with
    those that a stop string cut off.  finish_reason: "stop" or "length".  logprobs: one for each of the tokens, None if
    they were not asked for.  timings: those of the prompt are of the one evaluation that all completions share.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings


def complete(
    session: TextSession,
    prompt: Sequence[int],
    *,
    n: int,
    echo: str | None,
    logprobs: int | None,
    sampling: Mapping[str, Any],
    **options: Any,
) -> tuple[Completion, ...]:
    """Return n completions of a prompt; completion i draws with seed + i, modulo 2**64, if there is a seed.

    session: is new, and makes the last completion; each other is made by a fork of it, closed before the next.
    echo: the text that comes first, None for no prompt at all.  options: max_tokens and stop of TextSession.generate().
    Raises: as TextSession.generate(), before anything is evaluated.
    """
    n = count("n", n)
    sampler_params(sampling)
    each = [{**sampling, **options, "logprobs": logprobs, "seed": _seed(sampling, i)} for i in range(n)]
    last = session.generate(prompt, score_prompt=echo is not None and logprobs is not None, **each[-1])
    last.start()
    first = _Prompt(echo or "", () if echo is None else tuple(session.tokens), last)
    done = []
    for i in range(n - 1):
        with session.fork() as forked:
            done.append(first.finish(i, forked.generate([], **each[i])))
    return (*done, first.finish(n - 1, last))


def _seed(sampling: Mapping[str, Any], i: int) -> int | None:
    seed = sampling.get("seed")
    return None if seed is None else (int(seed) + i) % N_SEEDS


class _Prompt:
    """What comes before each completion, and what its evaluation took."""

    def __init__(self, text: str, tokens: tuple[int, ...], evaluated: TextGeneration):
        self._text, self._tokens = text, tokens
        self._logprobs = tuple(evaluated.prompt_logprobs or ())
        self._timings = evaluated.timings

    def finish(self, index: int, generation: TextGeneration) -> Completion:
        """Return the completion that a generation, which this runs to its end, makes."""
        text = self._text + "".join(generation)
        timings, prompt = generation.timings, self._timings
        return Completion(
            index,
            text,
            (*self._tokens, *generation.tokens),
            generation.finish_reason or "",
            None if generation.logprobs is None else (*self._logprobs, *generation.logprobs),
            Timings(prompt.prompt_n, prompt.prompt_ms, timings.predicted_n, timings.predicted_ms),
        )
