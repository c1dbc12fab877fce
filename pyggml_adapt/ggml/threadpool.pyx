"""Threads that CPU backends compute with: how many, on which processors, how urgent."""

cimport cython

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport Owner

import os
import threading
import weakref
from operator import index

from pyggml_adapt.errors import BackendError, BusyError, ClosedError, ParameterError
from pyggml_adapt.ggml.enums import SchedPriority

MAX_THREADS = c.GGML_MAX_N_THREADS

cdef extern from *:
    """
    #include <unistd.h>
    static _Thread_local int pyggml_adapt_pid = 0;
    """
    int own_pid "pyggml_adapt_pid"  # the process in which this thread first computed with OpenMP's
    int getpid() nogil

ctypedef c.ggml_threadpool * (*pool_new_t)(c.ggml_threadpool_params *) noexcept nogil
ctypedef void (*pool_free_t)(c.ggml_threadpool *) noexcept nogil
ctypedef void (*pool_set_t)(c.ggml_backend_t, c.ggml_threadpool *) noexcept nogil


cdef c.ggml_backend_dev_t cpu_device() noexcept:
    cdef size_t i
    for i in range(c.ggml_backend_dev_count()):
        if c.ggml_backend_dev_get_type(c.ggml_backend_dev_get(i)) == c.GGML_BACKEND_DEVICE_TYPE_CPU:
            return c.ggml_backend_dev_get(i)
    return NULL


cdef void * find_cpu(const char * name) noexcept:
    """Return the function of the CPU backend that has this name, NULL if there is none."""
    cdef c.ggml_backend_dev_t cpu = cpu_device()
    return NULL if cpu == NULL else c.ggml_backend_reg_get_proc_address(c.ggml_backend_dev_backend_reg(cpu), name)


cdef int check_can_start(int n) except -1:
    """Check that this process may have n threads more: where it may not, OpenMP ends it, and so does ggml.

    Raises: BackendError.
    """
    started, end = [], threading.Event()
    try:
        for _ in range(n):
            thread = threading.Thread(target=end.wait)
            thread.start()
            started.append(thread)
    except RuntimeError as exc:
        raise BackendError(f"this process cannot start {n} threads more, only {len(started)}") from exc
    finally:
        end.set()
        for thread in started:
            thread.join()
    return 0


cdef bint find_openmp() except -1:
    """Return whether the CPU backend takes its threads from OpenMP."""
    cdef c.ggml_backend_get_features_t get = <c.ggml_backend_get_features_t> find_cpu("ggml_backend_get_features")
    if get == NULL:
        return False
    cdef c.ggml_backend_feature * feature = get(c.ggml_backend_dev_backend_reg(cpu_device()))
    while feature.name != NULL:
        if <bytes> feature.name == b"OPENMP":
            return True
        feature += 1
    return False


cdef pool_free_t pool_free = <pool_free_t> find_cpu("ggml_threadpool_free")
cdef bint has_openmp = find_openmp()
_pools = weakref.WeakSet()


