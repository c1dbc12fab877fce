"""Session: one conversation with one task, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, TypeVar

import numpy as np

from pyggml_adapt.engine.batch import UBatch, as_tokens, split
from pyggml_adapt.engine.fork import Boundaries, ForkReport, first_difference
from pyggml_adapt.engine.logprobs import Scorer
from pyggml_adapt.engine.sampling import Breakers, Constraint, Sampler, SamplerParams
from pyggml_adapt.engine.sequence import Evaluation, zeros
from pyggml_adapt.errors import ParameterError
from pyggml_adapt.host.generation import Generation

S = TypeVar("S", bound="Session")


class Session(Evaluation):
    """One sequence of tokens under one task's weights as loaded; its KV cache is never read under others.

    Close it, or use `with`, to give its cache's memory back.  Threads that share a session take turns.
    """

    def __init__(self, *parts: Any, open_session: Callable[..., Any], **options: Any):
        """parts, options: Evaluation's.  open_session: called as Host.session() to make a fork."""
        super().__init__(*parts, **options)
        self._open_session = open_session
        self.fork_report: ForkReport | None = None  # of the fork that made this session
        self._generation: Generation | None = None  # the one that may go on

    def generate_ids(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        max_tokens: int | None,
        params: SamplerParams,
        stop_ids: Collection[int] = (),
        whole: bool = False,
        logprobs: int | None = None,
        score_prompt: bool = False,
        piece_of: Callable[[int], bytes] | None = None,
    ) -> Generation:
        """Return an iterator over the token ids that follow `ids`; it ends with the first of stop_ids.

        ids: may be empty where the session's last token is evaluated or was generated: generation goes on from there.
        max_tokens: None for as many as fit.  whole: `ids` stand for the whole session, see reuse(); only once the
        generation begins are tokens forgotten.
        logprobs: keep the log-probability of each token, and those of so many most probable ones, up to MAX_TOP, in
        Generation.logprobs; score_prompt: and for the tokens of `ids` in Generation.prompt_logprobs.  piece_of: gives
        the bytes of a token, for these.
        Raises: as eval, at once.
        """
        self._check_open()
        scorer = None if logprobs is None else Scorer(logprobs, piece_of)
        if max_tokens is not None and (not isinstance(max_tokens, Integral) or max_tokens < 0):
            raise ParameterError(f"max_tokens = {max_tokens!r} is neither None nor a whole number from 0 on")
        if whole:
            tokens = self._check_whole(ids)
        else:
            empty = not ids.size if isinstance(ids, np.ndarray) else isinstance(ids, Sequence) and not ids
            tokens = [] if empty and self._can_go_on else as_tokens(ids, self.n_vocab)
            self.check_fits(len(tokens))
        params.check_vocabulary(self.n_vocab)
        breakers = self._breakers(params) if params.has_dry and params.dry_sequence_breakers else {}
        constraint = self._constraint(*params.constraint) if params.constraint else None
        sampler = Sampler(params, breakers, constraint=constraint)
        return Generation(
            self, tokens, max_tokens, sampler, stop_ids, is_whole=whole, scorer=scorer, scores_prompt=score_prompt
        )

    def _breakers(self, params: SamplerParams) -> Breakers:
        """Return where DRY's sequences end: it takes a tokenizer to know which tokens its texts are in."""
        raise ParameterError("dry_sequence_breakers are texts, and this session knows token ids only: give none")

    def _constraint(self, name: str, text: str) -> Constraint:
        """Return what the output must meet: it takes a tokenizer to know the tokens' text."""
        raise ParameterError(f"{name} is about text, and this session knows token ids only: give none")

    def fork(self: S, task: str | None = None, *, n_ctx: int | None = None, forks: Collection[str] = ()) -> S:
        """Return a new session with these tokens under another task, computed only from the first layer that differs.

        It is bit for bit a fresh session with that task that is given the same calls: each eval() of several tokens as
        it was, and everything from the first token on that came alone (generated, or by itself), or from a call that
        was partly rewound, in one call.  Where no weight differs, as for the same task (None), the fork is a copy.
        How much is reused depends on this session's `forks`; the new one's `fork_report` says how much was.
        n_ctx: by default this session's.  forks: as in Host.session().  This session waits, and stays as it is.
        Raises: ContextFullError, ClosedError, TokenError (a token that the task's vocabulary lacks); as Host.session().
        """
        self._check_open()
        task = self.task if task is None else task
        forked: S = self._open_session(task, n_ctx=self.n_ctx if n_ctx is None else n_ctx, forks=forks)
        try:
            with self._lock:
                self._check_open()
                forked.fork_report = forked._take(self)
        except BaseException:
            forked.close()
            raise
        return forked

    def _take(self, source: Session) -> ForkReport:
        """Become, empty as it is, what a fork of `source`, whose lock is held, must be."""
        source._settle()
        n_layer, known = self._model.hp.n_layer, source.tokens  # a generation may append to them meanwhile
        self.check_fits(len(known))
        differs = first_difference(source._model, source._weights, self._model, self._weights)
        if differs is None and self._fits(source, source._n_evaluated):
            copied, n_reused = self._copy(source, known), source._n_evaluated
            saved = n_reused / len(known) if known else 0.0
            return ForkReport(self.task, len(known), n_reused, None, n_layer, n_layer, saved, copied)
        tokens = as_tokens(known, self.n_vocab) if known else []
        n_last = source._n_last(tokens)
        if differs == n_layer and self._fits(source, source._n_whole - n_last):
            first_layer = source._kept.highest(n_layer) if n_last else n_layer
            n_reused, n_computed, copied = self._take_all_layers(source, tokens, first_layer, n_last)
            first_layer = first_layer or n_layer  # of the tokens that were reused
        else:
            is_there = self._fits(source, source._n_whole)
            first_layer = source._kept.highest(differs) if differs is not None and is_there else 0
            n_reused, n_computed, copied = self._take_layers(source, tokens, first_layer)
        if self.n_past < len(tokens):
            n_computed += (len(tokens) - self.n_past) * n_layer
            self._append(tokens[self.n_past :])
        saved = 1 - n_computed / (len(tokens) * n_layer) if known else 0.0
        first_layer = first_layer if n_reused else 0
        return ForkReport(self.task, len(known), n_reused, differs, first_layer, n_layer, saved, copied)

    def _fits(self, source: Session, n_tokens: int) -> bool:
        """Return whether K and V of the first n_tokens tokens of `source` are there, and would be the same here."""
        is_long, was_long = (self._model.is_long(each.n_cells) for each in (self._cache, source._cache))
        return is_long == was_long and self._cache.fits(source._cache, n_tokens)

    def _take_layers(self, source: Session, tokens: list[int], first_layer: int) -> tuple[int, int, int]:
        """Take the layers below first_layer, and compute the others from its input, call by call.

        Returns the number of tokens reused, of layers computed for a token, and of bytes of K and V copied.
        """
        n_reused, kept = source._n_whole if first_layer else 0, source._kept
        copied = self._cache.copy(source._cache, n_reused, first_layer)
        self._kept.inherit(kept, n_reused, first_layer)
        for end in source._ends:
            self._append(tokens[self.n_past : end], first_layer=first_layer, source=kept if first_layer else None)
        return n_reused, source._n_whole * (self._model.hp.n_layer - first_layer), copied

    def _n_last(self, tokens: list[int]) -> int:
        """Return of how many tokens at the end of the whole calls a fork must compute K and V to get their logits.

        Of none if the head's input was kept for the last of them, or if other tokens follow.
        """
        if not self._ends or self._n_whole < len(tokens) or self._kept.has_head(self._n_whole):
            return 0
        n_call = self._n_whole - (self._ends[-2] if len(self._ends) > 1 else 0)
        return (n_call - 1) % self.n_batch % self.n_ubatch + 1

    def _take_all_layers(
        self, source: Session, tokens: list[int], first_layer: int, n_last: int
    ) -> tuple[int, int, int]:
        """Take every layer, and compute the logits of the last call, if no token came after it.

        From the head's input if it was kept, else for the last piece of the call from first_layer.  Returns as
        _take_layers().
        """
        n_whole, n_layer, kept = source._n_whole, self._model.hp.n_layer, source._kept
        n_reused = n_whole if first_layer else n_whole - n_last
        copied = self._cache.copy(source._cache, n_reused, n_layer)
        self._kept.inherit(kept, n_whole, n_layer)
        self._mark(source, tokens[: n_whole - n_last])
        n_computed = 0
        if n_last:
            last = tokens[n_whole - n_last : n_whole]
            self._append(last, first_layer=first_layer, source=kept if first_layer else None)
            n_computed = n_last * (n_layer - first_layer)
        elif 0 < n_whole == len(tokens):
            self._evaluate_head(tokens, kept)
        self._ends = source._ends.copy()
        return n_reused, n_computed, copied

    def _evaluate_head(self, tokens: list[int], kept: Boundaries) -> None:
        """Compute the logits of the last token from the head's input."""
        n, n_layer = len(tokens), self._model.hp.n_layer
        ids, pos = np.array(tokens[-1:], dtype=np.int32), np.array([n - 1], dtype=np.int32)
        embd, out_ids = kept.read(n_layer, n - 1, 1), np.zeros(1, dtype=np.int32)
        batch = UBatch(self._cache, ids, pos, zeros(ids), out_ids, first_layer=n_layer, embd=embd, stores=False)
        logits = np.empty((1, self.n_vocab), dtype=np.float32)
        self._engine.eval(self._model, self._weights, self._cache, batch, logits)
        self._last = n, logits[0]

    def _copy(self, source: Session, tokens: list[int]) -> int:
        """Take everything over; return the bytes of K and V copied."""
        n_layer = self._model.hp.n_layer
        copied = self._cache.copy(source._cache, source._n_evaluated, n_layer)
        self._kept.inherit(source._kept, source._n_whole, n_layer)
        self._cache.take(source._cache)
        self._tokens, self._n_evaluated = tokens, source._n_evaluated
        self._ends = source._ends.copy()
        logits = source.logits
        self._last = self._n_evaluated, None if logits is None else logits.copy()
        return copied

    def _mark(self, source: Session, tokens: list[int]) -> None:
        """Take tokens whose K and V were copied for evaluated, in the cells that the calls for them would take."""
        for start, end in pairwise([0, *source._ends]):
            call = np.array(tokens[start:end], dtype=np.int32)
            for piece, pos, _ in split(call, start, self.n_batch, self.n_ubatch, 0):
                self._cache.store(self._cache.find_slot(len(piece)), pos, zeros(piece))
        self._tokens, self._n_evaluated = tokens, len(tokens)
