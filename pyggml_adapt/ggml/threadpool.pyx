"""Threads that CPU backends compute with: how many, on which processors, how urgent."""

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport Owner

import os
import threading

from pyggml_adapt.errors import BackendError, BusyError, ClosedError, ParameterError
from pyggml_adapt.ggml.enums import SchedPriority

MAX_THREADS = c.GGML_MAX_N_THREADS

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


cdef pool_free_t pool_free = <pool_free_t> find_cpu("ggml_threadpool_free")


cdef class Threadpool(Owner):
    """Own threads that CPU backends compute with: give it to Backend(threadpool=...), to several if they take turns.

    n_threads: by default as many as this process may run on.  cpumask: the numbers of the processors that the threads
    may run on, all by default; strict_cpu: each thread on one of them, in turn.  prio: a SchedPriority; above NORMAL
    the threads go before all others of the machine, which takes rights.  poll: how long an idle thread looks out for
    work before it sleeps, 0 to 100.  paused: whether the threads start asleep.
    The thread that computes is one of them meanwhile, and gets its own processors and priority back afterwards.  Where
    ggml is built with OpenMP, whose threads outlive a pool, a pool without a mask inherits the last one's.
    Raises: ParameterError for a number out of range or a processor that this process may not run on, BackendError if
    the process has no right to the priority.
    Wraps: ggml_threadpool_params_default, ggml_threadpool_new, ggml_threadpool_free.
    """

    def __cinit__(self, n_threads=None, *, cpumask=None, prio=SchedPriority.NORMAL, int poll=50, bint strict_cpu=False,
                  bint paused=False):
        cdef pool_new_t pool_new = <pool_new_t> find_cpu("ggml_threadpool_new")
        self.n_threads = check_n_threads(n_threads)
        self.prio = SchedPriority(prio)
        self.poll = poll
        self.strict_cpu = strict_cpu
        self.cpumask = None if cpumask is None else check_cpus(cpumask)
        if not 0 <= poll <= 100:
            raise ParameterError(f"poll must be 0 to 100, not {poll}")
        check_priority(self.prio)
        if pool_new == NULL or pool_free == NULL:
            raise BackendError("this build of ggml has no CPU backend with threadpools")
        cdef c.ggml_threadpool_params params = c.ggml_threadpool_params_default(self.n_threads)
        for cpu in self.cpumask or ():
            params.cpumask[<int> cpu] = True
        params.prio = <c.ggml_sched_priority> <int> self.prio
        params.poll, params.strict_cpu, params.paused = poll, strict_cpu, paused
        self._marked = self.cpumask is not None or self.prio != SchedPriority.NORMAL
        before = self.enter()
        try:
            self._ptr = pool_new(&params)
        finally:
            self.leave(before)
        if self._ptr == NULL:
            raise BackendError(f"cannot start a threadpool of {self.n_threads} threads")

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        c.ggml_backend_free(self._handle)
        self._handle = NULL
        if self._ptr != NULL:
            with nogil:
                pool_free(self._ptr)
            self._ptr = NULL

    cdef c.ggml_threadpool * ptr(self) except NULL:
        if self._ptr == NULL:
            raise ClosedError("Threadpool is closed")
        return self._ptr

    cdef object enter(self):
        """Return what leave() gives back: ggml moves the calling thread to where the pool's are, and leaves it there.

        None if there is nothing to give back.
        """
        if not self._marked or not hasattr(os, "sched_setaffinity"):
            return None
        return os.sched_getaffinity(0), os.sched_getscheduler(0), os.sched_getparam(0)

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


cdef int check_n_threads(n_threads) except -1:
    cdef int n = default_n_threads() if n_threads is None else n_threads
    if not 1 <= n <= c.GGML_MAX_N_THREADS:
        raise BackendError(f"n_threads must be 1 to {c.GGML_MAX_N_THREADS}, not {n_threads}")
    return n


cdef object check_cpus(cpumask):
    """Return the numbers of the processors as a frozenset, checked to be some that this process may run on."""
    cpus = frozenset([int(cpu) for cpu in cpumask])
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
