"""Perplexity of a text under a task: how well its model predicts each next token.

Source: llama.cpp tools/perplexity/perplexity.cpp
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.engine.parameters import count
from pyggml_adapt.errors import ParameterError, TokenizerError
from pyggml_adapt.host.host import Host
from pyggml_adapt.host.session import Session

N_CTX_LEAST = 4  # so that there is something to predict, and something to predict it from


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative logarithm of the probabilities of n_tokens tokens, in n_chunks pieces of n_ctx tokens.

    error: the standard error of `value`.
    """

    task: str
    value: float
    error: float
    n_tokens: int
    n_chunks: int
    n_ctx: int


def perplexity(
    host: Host,
    text: str,
    *,
    task: str | None = None,
    n_ctx: int = 512,
    max_chunks: int | None = None,
    on_chunk: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Return the perplexity of `text` under a task, by default the active one, as llama-perplexity computes it.

    The text's tokens are cut into pieces of n_ctx; in each the first is replaced by BOS if the model wants one, and the
    tokens of the second half are predicted from all before them.  What is left at the end, shorter than n_ctx, is not
    looked at.  max_chunks: of which the first are taken, None for all.  on_chunk: called with the number of pieces
    done and of all, and the perplexity so far.
    Raises: ParameterError if the text has fewer than 2 n_ctx tokens, or its model adds EOS; TokenizerError; as
    Host.session().
    """
    n_ctx = count("n_ctx", n_ctx, least=N_CTX_LEAST)
    if max_chunks is not None:
        count("max_chunks", max_chunks)
    task = host.active if task is None else task
    tokenizer = host.tokenizer(task)
    if tokenizer.add_eos:
        raise ParameterError(f"task {task!r}: its tokenizer adds EOS, which would stand in the midst of the text")
    if tokenizer.add_bos and tokenizer.bos_id is None:
        raise TokenizerError(f"task {task!r}: its tokenizer adds BOS, but has none")
    ids = tokenizer.encode(text)
    if len(ids) < 2 * n_ctx:
        raise ParameterError(f"the text has {len(ids)} tokens: perplexity with n_ctx = {n_ctx} needs {2 * n_ctx}")
    n_chunks = min(len(ids) // n_ctx, max_chunks or len(ids))
    losses: list[np.ndarray] = []
    with host.session(task, n_ctx=n_ctx) as session:
        for i in range(n_chunks):
            chunk = ids[i * n_ctx : (i + 1) * n_ctx]
            if tokenizer.add_bos and tokenizer.bos_id is not None:
                chunk[0] = tokenizer.bos_id
            session.rewind(0)
            losses.append(_losses(session, chunk, ids[i * n_ctx : (i + 1) * n_ctx]))
            if on_chunk is not None:
                on_chunk(i + 1, n_chunks, math.exp(np.concatenate(losses).mean()))
    loss = np.concatenate(losses)
    value = math.exp(loss.mean())
    return Perplexity(task, value, value * _standard_error(loss), loss.size, n_chunks, n_ctx)


def _losses(session: Session, chunk: list[int], targets: list[int]) -> np.ndarray:
    """Return the negative logarithms of the probabilities of the tokens in the second half but its first, F64."""
    n_logits = len(chunk) - len(chunk) // 2
    logits, wanted = session.eval_last(chunk, n_logits), np.array(targets[-n_logits + 1 :])
    losses = np.empty(n_logits - 1)
    for i, row in enumerate(logits[:-1]):
        row -= row.max()
        losses[i] = math.log(float(np.exp(row).sum(dtype=np.float64))) - float(row[wanted[i]])
    return losses


def _standard_error(loss: np.ndarray) -> float:
    """Return the standard error of the mean, 0 if there is one number."""
    variance = float(np.square(loss).mean() - loss.mean() ** 2)
    return math.sqrt(variance / (loss.size - 1)) if loss.size > 1 and variance > 0 else 0.0
