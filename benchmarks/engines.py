"""The two engines behind one face: this package through its public classes, llama.cpp through its C functions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np

import pyggml_adapt as pga

N_THREADS, N_UBATCH, N_CTX = 2, 512, 1024
LOAD_AUTO, LOAD_MMAP = -1, 1  # llama_load_mode
FLASH_ATTN_ON = 1


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    """Drop what llama.cpp logs."""


llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


class Ours:
    """A host with one session for one task."""

    name = "pyggml_adapt"

    def __init__(self, *files: str, task: str = "base", n_ctx: int = N_CTX):
        """files: a whole model; or a foundation and the task's adaptor."""
        adaptors = {task: files[1]} if len(files) > 1 else {}
        self.host = pga.Host(files[0], adaptors, n_threads=N_THREADS, n_ubatch=N_UBATCH)
        self.session = self.host.session(task, n_ctx=n_ctx)

    def eval(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens and return the last one's logits."""
        return self.session.eval(ids)

    def reset(self) -> None:
        """Forget all tokens."""
        self.session.rewind(0)

    def close(self) -> None:
        """Free everything."""
        self.host.close()


@dataclass(frozen=True)
class LlamaOptions:
    """How llama.cpp loads; `mmap`: --load-mode mmap --repack 0, else its own default."""

    name: str
    mmap: bool


MMAP = LlamaOptions("llama.cpp, mmap", mmap=True)
DEFAULT = LlamaOptions("llama.cpp, default", mmap=False)


class Llama:
    """A model with one context."""

    def __init__(self, *files: str, options: LlamaOptions = MMAP, n_ctx: int = N_CTX):
        """files: a whole model; or the shards of one, the adaptor before the foundation."""
        self.name = options.name
        self.ctx = None
        self.model = self._load(files, options)
        self._n_ctx = n_ctx
        self._tokens = (ctypes.c_int32 * n_ctx)()

    @staticmethod
    def _load(files: Sequence[str], options: LlamaOptions) -> object:
        params = llama_cpp.llama_model_default_params()
        params.load_mode = LOAD_MMAP if options.mmap else LOAD_AUTO
        params.use_extra_bufts = not options.mmap
        if len(files) == 1:
            model = llama_cpp.llama_model_load_from_file(files[0].encode(), params)
        else:
            paths = (ctypes.c_char_p * len(files))(*(path.encode() for path in files))
            model = llama_cpp.llama_model_load_from_splits(paths, len(files), params)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {files}")
        return model

    def start(self) -> Llama:
        """Make the context."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = self._n_ctx
        params.n_ubatch = N_UBATCH
        params.n_threads = params.n_threads_batch = N_THREADS
        params.flash_attn_type = FLASH_ATTN_ON
        params.swa_full = False  # layers with a window keep no more than it needs
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError("llama.cpp makes no context")
        self._row = ctypes.c_float * llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return self

    def eval(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens and return the last one's logits, which the context owns."""
        self._tokens[: len(ids)] = ids
        if llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(self._tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        return np.frombuffer(self._row.from_address(ctypes.addressof(logits.contents)), dtype=np.float32)

    def reset(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), False)

    def close(self) -> None:
        """Free everything."""
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)


Engine = Ours | Llama
