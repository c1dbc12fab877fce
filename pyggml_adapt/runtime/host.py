"""Host: one foundation, its adaptors, and the sessions that run on them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from pyggml_adapt.errors import (
    AdaptorError,
    BackendError,
    ClosedError,
    ModelError,
    ParameterError,
    StrPath,
    TokenizerError,
)
from pyggml_adapt.ggml import Device, DeviceType, Type
from pyggml_adapt.ggml.backend import MAX_THREADS
from pyggml_adapt.models import HParams, Model, model_class
from pyggml_adapt.runtime.engine import Engine
from pyggml_adapt.runtime.kv_cache import KVCache
from pyggml_adapt.runtime.memory import Memory, pages_of
from pyggml_adapt.runtime.sampling import SamplerParams
from pyggml_adapt.runtime.session import Generation, Session, Timings
from pyggml_adapt.text import Tokenizer
from pyggml_adapt.weights.adaptor import Adaptor
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.store import BASE, Location, TaskWeights, WeightStore

_logger = logging.getLogger(__name__)
MAX_COUNT = 1 << 24  # of tokens in a context or a batch


class Swap(NamedTuple):
    """What activate() did: how many bytes the task has of its own, and the milliseconds that re-pointing took."""

    task: str
    loaded_nbytes: int
    ms: float


class _Task:
    """A loaded task: its weights, its model, its sessions, and its tokenizer once text is used."""

    def __init__(self, weights: TaskWeights):
        self.weights = weights
        metadata = weights.file.metadata
        arch = metadata.get("general.architecture")
        embd = weights.tensors.get("token_embd.weight")
        try:
            cls = model_class(arch if isinstance(arch, str) else "")
            hp = HParams.from_gguf(metadata, 1 if embd is None else embd.ne[1])
            self.model: Model = cls(hp)
            self.model.check_tensors(weights.tensors)
        except ModelError as error:
            raise ModelError(f"{weights.file.path}: {error}") from None
        self.n_sessions = 0
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, built from the file's metadata when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_metadata(self.weights.file.full_metadata())
        return self._tokenizer


class Host:
    """Serve many tasks from one foundation; safe to use from any number of threads.

    foundation: a `*-foundation.gguf`, or a complete model, which is then the task `base`.
    adaptors: task name -> path of an adaptor made from this foundation.
    n_threads: of each computation, by default all processors of this process.  n_gpu_layers: layers on a GPU; more
    than 0 needs a build with a GPU backend.  n_batch, n_ubatch: long prompts are divided into batches, and these into
    what is computed at once, as llama.cpp does.  type_k, type_v: of the KV
    cache, "F32", "F16", "BF16", "Q8_0" or "Q4_0".  use_mmap: False reads the weights into private memory.
    Raises: FileAccessError, FileFormatError, AdaptorError, ModelError, BackendError, ParameterError.
    """

    def __init__(
        self,
        foundation: StrPath,
        adaptors: Mapping[str, StrPath] | None = None,
        *,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        flash_attn: bool = True,
        type_k: str = "F16",
        type_v: str = "F16",
        use_mmap: bool = True,
        use_mlock: bool = False,
    ):
        _check_gpu(n_gpu_layers)
        if adaptors is not None and not isinstance(adaptors, Mapping):
            raise ParameterError(f"adaptors must map task names to paths, not be a {type(adaptors).__name__}")
        self.n_batch, self.n_ubatch = _count("n_batch", n_batch), _count("n_ubatch", n_ubatch)
        n_threads = None if n_threads is None else _count("n_threads", n_threads, most=MAX_THREADS)
        self._type_k, self._type_v = _cache_type("type_k", type_k), _cache_type("type_v", type_v)
        self._files = {"use_mmap": use_mmap, "use_mlock": use_mlock}
        self._lock = threading.RLock()
        self._tasks: dict[str, _Task] = {}
        self._sessions: set[Session] = set()
        self._active: str | None = None
        self._closed = False
        self._engine = Engine(n_threads=n_threads, flash_attn=flash_attn)
        self._store = WeightStore(Foundation(foundation, **self._files))
        try:
            if self._store.foundation.is_complete and BASE not in (adaptors or {}):
                self._add(TaskWeights(BASE, self._store.foundation, None))
            for task, path in (adaptors or {}).items():
                self.load_adaptor(task, path)
        except BaseException:
            self.close()
            raise

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the names of the loaded tasks."""
        self._check_open()
        return self._store.tasks

    @property
    def active(self) -> str:
        """Return the task that is used where none is named: the activated one, or the first that was loaded.

        Raises: AdaptorError (adaptor_not_found) if none is loaded.
        """
        if self._active is None and not self._store.tasks:
            raise AdaptorError(
                f"no task is loaded: {self._store.foundation.path} is not complete by itself, and there is no adaptor",
                code="adaptor_not_found",
            )
        return self._active or self._store.tasks[0]

    @property
    def n_threads(self) -> int:
        """Return the number of threads of each computation."""
        return self._engine.backend.n_threads

    def load_adaptor(self, task: str, path: StrPath) -> None:
        """Load an adaptor, checked against the foundation, as the task of this name.

        Raises: FileAccessError, FileFormatError, ModelError;
        AdaptorError (adaptor_exists, adaptor_invalid, adaptor_base_mismatch).
        """
        if not task or not isinstance(task, str):
            raise AdaptorError(f"a task needs a name, not {task!r}", code="adaptor_invalid")
        with self._lock:
            self._check_open()
            self._store.check_new(task)
            adaptor = Adaptor(task, path, self._store.foundation, **self._files)
            try:
                self._add(TaskWeights(task, self._store.foundation, adaptor))
            except BaseException:
                adaptor.close()
                raise

    def _add(self, weights: TaskWeights) -> None:
        self._tasks[weights.task] = _Task(weights)
        self._store.add(weights)
        _logger.info("loaded task %s: %d bytes of its own, %s", weights.task, weights.own_nbytes, weights.file.path)

    def unload_adaptor(self, task: str) -> None:
        """Forget a task and unmap its adaptor.

        Raises: AdaptorError (adaptor_not_found, or adaptor_in_use while a session uses it).
        """
        with self._lock:
            loaded = self._task(task)
            if loaded.n_sessions:
                raise AdaptorError(f"task {task!r} is in use by {loaded.n_sessions} session(s)", code="adaptor_in_use")
            self._engine.forget(loaded.weights)
            self._store.remove(task)
            del self._tasks[task]
            if self._active == task:
                self._active = None

    def activate(self, task: str) -> Swap:
        """Make a task the one that is used where none is named, and point the kept graphs at its weights.

        Raises: AdaptorError (adaptor_not_found).
        """
        start = time.perf_counter()
        with self._lock:
            loaded = self._task(task)
            self._engine.bind(loaded.model, loaded.weights)
            self._active = task
        return Swap(task, loaded.weights.own_nbytes, (time.perf_counter() - start) * 1e3)

    def where(self, name: str, task: str | None = None) -> Location:
        """Return where the bytes of a task's tensor live: ("adaptor" or "foundation", type, nbytes, path).

        Raises: AdaptorError (adaptor_not_found, tensor_not_found).
        """
        return self._task(task).weights.where(name)

    def memory(self) -> Memory:
        """Return measured bytes: pages of the mapped files, KV caches, compute buffers and the whole process."""
        with self._lock:
            self._check_open()
            ranges = {"foundation": self._store.foundation.address_range()}
            adaptors = {task: loaded.weights.adaptor for task, loaded in self._tasks.items()}
            ranges |= {f"task {task}": adaptor.address_range() for task, adaptor in adaptors.items() if adaptor}
            kv = sum(session.kv_nbytes for session in self._sessions)
        found, process = pages_of(ranges)
        own = {task: found[f"task {task}"] for task, adaptor in adaptors.items() if adaptor}
        return Memory(found["foundation"], own, kv, self._engine.compute_nbytes, process)

    def tokenize(
        self, text: str, *, task: str | None = None, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Return the token ids of a text.

        Raises: TokenizerError if the model has no tokenizer that is supported.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"only text can be tokenized, not {type(text).__name__}")
        return self._task(task).tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int], *, task: str | None = None) -> str:
        """Return the text of token ids.

        Raises: TokenizerError, TokenError.
        """
        return self._task(task).tokenizer.decode(ids)

    def session(self, task: str | None = None, *, n_ctx: int | None = None) -> TextSession:
        """Return a new session with a task, for up to n_ctx tokens, by default as many as the model was trained on.

        Raises: AdaptorError (adaptor_not_found), ParameterError, AllocError.
        """
        with self._lock:
            loaded = self._task(task)
            hp = loaded.model.hp
            n_ctx = _count("n_ctx", min(hp.n_ctx_train, MAX_COUNT) if n_ctx is None else n_ctx)
            if n_ctx > hp.n_ctx_train:
                _logger.warning("n_ctx = %d: the model was trained on contexts of %d tokens", n_ctx, hp.n_ctx_train)
            cache = KVCache(hp, n_ctx, type_k=self._type_k, type_v=self._type_v, flash_attn=self._engine.flash_attn)
            session = TextSession(self, loaded, self._engine, cache)
            loaded.n_sessions += 1
            self._sessions.add(session)
            return session

    def generate(
        self,
        prompt: str,
        *,
        task: str | None = None,
        max_tokens: int | None = 128,
        n_ctx: int | None = None,
        parse_special: bool = False,
        **sampling: Any,
    ) -> str:
        """Return the text that follows `prompt`; sampling: fields of SamplerParams.

        n_ctx: by default what prompt and max_tokens need.  The rest as in TextSession.generate().
        Raises: as session() and TextSession.generate().
        """
        task = self._task(task).weights.task
        ids = self.tokenize(prompt, task=task, parse_special=parse_special)
        if n_ctx is None and max_tokens is not None:
            n_ctx = max(len(ids) + max(_count("max_tokens", max_tokens, least=0), 1), 1)
        with self.session(task, n_ctx=n_ctx) as session:
            return "".join(session.generate(ids, max_tokens=max_tokens, **sampling))

    def _task(self, task: str | None) -> _Task:
        self._check_open()
        return self._tasks[self._store[self.active if task is None else task].task]

    def _end(self, session: Session) -> None:
        with self._lock:
            self._sessions.discard(session)
            if session.task in self._tasks:
                self._tasks[session.task].n_sessions -= 1

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this Host is closed")

    def close(self) -> None:
        """Close all sessions, stop the threads and unmap all files; closing twice is allowed."""
        with self._lock:
            for session in list(self._sessions):
                session.close()
            self._tasks.clear()
            self._engine.close()
            self._store.close()
            self._closed = True

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Host, closed>" if self._closed else f"<Host of {', '.join(self.tasks) or 'no tasks'}>"


