"""Schedulers: graphs divided over several backends."""

cimport cython

import weakref

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.backend cimport Backend
from pyggml_adapt.ggml.callback cimport arm, find_callbacks
from pyggml_adapt.ggml.context cimport (
    Context, Owner, Tensor, acquire, check_idle, count, is_view, occupy, point_operands, reach, release, vacate,
)
from pyggml_adapt.ggml.graph cimport (
    CGraph, Indices, buffers_of, check_backend_idle, check_order, check_size, check_work, check_writable, nodes_of,
    point_views, prepare, raise_status, record_order, split_norms, without_data,
)

from pyggml_adapt.errors import AllocError, BackendError, BusyError, ComputeAborted, DTypeError, ShapeError
from pyggml_adapt.ggml.status import last_log

cdef enum:
    SPARE = 64  # places in ggml's table of a graph's tensors, beyond those that are counted here


cdef c.bool ask_or_show(c.ggml_tensor * t, c.bool ask, void * sched) noexcept nogil:
    return _ask_or_show(t, ask, sched)


cdef bint _ask_or_show(c.ggml_tensor * t, bint ask, void * sched) noexcept with gil:
    return (<Sched> sched)._ask(t, ask)


@cython.no_gc_clear  # its backends are needed until it is freed
cdef class Sched(Owner):
    """Own the allocation and execution of graphs over several backends; the last must be a CPU's.

    It serves one graph, and after reset() another.  graph_size: the most nodes and leaves of a graph, together.
    Wraps: ggml_backend_sched_new, ggml_backend_sched_free.
    """

    def __cinit__(self, backends, int graph_size=2048):
        cdef c.ggml_backend_t ptrs[16]
        check_size(graph_size)
        self.graph_size = graph_size
        self.backends = tuple(backends)
        self._assigned, self._pending, self._kept = set(), [], []
        if not 1 <= len(self.backends) <= 16:
            raise BackendError(f"Sched: {len(self.backends)} backends, not 1 to 16")
        for i, backend in enumerate(self.backends):
            ptrs[i] = (<Backend?> backend).ptr()
            self.depend_on(backend)
        if (<Backend> self.backends[-1]).device.backend_name != "CPU":
            raise BackendError("Sched: the last backend must be a CPU backend")
        self._ptr = c.ggml_backend_sched_new(ptrs, NULL, len(self.backends), graph_size + SPARE, False, True)
        if self._ptr == NULL:
            raise AllocError("ggml_backend_sched_new failed")

    def __del__(self):  # while what it uses is there
        if self._ptr != NULL and self._waiting:
            self.synchronize()

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            if self._waiting:
                c.ggml_backend_sched_synchronize(self._ptr)
            c.ggml_backend_sched_free(self._ptr)
            self._ptr = NULL

    cdef bint owns(self, c.ggml_backend_buffer * buffer) noexcept:
        return self._buffers is not None and <size_t> buffer in self._buffers

    cdef int _check_split(self, CGraph graph, str doing) except -1:
        """Check that ggml can divide the graph over the backends."""
        graph.ptr()
        self.check()
        if self._served:
            raise BackendError(f"{doing}: this scheduler serves a graph already, see reset()")
        if self._n_exports:
            raise BusyError(f"{doing}: {self._n_exports} array(s) still show memory of the graph that it served")
        self._check_left(graph, doing)
        if not graph._members():  # of which ggml makes a set without memory
            raise ShapeError(f"{doing}: the graph has no nodes")
        check_idle(self)
        reach([self])
        prepare(graph)
        seen = set(self._assigned)
        count(graph._members(), seen)
        for i in range(c.ggml_graph_n_nodes(graph._ptr) if graph._n_backward else 0):
            seen.add(<size_t> c.ggml_graph_get_grad_acc(graph._ptr, c.ggml_graph_node(graph._ptr, i)))
        if len(seen) > self.graph_size:
            raise AllocError(f"a graph of {len(seen)} nodes and leaves for a scheduler of {self.graph_size}")
        point_views(graph)
        self._check_supported(graph)
        return 0

    def _check_left(self, CGraph graph, doing):
        """Check that nobody can use the graph that was divided before: its nodes may point at copies of the scheduler.

        With one backend nothing is copied, and the same graph can be divided again.
        """
        ctx = None if self._split is None else self._split()
        if ctx is None or ctx.closed or ctx is graph.ctx and len(self.backends) == 1:
            return
        raise BackendError(f"{doing}: close the Context of the graph that the scheduler had before")

    cdef int _place_leaves(self, CGraph graph) except -1:
        """Let leaves that are first seen through a view be in the memory of the CPU: ggml finds no place for them."""
        cdef c.ggml_tensor * t
        cdef Backend last = self.backends[-1]
        cdef c.ggml_tensor * acc
        cdef int i
        for i in range(c.ggml_graph_n_nodes(graph._ptr)):
            t = c.ggml_graph_node(graph._ptr, i)
            acc = c.ggml_graph_get_grad_acc(graph._ptr, t) if graph._n_backward else NULL
            if acc != NULL:  # which need not be any node's operand
                self._place_leaf(acc, last)
            if is_view(t):
                self._place_leaf(t.src[0], last)
        return 0

    cdef int _place_leaf(self, c.ggml_tensor * t, Backend last) except -1:
        if (t.op == c.GGML_OP_NONE and t.data == NULL and not t.flags & c.GGML_TENSOR_FLAG_INPUT
                and <size_t> t not in self._assigned):
            c.ggml_backend_sched_set_tensor_backend(self._ptr, t, last._ptr)
        return 0

    cdef int _check_supported(self, CGraph graph) except -1:
        """Check that there is a backend for each node, where its data is if it has some."""
        cdef c.ggml_tensor * t
        cdef c.ggml_tensor * root
        cdef Backend backend
        cdef int i
        for i in range(c.ggml_graph_n_nodes(graph._ptr)):
            t = c.ggml_graph_node(graph._ptr, i)
            if len(self.backends) > 1 and t.op != c.GGML_OP_NONE and not graph.ctx.holds(t):
                raise BackendError(f"{graph._wrap(t)!r} is computed in another Context, which only one backend can do")
            root = t if t.view_src == NULL else t.view_src
            for backend in self.backends:
                if c.ggml_backend_supports_op(backend.ptr(), t) and (
                        root.buffer == NULL
                        or c.ggml_backend_supports_buft(backend._ptr, c.ggml_backend_buffer_get_type(root.buffer))):
                    break
            else:
                raise BackendError(f"no backend of the scheduler can compute {graph._wrap(t)!r}")
        return 0

    def alloc_graph(self, CGraph graph not None):
        """Divide `graph` over the backends and allocate it.

        Raises: AllocError when there is not enough memory or the graph is larger than graph_size, BackendError for a
        second graph or a node that no backend can compute, ClosedError if an operand from another Context has no data,
        ShapeError if the graph has no nodes, or all that has no data yet is empty.
        Wraps: ggml_backend_sched_alloc_graph.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        cdef bint ok
        self._check_split(graph, "alloc_graph")
        check_writable(graph, reach([graph.ctx]))
        self._indices = Indices(graph)  # before leaves are replaced by copies on other backends
        graph._callbacks = find_callbacks(g)
        self._members = set()
        count(nodes_of(graph), self._members)
        self._served = True
        self._split = weakref.ref(graph.ctx)
        waiting = without_data(graph)
        graph.ctx.depend_on(self)
        self._place_leaves(graph)
        ok = c.ggml_backend_sched_alloc_graph(self._ptr, g)  # with the GIL, as GAllocr's
        if not ok:
            raise AllocError(f"no memory for a graph of {graph.n_nodes} nodes: {last_log()}")
        self._buffers = buffers_of(waiting)
        record_order(self, graph, waiting)
        graph._sched, graph._supported_by = self, None
        self._n_nodes = graph.n_nodes

    def reserve(self, CGraph graph not None):
        """Allocate the memory that `graph` needs, and none of its tensors: as large as any graph to come, it is best.

        With several backends its Context must be closed before the scheduler can serve a graph.
        Raises: as alloc_graph().
        Wraps: ggml_backend_sched_reserve.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        self._check_split(graph, "reserve")
        self._split = weakref.ref(graph.ctx)
        graph.ctx.depend_on(self)
        self._place_leaves(graph)
        ok = c.ggml_backend_sched_reserve(self._ptr, g)
        self.forget_layout()
        self._forget()
        if not ok:
            raise AllocError(f"no memory for a graph of {graph.n_nodes} nodes: {last_log()}")

    def reset(self):
        """Let go of the graph, whose Context must be closed, so that the scheduler can serve another one.

        What tensors were assigned to is forgotten too.
        Raises: BackendError if the graph's Context is open: its tensors' data would be the next graph's; BusyError
        while an array shows some of it, or a computation runs; ClosedError if one of its backends was closed.
        Wraps: ggml_backend_sched_reset.
        """
        self.check()
        check_idle(self)
        if self._served and self._split() is not None and not self._split().closed:
            raise BackendError("reset: close the Context of the scheduler's graph first")
        if self._n_exports:
            raise BusyError(f"Sched cannot be reset: {self._n_exports} array(s) still show its memory")
        self.forget_layout()
        self._served = False
        self.order = self.shared = None
        self._buffers = self._indices = self._members = None
        self._forget()

    cdef int forget_layout(self) except -1:
        """Reset ggml's scheduler, and let it lay out the next graph anew, not as one that had as many nodes before."""
        cdef Context ctx = Context(Context.size_for(1, 1))
        cdef CGraph graph = CGraph(ctx, 1)
        reach([self])  # its backends
        c.ggml_build_forward_expand(graph._ptr, c.ggml_arange(ctx.room(1), 0, 1, 1))
        c.ggml_backend_sched_reset(self._ptr)
        if not c.ggml_backend_sched_reserve(self._ptr, graph._ptr):
            raise AllocError(f"no memory for a graph of one number: {last_log()}")
        return 0

    def _forget(self):
        self._assigned.clear()
        self._kept.clear()

    def set_tensor_backend(self, Tensor node not None, Backend backend not None):
        """Let `node` be computed on that backend, or on one before it that has the same memory, see alloc_graph().

        Raises: BackendError if the backend is not the scheduler's, cannot compute the node or use the data that it has,
        or if a graph is served already; ShapeError for a view, which is where its data is.
        Wraps: ggml_backend_sched_set_tensor_backend.
        """
        cdef c.ggml_tensor * t = node.ptr()
        self.check()
        check_idle(self)
        reach([node.ctx])  # whether its op is supported depends on where its operands are
        point_operands(t)
        if self._served:
            raise BackendError("set_tensor_backend: this scheduler serves a graph already, see reset()")
        if backend not in self.backends:
            raise BackendError(f"set_tensor_backend: {backend!r} is none of the scheduler's")
        if t.view_src != NULL:
            raise ShapeError(f"set_tensor_backend: tensor {node.name!r} is a view")
        if not c.ggml_backend_supports_op(backend.ptr(), t) or t.buffer != NULL and not c.ggml_backend_supports_buft(
                backend._ptr, c.ggml_backend_buffer_get_type(t.buffer)):
            raise BackendError(f"{backend.name} cannot compute {node!r}")
        if len(self._assigned) >= self.graph_size:
            raise AllocError(f"{len(self._assigned)} nodes are assigned for a scheduler of {self.graph_size}")
        self._assigned.add(<size_t> t)
        self._kept.append(node)  # the address is another tensor's once this one is gone
        c.ggml_backend_sched_set_tensor_backend(self._ptr, t, backend._ptr)

    def get_tensor_backend(self, Tensor node not None):
        """Return the backend that a node, or leaf, of the graph was given to, None if none.

        Raises: BackendError if it is not in the graph that alloc_graph() was called with.
        Wraps: ggml_backend_sched_get_tensor_backend.
        """
        cdef c.ggml_tensor * t = node.ptr()
        cdef c.ggml_backend_t found
        self.check()
        if not self._served or <size_t> t not in self._members:
            raise BackendError(f"get_tensor_backend: tensor {node.name!r} is not in the scheduler's graph")
        found = c.ggml_backend_sched_get_tensor_backend(self._ptr, t)
        for backend in self.backends:
            if (<Backend> backend)._ptr == found:
                return backend
        return None

    @property
    def eval_callback(self):
        """What compute() calls for each node, as f(tensor, ask), None if nothing.

        With ask True it returns whether it wants to see the node; then, with ask False, it is shown each such node once
        it has been computed, and may read its data.  What it raises comes out of compute(); if it returns False when
        shown one, compute() raises ComputeAborted.  Either way the rest is not computed.
        Wraps: ggml_backend_sched_set_eval_callback.
        """
        return self._eval

    @eval_callback.setter
    def eval_callback(self, value):
        self.check()
        check_idle(self)
        if value is not None and not callable(value):
            raise DTypeError(f"eval_callback must be callable, not a {type(value).__name__}")
        self._eval = value
        if value is None:
            c.ggml_backend_sched_set_eval_callback(self._ptr, NULL, NULL)
        else:
            c.ggml_backend_sched_set_eval_callback(self._ptr, ask_or_show, <void *> self)

    cdef int _ask(self, c.ggml_tensor * t, bint ask) noexcept:
        """Return what eval_callback says of node t; once it has failed, that everything is wanted, and then to stop."""
        if self._stopped:
            return ask
        try:
            value = self._eval(self._showing._wrap(t), ask)
            if ask or value is not False:
                return bool(value) if ask else True
        except BaseException as exc:
            self._error = exc
        self._stopped = True
        for backend in self.backends:
            (<Backend> backend)._flags[1] = 1
        return ask

    cdef list _check_compute(self, CGraph graph):
        """Return the owners of what the graph uses, acquired, when it can be computed."""
        graph.ptr()
        self.check()
        if graph._sched is not self or not self._served or graph.n_nodes != self._n_nodes:
            raise BackendError("compute: the graph was not allocated by this scheduler, or has grown since")
        graph.check_nodes_idle()
        for backend in self.backends:
            check_backend_idle(backend)
        owners = occupy([graph.ctx, self])
        try:
            if not graph.was_checked(self, owners):
                point_views(graph)
                check_writable(graph, owners)
                check_order(graph, owners)
                split_norms(graph)
                for backend in self.backends:
                    check_work(graph, backend)
                graph.remember(self, owners)
            graph.check_alone(owners)
            self._indices.read(graph)
            if graph._callbacks or self._eval is not None:
                arm(graph._callbacks, graph.ctx, self.backends)
        except BaseException:
            vacate(owners)
            raise
        self._showing, self._error, self._stopped = graph, None, False
        return owners

    cdef c.ggml_status _run(self, CGraph graph, bint wait) except *:
        """Compute, each backend's threads where they belong."""
        cdef c.ggml_status status
        cdef Backend backend
        before = []
        try:
            graph.lend(self._indices)
            for backend in self.backends:
                if backend.threadpool is not None:
                    before.append((backend, backend.threadpool.enter()))
            with nogil:
                if wait:
                    status = c.ggml_backend_sched_graph_compute(self._ptr, graph._ptr)
                else:
                    status = c.ggml_backend_sched_graph_compute_async(self._ptr, graph._ptr)
        finally:
            graph.restore(self._indices)
            for backend, each in reversed(before):
                backend.threadpool.leave(each)
        return status

    cdef int _end(self, CGraph graph, c.ggml_status status) except -1:
        """Raise what a callback has raised, or what the status says."""
        cdef bint stopped = self._stopped
        error, self._error, self._showing = self._error, None, None
        if self._eval is not None:
            for backend in self.backends:
                (<Backend> backend)._flags[1] = 0
        if error is not None:
            raise error
        if stopped:
            raise ComputeAborted("sched graph compute: stopped by its eval callback")
        return raise_status(graph, status, "sched graph compute")

    def compute(self, CGraph graph not None):
        """Compute a graph that alloc_graph allocated.  Releases the GIL.

        Raises: as CGraph.compute; what eval_callback raises.
        Wraps: ggml_backend_sched_graph_compute.
        """
        cdef c.ggml_status status
        owners = self._check_compute(graph)
        try:
            status = self._run(graph, True)
        finally:
            vacate(owners)
        self._end(graph, status)

    def compute_async(self, CGraph graph not None):
        """Start computing a graph that alloc_graph allocated; synchronize() waits for the end.  Releases the GIL.

        Until then everything that the graph uses is in use, and cannot be closed.
        Raises: as compute().
        Wraps: ggml_backend_sched_graph_compute_async.
        """
        cdef c.ggml_status status
        owners = self._check_compute(graph)
        try:
            status = self._run(graph, False)
        except BaseException:
            vacate(owners)
            raise
        self._pending.append(owners)
        self._waiting = True
        self._end(graph, status)

    def synchronize(self):
        """Wait until what compute_async() started has been computed.  Releases the GIL.

        Raises: ClosedError if it was closed, or one of its backends.
        Wraps: ggml_backend_sched_synchronize.
        """
        owners = acquire([self])
        with nogil:
            c.ggml_backend_sched_synchronize(self._ptr)
        release(owners)
        self._waiting = False
        while self._pending:
            vacate(self._pending.pop())

    @property
    def n_splits(self):
        """Return into how many parts the last graph was divided.  Wraps: ggml_backend_sched_get_n_splits."""
        self.check()
        return c.ggml_backend_sched_get_n_splits(self._ptr)

    @property
    def n_copies(self):
        """Return how many copies of its inputs a graph has, to fill one while another is used: 1.

        Wraps: ggml_backend_sched_get_n_copies.
        """
        self.check()
        return c.ggml_backend_sched_get_n_copies(self._ptr)

    def get_buffer_size(self, Backend backend not None):
        """Return the bytes that were allocated for one of the backends.

        Raises: BackendError if it is none of the scheduler's.
        Wraps: ggml_backend_sched_get_buffer_size.
        """
        self.check()
        if backend not in self.backends:
            raise BackendError(f"get_buffer_size: {backend!r} is none of the scheduler's")
        return c.ggml_backend_sched_get_buffer_size(self._ptr, backend.ptr())
