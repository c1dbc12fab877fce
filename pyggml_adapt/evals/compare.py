"""How far a task's logits move when its whole model is replaced by a foundation and an adaptor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.errors import ParameterError, StrPath
from pyggml_adapt.ggml import GGUFReader
from pyggml_adapt.host.host import Host
from pyggml_adapt.weights.store import BASE

N_TOKENS = 256
_TASK = "task"
_STEP = 32  # tokens whose logits are held at a time


@dataclass(frozen=True, slots=True)
class LogitsError:
    """Logits of an approximation against those of the model that it stands for, over n_tokens tokens.

    nmse: mean squared error over the mean square.  max_abs: largest difference of a logit.  kl_mean: mean over the
    tokens of the divergence of the approximation's distribution from the model's, in nats.  top1_agreement: share of
    the tokens for which both find the same next token the most probable.
    """

    n_tokens: int
    nmse: float
    max_abs: float
    kl_mean: float
    top1_agreement: float


def sample_ids(model: StrPath, text: str | None = None) -> list[int]:
    """Return up to N_TOKENS token ids to compare logits of, no more than the model's context.

    text: whose first tokens are taken; None for the same pseudo-random ids each time, after the model's first token.
    Raises: ParameterError if the text gives none, TokenizerError; ModelError; FileAccessError, FileFormatError.
    """
    with Host(model, n_threads=1) as host, host.session(BASE, n_ctx=1) as session:
        n_vocab = session.n_vocab
        ids = host.tokenize(text, parse_special=True) if text is not None else []
    if text is not None and not ids:
        raise ParameterError("the text to compare logits of has no token")
    with GGUFReader(model) as reader:
        bos = reader.metadata.get("tokenizer.ggml.bos_token_id")
        n_ctx = reader.metadata.get(f"{reader.metadata.get('general.architecture')}.context_length", N_TOKENS)
    if text is None:
        ids = np.random.default_rng(0).integers(0, n_vocab, N_TOKENS).tolist()
        if isinstance(bos, int) and 0 <= bos < n_vocab:
            ids[0] = bos
    return ids[: min(N_TOKENS, n_ctx)]


def logits_error(
    model: StrPath, foundation: StrPath, adaptor: StrPath, ids: Sequence[int], n_threads: int | None = None
) -> LogitsError:
    """Return the error of foundation and adaptor against the whole model, over one run of the tokens `ids`.

    Raises: ParameterError without tokens; what Host and its sessions raise.
    """
    if not ids:
        raise ParameterError("there are no tokens to compare logits of")
    left = square = kl = 0.0
    largest, agreeing = 0.0, 0
    with Host(model, n_threads=n_threads) as whole, Host(foundation, {_TASK: adaptor}, n_threads=n_threads) as host:
        for want, found in zip(_logits(whole, BASE, ids), _logits(host, _TASK, ids), strict=True):
            left += float(np.square(found - want).sum())
            square += float(np.square(want).sum())
            largest = max(largest, float(np.abs(found - want).max()))
            log_p, log_q = _log_softmax(want), _log_softmax(found)
            kl += float((np.exp(log_p) * (log_p - log_q)).sum())
            agreeing += int((want.argmax(axis=1) == found.argmax(axis=1)).sum())
    return LogitsError(
        len(ids), left / square if square else 0.0, largest, max(kl / len(ids), 0.0), agreeing / len(ids)
    )


def _logits(host: Host, task: str, ids: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the logits of the tokens, F64 [up to _STEP, n_vocab]."""
    with host.session(task, n_ctx=len(ids)) as session:
        for start in range(0, len(ids), _STEP):
            yield session.eval(ids[start : start + _STEP], all_logits=True).astype(np.float64)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
