"""llama.cpp, through llama-cpp-python's low-level functions: what our results are compared with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp as lib
import numpy as np

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}


@lib.llama_log_callback
def _quiet(level: int, text: bytes, user_data: object) -> None:
    pass


lib.llama_log_set(_quiet, ctypes.c_void_p(0))
lib.llama_backend_init()


class Reference:
    """One model with one context; weights are used where the file is mapped, as ours are.

    path: a file, or the files of a shard set in their order.  params: more fields of llama_context_params.
    """

    def __init__(
        self,
        path: Path | Sequence[Path],
        *,
        n_ctx: int = 512,
        n_threads: int = 2,
        flash_attn: bool = True,
        type_k: str = "F16",
        type_v: str = "F16",
        **params: object,
    ):
        self.model = _load([path] if isinstance(path, Path) else path)
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.n_past = 0
        fields = lib.llama_context_default_params()
        params = {"swa_full": False, **params}  # as ours: layers with a window keep no more than they see
        params |= {"n_ctx": n_ctx, "n_batch": n_ctx, "n_threads": n_threads, "n_threads_batch": n_threads}
        params |= {"flash_attn_type": int(flash_attn), "type_k": TYPES[type_k], "type_v": TYPES[type_v]}
        for name, value in {**params, "kv_unified": True}.items():
            setattr(fields, name, value)
        self.ctx = lib.llama_init_from_model(self.model, fields)
        if not self.ctx:
            raise RuntimeError("llama.cpp makes no context")

    def eval(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Append tokens to sequence 0 and return the logits of the last, or of all."""
        n = len(ids)
        pos = range(self.n_past, self.n_past + n)
        rows = self.decode(ids, pos, [0] * n, range(n) if all_logits else [n - 1])
        self.n_past += n
        return rows if all_logits else rows[0]

    def decode(
        self, ids: Sequence[int], pos: Sequence[int], seq_id: Sequence[int], out_ids: Sequence[int]
    ) -> np.ndarray:
        """Evaluate one batch and return the logits of the tokens out_ids, F32 [n_outputs, n_vocab]."""
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, pos[i], 1
            batch.seq_id[i][0], batch.logits[i] = seq_id[i], i in out_ids
        status = lib.llama_decode(self.ctx, batch)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(self.ctx, i), (self.n_vocab,)) for i in out_ids]
        return np.array(rows)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens to sequence 0 and return their embeddings, F32 [n_tokens, n_embd]; params: embeddings=True."""
        n, n_embd = len(ids), lib.llama_model_n_embd(self.model)
        self.eval(ids, all_logits=True)
        return np.array([np.ctypeslib.as_array(lib.llama_get_embeddings_ith(self.ctx, i), (n_embd,)) for i in range(n)])

    def embed_pooled(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens to sequence 0 and return their one embedding; params: embeddings=True, pooling_type."""
        self.eval(ids, all_logits=True)
        pooled = lib.llama_get_embeddings_seq(self.ctx, 0)
        return np.array(np.ctypeslib.as_array(pooled, (lib.llama_model_n_embd(self.model),)))

    def set_loras(self, loras: Mapping[Path, float]) -> None:
        """Let low-rank files count, each with its factor, in all evaluations from now on."""
        adapters = [lib.llama_adapter_lora_init(self.model, str(path).encode()) for path in loras]
        if not all(adapters):
            raise RuntimeError(f"llama.cpp does not load {list(loras)}")
        n = len(adapters)
        pointers = (lib.llama_adapter_lora_p_ctypes * n)(*adapters)
        if lib.llama_set_adapters_lora(self.ctx, pointers, n, (ctypes.c_float * n)(*loras.values())):
            raise RuntimeError("llama.cpp does not use the low-rank files")

    def rewind(self, n_past: int) -> None:
        """Forget the tokens of sequence 0 after the first n_past."""
        lib.llama_memory_seq_rm(lib.llama_get_memory(self.ctx), 0, n_past, -1)
        self.n_past = n_past

    def close(self) -> None:
        """Free context and model."""
        lib.llama_free(self.ctx)
        lib.llama_model_free(self.model)

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _load(paths: Sequence[Path]) -> object:
    params = lib.llama_model_default_params()
    params.use_extra_bufts = False  # no repacking: the kernels on the types as they are in the file
    names = [str(path).encode() for path in paths]
    if len(names) == 1:
        model = lib.llama_model_load_from_file(names[0], params)
    else:
        model = lib.llama_model_load_from_splits((ctypes.c_char_p * len(names))(*names), len(names), params)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {paths}")
    return model
