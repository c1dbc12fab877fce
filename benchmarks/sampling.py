"""Microseconds that choosing a token takes, with llama.cpp's chain of the same steps beside ours."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
from engines import Llama, llama_cpp
from speed import seconds

import pyggml_adapt as pga
from pyggml_adapt.engine.sampling import Sampler, SamplerParams, find_breakers

N_RECENT = 512  # tokens before the first that is chosen
N_EVICTED = 1 << 26  # bytes that are written to empty the caches
CASES: dict[str, SamplerParams] = {
    "greedy": SamplerParams(temperature=0.0, seed=1),
    "default chain": SamplerParams(seed=1),
    "default chain, no top-k": SamplerParams(seed=1, top_k=0),
    "default chain, penalties, DRY": SamplerParams(
        seed=1, repeat_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1, dry_multiplier=0.8
    ),
    "typical-p, top-n-sigma, XTC": SamplerParams(
        seed=1, typical_p=0.95, top_n_sigma=2.0, xtc_probability=0.5, xtc_threshold=0.1
    ),
    "Mirostat 2": SamplerParams(seed=1, mirostat=2),
}


def peaked_logits(n_vocab: int, n: int) -> Iterator[np.ndarray]:
    """Yield n times logits, F32 [n_vocab], whose probabilities fall as a power of the rank, from flat to steep.

    So do those of a trained model: now and then it knows the next token, and mostly a few dozen are likely.
    """
    rng = np.random.default_rng(1)
    fall = np.log(np.arange(1, n_vocab + 1))
    for slope in rng.uniform(1.1, 4.0, n):
        logits = rng.normal(12.0, 0.5, n_vocab) - slope * fall
        rng.shuffle(logits)
        yield logits.astype(np.float32)


class LlamaChain:
    """llama.cpp's samplers in its own order, on logits that are put where a context has them."""

    def __init__(self, llama: Llama, params: SamplerParams):
        """llama: with a token evaluated."""
        self._llama = llama
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        for step in _steps(params, n_vocab, vocab):
            llama_cpp.llama_sampler_chain_add(self._chain, step)
        self._row = llama_cpp.llama_get_logits_ith(llama.ctx, -1)

    def accept(self, token: int) -> None:
        """Let the samplers know of a token."""
        llama_cpp.llama_sampler_accept(self._chain, token)

    def put(self, logits: np.ndarray) -> None:
        """Replace the context's logits."""
        ctypes.memmove(self._row, logits.ctypes.data, logits.nbytes)

    def sample(self) -> int:
        """Return the next token id, which the samplers then know of."""
        return llama_cpp.llama_sampler_sample(self._chain, self._llama.ctx, -1)

    def close(self) -> None:
        """Free the samplers."""
        llama_cpp.llama_sampler_free(self._chain)


def _steps(p: SamplerParams, n_vocab: int, vocab: object) -> list[object]:
    def make(name: str, *values: object) -> object:
        return getattr(llama_cpp, f"llama_sampler_init_{name}")(*values)

    if p.mirostat:
        return [make("temp", p.temperature), make("mirostat_v2", 1, p.mirostat_tau, p.mirostat_eta)]
    if p.temperature == 0.0:
        return [make("greedy")]
    texts = [text.encode() for text in p.dry_sequence_breakers]
    breakers = (ctypes.c_char_p * len(texts))(*texts), len(texts)
    return [
        make("penalties", n_vocab, p.repeat_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty),
        make("dry", vocab, p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_penalty_last_n, *breakers),
        make("top_n_sigma", p.top_n_sigma),
        make("top_k", p.top_k),
        make("typical", p.typical_p, p.min_keep),
        make("top_p", p.top_p, p.min_keep),
        make("min_p", p.min_p, p.min_keep),
        make("xtc", p.xtc_probability, p.xtc_threshold, p.min_keep, 1),
        make("temp_ext", p.temperature, p.dynatemp_range, p.dynatemp_exponent),
        make("dist", 1),
    ]


def _history(n_vocab: int) -> list[int]:
    """Return tokens in which phrases come again, as penalties and DRY look for."""
    rng = np.random.default_rng(2)
    phrases = rng.integers(300, n_vocab, (16, 8))
    return phrases[rng.integers(0, len(phrases), N_RECENT // 8)].ravel().tolist()


def _us(
    sampler: Sampler, chain: LlamaChain, history: list[int], rows: list[np.ndarray], cold: bool
) -> dict[str, float]:
    """Return the median microseconds of a token by engine; cold: the caches are full of something else, but the logits.

    The engines take turns with each token.
    """
    recent, other = history.copy(), np.zeros(N_EVICTED if cold else 1, np.uint8)
    ours, theirs = [], []
    for logits in rows:
        other += 1
        chain.put(logits)
        theirs.append(seconds(chain.sample))
        other += 1
        logits = logits.copy()
        ours.append(seconds(lambda logits=logits: recent.append(sampler.sample(logits, recent))))
    n_first = len(rows) // 10  # tokens, after which both are warm
    return {name: median(taken[n_first:]) * 1e6 for name, taken in (("pyggml_adapt", ours), ("llama.cpp", theirs))}


def sampling(path: str, n_tokens: int) -> dict[str, Any]:
    """Return the median microseconds of choosing a token by case, state of the caches and engine.

    path: of a model, of which only the vocabulary matters.  n_tokens: of each case, a quarter of it where it is cold.
    """
    with pga.Host(path) as host:
        tokenizer = host.tokenizer()
    llama = Llama(path, n_ctx=64).start()
    llama.eval([300])
    history, rows = _history(tokenizer.n_vocab), list(peaked_logits(tokenizer.n_vocab, n_tokens))
    found: dict[str, Any] = {}
    for name, params in CASES.items():
        chain = LlamaChain(llama, params)
        sampler = Sampler(params, find_breakers(tokenizer, tuple(params.dry_sequence_breakers)))
        for token in history:
            chain.accept(token)
        found[name] = {
            "warm": _us(sampler, chain, history, rows, cold=False),
            "cold": _us(sampler, chain, history, rows[: n_tokens // 4], cold=True),
        }
        chain.close()
    llama.close()
    return {"n_vocab": tokenizer.n_vocab, "us": found}