class TextSession(Session):
    """A session that takes and gives text."""

    def __init__(self, host: Host, task: _Task, engine: Engine, cache: KVCache):
        super().__init__(
            engine, task.model, task.weights, cache, n_batch=host.n_batch, n_ubatch=host.n_ubatch, on_close=host._end
        )
        self._task = task

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        parse_special: bool = False,
        **sampling: Any,
    ) -> TextGeneration:
        """Return an iterator over pieces of the text that follows `prompt`; sampling: fields of SamplerParams.

        prompt: text, or token ids.  Special tokens (BOS) are added to text at the session's start only.
        max_tokens: None for as many as fit.  parse_special: whether names of special tokens in the text mean these.
        Raises: ContextFullError at once if the prompt does not fit; ParameterError, TokenizerError, TokenError.
        """
        try:
            params = SamplerParams(**sampling)
        except TypeError:
            known = ", ".join(SamplerParams.__slots__)
            raise ParameterError(
                f"generate: one of {', '.join(sampling)} is not a parameter; known are {known}"
            ) from None
        tokenizer = self._task.tokenizer
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, add_special=self.n_past == 0, parse_special=parse_special)
        ids = self.generate_ids(prompt, max_tokens=max_tokens, params=params, stop_ids=tokenizer.eog_ids)
        return TextGeneration(ids, tokenizer)


