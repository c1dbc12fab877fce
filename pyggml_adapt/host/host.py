"""Host: one foundation, its adaptors, and the sessions that run on them."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from pyggml_adapt.engine.fork import first_difference
from pyggml_adapt.engine.kv_cache import KVCache
from pyggml_adapt.engine.parameters import MAX_COUNT, cache_type, check_gpu, check_name, count
from pyggml_adapt.engine.runner import Engine
from pyggml_adapt.errors import AdaptorError, ClosedError, ParameterError, StrPath
from pyggml_adapt.ggml.backend import MAX_THREADS
from pyggml_adapt.host.memory import Memory, pages_of
from pyggml_adapt.host.session import Session
from pyggml_adapt.host.text import TaskText, Texts, TextSession
from pyggml_adapt.host.text_host import TextHost
from pyggml_adapt.models import Model, model_of
from pyggml_adapt.models.hf import hf_target
from pyggml_adapt.weights.adaptor import Adaptor, AdaptorInfo, open_adaptor
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.peft import Target
from pyggml_adapt.weights.store import BASE, Recipe, WeightStore, parse_recipe
from pyggml_adapt.weights.task import Location, LowRankPart, TaskWeights

_logger = logging.getLogger(__name__)
MAX_NBYTES = 1 << 48


class Swap(NamedTuple):
    """What activate() did: how many bytes the task has of its own, and the milliseconds that re-pointing took."""

    task: str
    loaded_nbytes: int
    ms: float


class _Task:
    """What stays of a task while its adaptors come and go: its model, and its tokenizer and template once used."""

    def __init__(self, weights: TaskWeights):
        self.model = model_of(weights.metadata, weights.tensors, weights.path)
        self.text: TaskText | None = None


class Host(TextHost):
    """Serve many tasks from one foundation; safe to use from any number of threads.

    foundation: a `*-foundation.gguf`, or a complete model, which is then the task `base`.
    adaptors: task name -> path of an adaptor made for this foundation, of any kind (see load_adaptor).
    max_adaptor_bytes: of adaptors in memory, None for no limit.  An adaptor that is idle may leave, the one used
    longest ago first, and comes back when its task is used; asking for more than fits is an error.
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
        max_adaptor_bytes: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        flash_attn: bool = True,
        type_k: str = "F16",
        type_v: str = "F16",
        use_mmap: bool = True,
        use_mlock: bool = False,
    ):
        check_gpu(n_gpu_layers)
        if adaptors is not None and not isinstance(adaptors, Mapping):
            raise ParameterError(f"adaptors must map task names to paths, not be a {type(adaptors).__name__}")
        self.n_batch, self.n_ubatch = count("n_batch", n_batch), count("n_ubatch", n_ubatch)
        n_threads = None if n_threads is None else count("n_threads", n_threads, most=MAX_THREADS)
        if max_adaptor_bytes is not None:
            count("max_adaptor_bytes", max_adaptor_bytes, least=0, most=MAX_NBYTES)
        self._new_cache = functools.partial(
            KVCache,
            n_ubatch=min(self.n_batch, self.n_ubatch),
            type_k=cache_type("type_k", type_k),
            type_v=cache_type("type_v", type_v),
            flash_attn=flash_attn,
        )
        self._files = {"use_mmap": use_mmap, "use_mlock": use_mlock}
        self._lock = threading.RLock()
        self._tasks: dict[str, _Task] = {}
        self._sessions: dict[Session, TaskWeights] = {}
        self._targets: Callable[[str], Target | None] | None = None
        self._texts = Texts()
        self._active: str | None = None
        self._closed = False
        self._prefetcher: ThreadPoolExecutor | None = None
        self._engine = Engine(n_threads=n_threads, flash_attn=flash_attn)
        self._store = WeightStore(
            Foundation(foundation, **self._files), max_nbytes=max_adaptor_bytes, on_leave=self._engine.forget
        )
        try:
            if self._store.foundation.is_complete and BASE not in (adaptors or {}):
                self._define(BASE, ())
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

    @property
    def adaptors(self) -> tuple[AdaptorInfo, ...]:
        """Return the adaptors that are known, whether they are in memory now or not."""
        with self._lock:
            self._check_open()
            return tuple(adaptor.info() for adaptor in self._store.adaptors.values())

    @property
    def n_loads(self) -> int:
        """Return how often an adaptor was brought into memory: those of a budget that is too small come back often."""
        return self._store.n_loads

    def load_adaptor(self, task: str, path: StrPath, *, pin: bool = False) -> None:
        """Load an adaptor, checked against the foundation, as the task of this name.

        path: an adaptor written by `split` or `bake`, a LoRA GGUF of llama.cpp, or a directory of PEFT's.  A low-rank
        adaptor of a foundation that is no whole model becomes no task: define_task() puts it on top of one.
        pin: keep it in memory.
        Raises: FileAccessError, FileFormatError, ModelError; AdaptorError (adaptor_exists, adaptor_invalid,
        adaptor_base_mismatch, adaptor_byte_limit_exceeded).  If it fails, the host is as before.
        """
        check_name(task)
        with self._lock:
            self._check_open()
            self._store.check_new(task)
            adaptor = self._open(task, path)
            self._store.add(adaptor)
            try:
                adaptor.is_pinned = pin
                if self._store.foundation.is_complete or not adaptor.is_low_rank:
                    self._define(task, ((task, 1.0),))
            except BaseException:
                self._store.remove(task)
                raise
        _logger.info("loaded %s adaptor %s: %d bytes, %s", adaptor.kind, task, adaptor.nbytes, adaptor.path)

    def _open(self, name: str, path: StrPath) -> Adaptor:
        return open_adaptor(name, path, self._store.foundation, target_of=self._hf_target, **self._files)

    def _hf_target(self, module: str) -> Target | None:
        """Return which tensor a module of Hugging Face's model is."""
        if self._targets is None:
            if not self._tasks:
                raise AdaptorError(
                    f"{self._store.foundation.path}: the foundation is not a whole model, so load an adaptor of whole "
                    f"tensors before a PEFT directory",
                    code="adaptor_invalid",
                )
            self._targets = hf_target(next(iter(self._tasks.values())).model)
        return self._targets(module)

    def _define(self, task: str, recipe: Recipe) -> None:
        """Add a task, once its model is found sound."""
        loaded = _Task(self._store.weights_of(task, recipe))
        self._store.define(task, recipe)
        self._tasks[task] = loaded

    def define_task(self, task: str, adaptors: Sequence[str]) -> None:
        """Define a task by loaded adaptors: "name", or "name:factor" to weigh its low-rank pairs.

        One adaptor of a whole model may come first; the low-rank ones are added to it, or to the foundation, each
        multiplied by its factor.
        Raises: AdaptorError (adaptor_exists, adaptor_not_found, adaptor_invalid if they exclude each other).
        """
        check_name(task)
        if not isinstance(adaptors, (list, tuple)) or not adaptors or not all(isinstance(p, str) for p in adaptors):
            raise ParameterError(f"task {task!r}: adaptors must be a list of names, as ['code:0.7', 'sum:0.3']")
        with self._lock:
            self._check_open()
            self._store.check_new(task)
            self._define(task, parse_recipe(adaptors, self._store.adaptors))

    def unload_adaptor(self, task: str) -> None:
        """Forget an adaptor with its task, or a defined task, and give its memory back.

        Raises: AdaptorError (adaptor_not_found, or adaptor_in_use while a session or a defined task uses it).
        """
        with self._lock:
            self._check_open()
            if task not in self._store.adaptors:
                self._undefine(task)
                return
            users = self._store.users(task)
            if users:
                raise AdaptorError(
                    f"adaptor {task!r} is part of task {users[0]!r}: unload that first", code="adaptor_in_use"
                )
            n = self._store.adaptor(task).n_users
            if n:
                raise AdaptorError(f"task {task!r} is in use by {n} session(s)", code="adaptor_in_use")
            self._store.remove(task)
            self._forget(task)

    def _undefine(self, task: str) -> None:
        if not self._store.recipe(task):
            raise AdaptorError(f"task {task!r} is the foundation itself: close the host instead", code="adaptor_in_use")
        n = sum(session.task == task for session in self._sessions)
        if n:
            raise AdaptorError(f"task {task!r} is in use by {n} session(s)", code="adaptor_in_use")
        self._store.undefine(task)
        self._forget(task)

    def _forget(self, task: str) -> None:
        self._tasks.pop(task, None)
        if self._active == task:
            self._active = None

    def reload_adaptor(self, name: str) -> bool:
        """Take an adaptor's file as it is now, and return whether its content is another than before.

        Sessions that use it go on with what they began with; new ones get the new content.
        Raises: as load_adaptor(), adaptor_not_found; then the adaptor is as before.
        """
        with self._lock:
            self._check_open()
            old = self._store.adaptor(name)
            new = self._open(name, old.path)
            is_same = new.content_id == old.content_id
            if is_same and new.stamp == old.stamp:
                return False
            if is_same:
                new.check_data()
            tasks = [name, *self._store.users(name)]
            self._store.replace(new)  # the old one stays in memory while there is room for both
            try:
                loaded = {
                    task: _Task(self._store.weights_of(task, self._store.recipe(task)))
                    for task in tasks
                    if task in self._tasks
                }
            except BaseException:
                self._store.discard(self._store.replace(old))
                raise
            self._store.discard(old)
            self._tasks |= loaded
        return not is_same

    def pin(self, name: str) -> None:
        """Bring an adaptor in, and keep it in memory.

        Raises: AdaptorError (adaptor_not_found, adaptor_byte_limit_exceeded).
        """
        with self._lock:
            self._check_open()
            adaptor = self._store.adaptor(name)
            self._store.bring_in(adaptor)
            adaptor.is_pinned = True

    def unpin(self, name: str) -> None:
        """Let an adaptor leave memory when it is idle.

        Raises: AdaptorError (adaptor_not_found).
        """
        with self._lock:
            self._check_open()
            self._store.adaptor(name).is_pinned = False

    def prefetch(self, task: str) -> Future[int]:
        """Bring a task's adaptors into memory on a background thread, every page; the result is their bytes.

        Raises: AdaptorError (adaptor_not_found) at once; what goes wrong later is raised by the future's result().
        """
        with self._lock:
            self._check_open()
            self._store.recipe(task)
            if self._prefetcher is None:
                self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="pyggml_adapt-prefetch")
            return self._prefetcher.submit(self._prefetch, task)

    def _prefetch(self, task: str) -> int:
        with self._lock:
            self._check_open()
            weights = self._store.acquire(task)
        try:
            weights.check_unchanged()
            for adaptor in weights.adaptors:
                adaptor.memory.populate()
        finally:
            with self._lock:
                if not self._closed:
                    self._store.release(weights)
        return weights.own_nbytes

    def activate(self, task: str) -> Swap:
        """Make a task the one that is used where none is named, and point the kept graphs at its weights.

        Raises: AdaptorError (adaptor_not_found, adaptor_byte_limit_exceeded, adaptor_changed).
        """
        start = time.perf_counter()
        with self._lock:
            self._check_open()
            weights = self._peek(task)
            self._engine.bind(self._tasks[task].model, weights)
            self._active = task
        return Swap(task, weights.own_nbytes, (time.perf_counter() - start) * 1e3)

    def where(self, name: str, task: str | None = None) -> Location:
        """Return where the bytes of a task's tensor live: ("adaptor" or "foundation", type, nbytes, path).

        Raises: AdaptorError (adaptor_not_found, tensor_not_found).
        """
        with self._lock:
            return self._peek(self._name(task)).where(name)

    def low_rank_on(self, name: str, task: str | None = None) -> tuple[LowRankPart, ...]:
        """Return the low-rank pairs that count on a task's tensor: (path, rank, scale) each.

        Raises: AdaptorError (adaptor_not_found, tensor_not_found).
        """
        with self._lock:
            return self._peek(self._name(task)).low_rank_on(name)

    def memory(self) -> Memory:
        """Return measured bytes: pages of the mapped files, KV caches, compute buffers and the whole process."""
        with self._lock:
            self._check_open()
            ranges = {"foundation": self._store.foundation.address_range()}
            for name, adaptor in self._store.adaptors.items():
                ranges[f"adaptor {name}"] = adaptor.memory.address_range() if adaptor.is_resident else (0, 0)
            kv = sum(session.kv_nbytes for session in self._sessions)
            boundary = sum(session.boundary_nbytes for session in self._sessions)
            found, process = pages_of(ranges)  # while no other file can come to where one was
        foundation = found.pop("foundation")
        own = {key.removeprefix("adaptor "): pages for key, pages in found.items()}
        return Memory(foundation, own, kv, boundary, self._engine.compute_nbytes, process)

    def _text(self, task: str | None) -> TaskText:
        with self._lock:
            name = self._name(task)
            return self._text_of(self._tasks[name], lambda: self._peek(name))

    def _text_of(self, task: _Task, weights: Callable[[], TaskWeights]) -> TaskText:
        """Return how a task reads and writes, made when it is first asked for."""
        if task.text is None:
            task.text = self._texts.of(weights().full_metadata(), task.model.hp.n_ctx_train)
        return task.text

    def _peek(self, task: str) -> TaskWeights:
        """Return a task's weights, whose adaptors may leave at any time."""
        weights = self._store.acquire(task)
        self._store.release(weights)
        return weights

    def session(self, task: str | None = None, *, n_ctx: int | None = None, forks: Collection[str] = ()) -> TextSession:
        """Return a new session with a task, for up to n_ctx tokens, by default as many as the model was trained on.

        forks: tasks that the session will be forked to: it keeps hidden states for these, in at most as much memory as
        its KV cache takes, so that Session.fork() need not begin at the first layer.
        Raises: AdaptorError (adaptor_not_found, adaptor_byte_limit_exceeded, adaptor_changed), ParameterError,
        AllocError.
        """
        with self._lock:
            name = self._name(task)
            loaded = self._tasks[name]
            hp = loaded.model.hp
            n_ctx = count("n_ctx", min(hp.n_ctx_train, MAX_COUNT) if n_ctx is None else n_ctx)
            if n_ctx > hp.n_ctx_train:
                _logger.warning("n_ctx = %d: the model was trained on contexts of %d tokens", n_ctx, hp.n_ctx_train)
            weights = self._store.acquire(name)
            try:
                cache = self._new_cache(hp, n_ctx)
                session = TextSession(
                    functools.partial(self._text_of, loaded, lambda: weights),
                    self._engine,
                    loaded.model,
                    weights,
                    cache,
                    n_batch=self.n_batch,
                    n_ubatch=self.n_ubatch,
                    open_session=self.session,
                    on_close=self._end,
                    differences=self._differences(loaded.model, weights, forks),
                )
            except BaseException:
                self._store.release(weights)
                raise
            self._sessions[session] = weights
            return session

    def _differences(self, model: Model, weights: TaskWeights, forks: Collection[str]) -> list[int | None]:
        """Return the first layers that the tasks `forks` compute differently."""
        if isinstance(forks, str):
            raise ParameterError(f"forks must be a list of tasks, as [{forks!r}], not a text")
        names = [self._name(task) for task in forks]
        return [first_difference(model, weights, self._tasks[name].model, self._peek(name)) for name in names]

    def _name(self, task: str | None) -> str:
        """Return the task's name, the active one's for None.  Raises: AdaptorError (adaptor_not_found)."""
        self._check_open()
        name = self.active if task is None else task
        self._store.recipe(name)
        return name

    def _end(self, session: Session) -> None:
        with self._lock:
            weights = self._sessions.pop(session, None)
            if weights is not None and not self._closed:
                self._store.release(weights)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this Host is closed")

    def close(self) -> None:
        """Close sessions, threads and files; closing twice is allowed.  Raises: BusyError, as Session.close()."""
        with self._lock:
            for session in list(self._sessions):
                session.close()
            self._closed = True  # from here on nothing begins
        if self._prefetcher is not None:
            self._prefetcher.shutdown(cancel_futures=True)  # it takes the lock
        self._texts.close()
        with self._lock:
            self._tasks.clear()
            self._engine.close()
            self._store.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Host, closed>" if self._closed else f"<Host of {', '.join(self.tasks) or 'no tasks'}>"