def _after_fork():
    """Take pools for closed whose threads are in the parent process only: to wait for them would have no end."""
    cdef Threadpool pool
    for pool in list(_pools):
        if pool.n_threads > 1 and not has_openmp:
            pool._ptr = NULL


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cython.final
cdef class Threadpool(Owner):
    """Own threads that CPU backends compute with: give it to Backend(threadpool=...), to several if they take turns.

    n_threads: by default as many as this process may run on.  cpumask: the numbers of the processors that the threads
    may run on, all by default; strict_cpu: each thread on one of them, in turn.  prio: a SchedPriority; above NORMAL
    the threads go before all others of the machine, which takes rights.  poll: how long an idle thread looks out for
    work before it sleeps, 0 to 100.  paused: whether the threads start asleep.
    The thread that computes is one of them meanwhile, and gets its own processors and priority back afterwards.  Where
    ggml is built with OpenMP, whose threads outlive a pool, a pool without a mask inherits the last one's.
    Threads do not come along when the process forks: in the child a pool of more than one is closed or, with OpenMP,
    cannot compute on a thread that has computed before; start such a process otherwise.
    Raises: ParameterError for a number out of range or a processor that this process may not run on, BackendError if
    the process has no right to the priority, or to as many threads.
    Wraps: ggml_threadpool_params_default, ggml_threadpool_new, ggml_threadpool_free.
    """

    def __cinit__(self, n_threads=None, *, cpumask=None, prio=SchedPriority.NORMAL, poll=50, bint strict_cpu=False,
                  bint paused=False):
        cdef pool_new_t pool_new = <pool_new_t> find_cpu("ggml_threadpool_new")
        self.n_threads = check_n_threads(n_threads)
        self.prio = SchedPriority(prio)
        self.strict_cpu = strict_cpu
        self.cpumask = None if cpumask is None else check_cpus(cpumask)
        if not 0 <= index(poll) <= 100:
            raise ParameterError(f"poll must be 0 to 100, not {poll}")
        self.poll = poll
        check_priority(self.prio)
        if pool_new == NULL or pool_free == NULL:
            raise BackendError("this build of ggml has no CPU backend with threadpools")
        cdef c.ggml_threadpool_params params = c.ggml_threadpool_params_default(self.n_threads)
        for cpu in self.cpumask or ():
            params.cpumask[<int> cpu] = True
        check_can_start(self.n_threads - 1)
        params.prio = <c.ggml_sched_priority> <int> self.prio
        params.poll, params.strict_cpu, params.paused = self.poll, strict_cpu, paused
        self._marked = self.cpumask is not None or self.prio != SchedPriority.NORMAL
        before = place_of(self)
        try:
            self._ptr = pool_new(&params)
        finally:
            self.leave(before)
        if self._ptr == NULL:
            raise BackendError(f"cannot start a threadpool of {self.n_threads} threads")
        _pools.add(self)

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        cdef c.ggml_threadpool * ptr = self._ptr
        c.ggml_backend_free(self._handle)
        self._handle, self._ptr = NULL, NULL  # before another thread can run
        if ptr != NULL:
            with nogil:
                pool_free(ptr)

    cdef c.ggml_threadpool * ptr(self) except NULL:
        if self._ptr == NULL:
            raise ClosedError("Threadpool is closed")
        return self._ptr

    cdef object enter(self):
        """Return what leave() gives back: ggml moves the calling thread to where the pool's are, and leaves it there.

        None if there is nothing to give back.
        Raises: BackendError in a process that was forked from one that this thread has computed in with OpenMP.
        """
        global own_pid
        if has_openmp and self.n_threads > 1:
            if own_pid != 0 and own_pid != getpid():
                raise BackendError(f"a forked process has none of OpenMP's threads: it cannot compute with "
                                   f"{self.n_threads}, but with one")
            own_pid = getpid()
        return place_of(self)

    cdef int leave(self, object before) except -1:
        if before is not None:
            os.sched_setscheduler(0, before[1], before[2])
            os.sched_setaffinity(0, before[0])
        return 0

    def pause(self):
        """Let the threads sleep until the next computation.

        Raises: BusyError while a thread computes with it.
        Wraps: ggml_backend_cpu_set_threadpool, which pauses a pool that it takes away: ggml_threadpool_pause is out of
        reach where backends are loaded at run time.
        """
        cdef pool_set_t pool_set = <pool_set_t> find_cpu("ggml_backend_cpu_set_threadpool")
        self.ptr()
        if self._in_use:
            raise BusyError("Threadpool is in use by a computation that has not ended")
        if self._handle == NULL:
            self._handle = c.ggml_backend_dev_init(cpu_device(), NULL)
        if self._handle == NULL or pool_set == NULL:
            raise BackendError("cannot pause a threadpool: the CPU backend has none")
        pool_set(self._handle, self._ptr)
        pool_set(self._handle, NULL)

    def resume(self):
        """Wake the threads, as the next computation would do: an empty graph is computed.

        Raises: BusyError while a thread computes with it.
        """
        cdef pool_set_t pool_set = <pool_set_t> find_cpu("ggml_backend_cpu_set_threadpool")
        self.pause()  # makes the handle
        cdef c.ggml_context * ctx = c.ggml_init(
            c.ggml_init_params(c.ggml_graph_overhead_custom(1, False), NULL, True))
        if ctx == NULL:
            raise BackendError("cannot resume a threadpool: no memory")
        cdef c.ggml_cgraph * graph = c.ggml_new_graph_custom(ctx, 1, False)
        before = self.enter()
        self._in_use += 1
        pool_set(self._handle, self._ptr)
        with nogil:
            c.ggml_backend_graph_compute(self._handle, graph)
            c.ggml_free(ctx)
        self._in_use -= 1
        # the handle keeps the pool: taking it away again would pause it
        self.leave(before)

    def __repr__(self):
        if self._ptr == NULL:
            return "<Threadpool, closed>"
        cpus = "" if self.cpumask is None else f" on processors {sorted(self.cpumask)}"
        return f"<Threadpool of {self.n_threads} threads{cpus}, {self.prio.name}>"


cdef object place_of(Threadpool pool):
    """Return what the calling thread has to get back after it was one of the pool's, None if nothing."""
    if not pool._marked or not hasattr(os, "sched_setaffinity"):
        return None
    return os.sched_getaffinity(0), os.sched_getscheduler(0), os.sched_getparam(0)


cdef int check_n_threads(n_threads) except -1:
    cdef int n
    try:
        n = default_n_threads() if n_threads is None else index(n_threads)
    except OverflowError:
        n = 0
    if not 1 <= n <= c.GGML_MAX_N_THREADS:
        raise BackendError(f"n_threads must be 1 to {c.GGML_MAX_N_THREADS}, not {n_threads}")
    return n


cdef object check_cpus(cpumask):
    """Return the numbers of the processors as a frozenset, checked to be some that this process may run on."""
    cpus = frozenset([index(cpu) for cpu in cpumask])
    if not cpus:
        raise ParameterError("cpumask names no processor")
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for cpu in sorted(cpus):
        if cpu not in allowed or not 0 <= cpu < c.GGML_MAX_N_THREADS:
            raise ParameterError(f"cpumask: this process may not run on processor {cpu}, only on {sorted(allowed)}")
    return cpus


def check_priority(prio):
    """Check that this process may have threads of that priority: ggml would go on without, with a line on stderr."""
    if prio in (SchedPriority.NORMAL, SchedPriority.LOW) or not hasattr(os, "sched_setscheduler"):
        return
    refused = []

    def attempt():
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        except OSError as exc:
            refused.append(exc.strerror)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if refused:
        raise BackendError(f"prio: this process may not have threads of priority {prio.name}: {refused[0]}")


def default_n_threads():
    """Return the number of processors that this process may run on."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
               c.GGML_MAX_N_THREADS)