class TextGeneration:
    """Iterate over pieces of generated text, each of whole characters; the other attributes are Generation's."""

    def __init__(self, ids: Generation, tokenizer: Tokenizer):
        self._ids = ids
        self._stream = tokenizer.stream()
        self._pieces = self._run()

    @property
    def finish_reason(self) -> str | None:
        """Return "stop", "length", or None before the end."""
        return self._ids.finish_reason

    @property
    def tokens(self) -> list[int]:
        """Return the token ids so far."""
        return self._ids.tokens

    @property
    def timings(self) -> Timings:
        """Return how long the tokens so far took."""
        return self._ids.timings

    def _run(self) -> Iterator[str]:
        for token in self._ids:
            piece = self._stream.feed(token)
            if piece:
                yield piece
        rest = self._stream.flush()
        if rest:
            yield rest

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)


def _count(name: str, value: int, *, least: int = 1, most: int = MAX_COUNT) -> int:
    """Return a parameter that counts something.  Raises: ParameterError naming it."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ParameterError(f"{name} = {value!r} is not a whole number")
    if not least <= value <= most:
        raise ParameterError(f"{name} = {value} is not from {least} to {most}")
    return int(value)


def _cache_type(name: str, value: str) -> Type:
    try:
        return Type[value.upper()]
    except (KeyError, AttributeError):
        raise ParameterError(f"{name} = {value!r} is not a type that ggml has") from None


def _check_gpu(n_gpu_layers: int) -> None:
    """Raise BackendError if layers are asked to be on a GPU: nothing falls back silently."""
    if _count("n_gpu_layers", n_gpu_layers, least=0) == 0:
        return
    gpus = [device.name for device in Device.all() if device.type in (DeviceType.GPU, DeviceType.IGPU)]
    if not gpus:
        raise BackendError(
            f"n_gpu_layers = {n_gpu_layers}: this build has no GPU backend, or no GPU is present; "
            f"see `pyggml-adapt info` and build with -DGGML_CUDA=on, -DGGML_METAL=on, ..."
        )
    raise BackendError(f"n_gpu_layers = {n_gpu_layers}: running on {', '.join(gpus)} is not implemented yet")
