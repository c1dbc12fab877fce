"""A chain of llama.cpp's samplers, as common_sampler_init builds it from the parameters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from reference import lib

from pyggml_adapt.engine.sampling import SamplerParams

_ENTRY = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Chain:
    """Samplers in llama.cpp's order; its random decisions have seed 1."""

    def __init__(self, params: SamplerParams, n_vocab: int, vocab: object = None):
        self._data = np.zeros(n_vocab, _ENTRY)
        self._samplers = [] if not params.logit_bias else [_bias(params, n_vocab)]
        self._samplers += _mirostat(params) if params.mirostat else _steps(params, n_vocab, vocab)
        self.selected = -1

    def accept(self, tokens: Sequence[int]) -> None:
        """Let the samplers know of tokens."""
        for sampler in self._samplers:
            for token in tokens:
                lib.llama_sampler_accept(sampler, token)

    def apply(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, probabilities) of the candidates that are left, in llama.cpp's order."""
        self._data["id"], self._data["logit"], self._data["p"] = np.arange(len(logits)), logits, 0.0
        pointer = self._data.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        array = lib.llama_token_data_array(pointer, len(logits), -1, False)
        for sampler in self._samplers:
            lib.llama_sampler_apply(sampler, ctypes.byref(array))
        self.selected = array.selected
        first = (ctypes.addressof(array.data.contents) - self._data.ctypes.data) // _ENTRY.itemsize
        left = self._data[first : first + array.size]
        return left["id"].copy(), left["p"].copy()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *exc: object) -> None:
        for sampler in self._samplers:
            lib.llama_sampler_free(sampler)


def vocabulary(path: Path) -> object:
    """Return llama.cpp's vocabulary of a GGUF file; it stays in memory."""
    params = lib.llama_model_default_params()
    params.vocab_only = True
    return lib.llama_model_get_vocab(lib.llama_model_load_from_file(str(path).encode(), params))


def _bias(params: SamplerParams, n_vocab: int) -> object:
    pairs = (lib.llama_logit_bias * len(params.logit_bias))(*params.logit_bias)
    return lib.llama_sampler_init_logit_bias(n_vocab, len(params.logit_bias), pairs)


def _mirostat(params: SamplerParams) -> list[object]:
    return [
        lib.llama_sampler_init_temp(params.temperature),
        lib.llama_sampler_init_mirostat_v2(1, params.mirostat_tau, params.mirostat_eta),
    ]


def _steps(params: SamplerParams, n_vocab: int, vocab: object) -> list[object]:
    p = params
    texts = [text.encode() for text in p.dry_sequence_breakers] if vocab else []
    dry = (p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_penalty_last_n)
    return [
        lib.llama_sampler_init_penalties(
            n_vocab, p.repeat_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty
        ),
        lib.llama_sampler_init_dry(vocab, *dry, (ctypes.c_char_p * len(texts))(*texts), len(texts)),
        lib.llama_sampler_init_top_n_sigma(p.top_n_sigma),
        lib.llama_sampler_init_top_k(p.top_k),
        lib.llama_sampler_init_typical(p.typical_p, p.min_keep),
        lib.llama_sampler_init_top_p(p.top_p, p.min_keep),
        lib.llama_sampler_init_min_p(p.min_p, p.min_keep),
        lib.llama_sampler_init_xtc(p.xtc_probability, p.xtc_threshold, p.min_keep, 1),
        lib.llama_sampler_init_temp_ext(p.temperature, p.dynatemp_range, p.dynatemp_exponent),
        lib.llama_sampler_init_dist(1),
    ]
