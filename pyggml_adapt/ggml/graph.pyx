"""Graphs, their gradients, and what allocates and computes them."""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.backend cimport Backend, BufferType
from pyggml_adapt.ggml.callback cimport arm, disarm, find_callbacks
from pyggml_adapt.ggml.context cimport Context, Owner, Tensor, acquire, count, reach, release
from pyggml_adapt.ggml.status cimport check

import os
import tempfile

from pyggml_adapt.errors import (
    AllocError, BackendError, BusyError, ClosedError, DTypeError, FileAccessError, IndexRangeError, ShapeError,
)
from pyggml_adapt.ggml.status import last_log


include "graph_checks.pxi"
include "backward.pxi"


cdef int raise_status(CGraph graph, c.ggml_status status, str doing) except -1:
    """Raise what a Callback of the graph has raised, or what the status says."""
    if graph._callbacks:
        error = disarm(graph._callbacks)
        if error is not None:
            raise error
    return check(status, doing)


cdef int check_room(Context ctx, int size, bint grads) except -1:
    if c.ggml_used_mem(ctx.ptr()) + c.ggml_graph_overhead_custom(size, grads) > ctx.mem_size:
        raise AllocError(f"Context of {ctx.mem_size} bytes has no room for a graph of {size} nodes")
    return 0


cdef class CGraph:
    """Borrow a graph that lives in a Context: the nodes to compute, in order, which it iterates over.

    size: the most nodes, and the most leaves, that it can take, up to 32768.  grads: whether it can take gradients too,
    see build_backward().
    Raises: AllocError if the Context has no room, see Context.size_for.
    Wraps: ggml_new_graph_custom.
    """

    def __cinit__(self, Context ctx not None, int size=2048, *, bint grads=False):
        check_size(size)
        check_room(ctx, size, grads)
        self.ctx, self.size, self.grads = ctx, size, grads
        self._ptr = c.ggml_new_graph_custom(ctx.ptr(), size, grads)

    cdef c.ggml_cgraph * ptr(self) except NULL:
        self.ctx.ptr()
        return self._ptr

    def expand(self, Tensor tensor not None):
        """Add `tensor` and everything that it is computed from, unless they are in the graph already.

        Raises: AllocError if the graph is too small.
        Wraps: ggml_build_forward_expand.
        """
        cdef c.ggml_tensor * t = tensor.ptr()
        if tensor.ctx is not self.ctx:
            raise ShapeError(f"expand: tensor {tensor.name!r} belongs to another Context than the graph")
        self.ptr()
        check_idle(self.ctx)
        reach([self.ctx])
        if self.ctx.n_tensors + self.ctx.n_foreign > <size_t> self.size:
            seen = {<size_t> t}
            n_leaves = count(nodes_of(self) + [<size_t> t], seen)
            if max(n_leaves, len(seen) - n_leaves) > self.size:
                raise AllocError(f"a graph of {self.size} nodes is too small for {tensor.name!r} and its operands")
        self._changed()
        if t.op == c.GGML_OP_NONE:  # no node's operand yet: a scheduler finds no place for it otherwise
            c.ggml_set_input(t)
        c.ggml_build_forward_expand(self._ptr, t)
        return tensor

    cdef int _changed(self) except -1:
        """Forget what was checked."""
        self._supported_by = None
        return 0

    @property
    def n_nodes(self):
        """Return how many nodes it has.  Wraps: ggml_graph_n_nodes."""
        return c.ggml_graph_n_nodes(self.ptr())

    def __len__(self):
        return self.n_nodes

    def __iter__(self):
        return iter([self.node(i) for i in range(self.n_nodes)])

    def node(self, int i):
        """Return node i; negative counts from the end.

        Raises: IndexError.  Wraps: ggml_graph_node.
        """
        cdef int n = c.ggml_graph_n_nodes(self.ptr())
        if not -n <= i < n:
            raise IndexError(f"node {i} of a graph of {n} nodes")
        return self._wrap(c.ggml_graph_node(self._ptr, i))

    def tensor(self, str name not None):
        """Return the node or leaf with this name, or None.  Wraps: ggml_graph_get_tensor."""
        reach([self.ctx])
        cdef c.ggml_tensor * t = c.ggml_graph_get_tensor(self.ptr(), name.encode())
        return None if t == NULL else self._wrap(t)

    def clear(self):
        """Take every node and leaf out; the tensors stay in the Context.  Wraps: ggml_graph_clear."""
        cdef c.ggml_cgraph * graph = self.ptr()
        check_idle(self.ctx)
        self._changed()
        self._n_cleared += 1
        self._n_backward = 0
        self._sched = None
        c.ggml_graph_clear(graph)

    def cpy(self, CGraph dst not None):
        """Let dst have the same nodes, leaves and gradients, instead of its own; both then share the tensors.

        Raises: ShapeError if dst is smaller, or has no gradients and this has.
        Wraps: ggml_graph_cpy.
        """
        cdef c.ggml_cgraph * graph = self.ptr()
        reach([self.ctx])
        check_idle(self.ctx)
        if dst is self:
            return
        if dst.size < self.size or self.grads and not dst.grads:
            raise ShapeError(f"cpy: a graph of {dst.size} nodes{'' if dst.grads else ' without gradients'} for one of "
                             f"{self.size}{' with gradients' if self.grads else ''}")
        dst.clear()
        c.ggml_graph_cpy(graph, dst._ptr)
        dst._n_backward = self._n_backward
        if dst.ctx is not self.ctx:
            dst.ctx.depend_on(self.ctx)
            dst.ctx.n_foreign += 2 * self.size

    def dup(self, Context ctx=None, *, bint grads=False):
        """Return a graph of the same nodes and leaves, which lives in ctx, by default in the same Context.

        grads: whether it can take gradients even if this one cannot.
        Raises: AllocError if the Context has no room.
        Wraps: ggml_graph_dup.
        """
        reach([self.ctx])
        cdef CGraph graph = CGraph(self.ctx if ctx is None else ctx, self.size, grads=grads or self.grads)
        self.cpy(graph)
        return graph

    def build_backward(self):
        """Add the nodes that compute the gradients of the losses by the parameters, see Tensor.set_param, set_loss.

        The gradient of each loss by itself is a leaf, that reset() fills after the graph has been allocated: mark what
        is wanted as outputs first, grad(parameter).set_output().  The graph and its Context need room for 8 tensors
        for each node that parameters take part in.
        Raises: ShapeError if ggml has no gradient for a node, or no parameter or loss is there; DTypeError if a node is
        not F32; AllocError if there is no room; BackendError for a graph without gradients, or a second time.
        Wraps: ggml_build_backward_expand.
        """
        cdef c.ggml_cgraph * graph = self.ptr()
        cdef c.ggml_context * ctx
        if not self.grads or self._n_backward:
            raise BackendError("build_backward: the graph was made without grads=True" if not self.grads else
                               "build_backward: the graph has its gradients already")
        check_idle(self.ctx)
        reach([self.ctx])
        trained = find_trained(self)
        check_backward(self, trained)
        seen = set()
        n_leaves = count(nodes_of(self), seen)
        n_new = MAX_PER_NODE * len(trained) + 1
        if max(n_leaves, len(seen)) + n_new > self.size:
            raise AllocError(f"a graph of {self.size} nodes is too small for {n_new} more")
        ctx = self.ctx.room(n_new)
        self._changed()
        self._n_backward = c.ggml_graph_n_nodes(graph)
        c.ggml_build_backward_expand(ctx, graph, NULL)

    def grad(self, Tensor tensor not None):
        """Return the gradient of the losses by `tensor`, None if it has none.  Wraps: ggml_graph_get_grad."""
        cdef c.ggml_tensor * t = c.ggml_graph_get_grad(self.ptr(), tensor.ptr()) if self._n_backward else NULL
        return None if t == NULL else self._wrap(t)

    def grad_acc(self, Tensor tensor not None):
        """Return the leaf that the gradient by a loss is added up in, else None.  Wraps: ggml_graph_get_grad_acc."""
        cdef c.ggml_tensor * t = c.ggml_graph_get_grad_acc(self.ptr(), tensor.ptr()) if self._n_backward else NULL
        return None if t == NULL else self._wrap(t)

    def reset(self):
        """Let the gradient of each loss by itself be 1, and AdamW's moments 0: needed before each computation.

        Raises: BackendError for a graph without gradients; ClosedError before it is allocated.
        Wraps: ggml_graph_reset.
        """
        cdef c.ggml_cgraph * graph = self.ptr()
        cdef c.ggml_tensor * t
        cdef c.ggml_tensor * acc
        if not self._n_backward:
            raise BackendError("reset: the graph has no gradients, see build_backward")
        check_idle(self.ctx)
        check_writable(self, reach([self.ctx]))
        for i in range(c.ggml_graph_n_nodes(graph)):
            t = c.ggml_graph_node(graph, i)
            acc = c.ggml_graph_get_grad_acc(graph, t)
            need = [<size_t> acc] if acc != NULL else []
            if t.op == c.GGML_OP_OPT_STEP_ADAMW:
                need += [<size_t> t.src[2], <size_t> t.src[3]]
            for address in need:
                check_data(self, <c.ggml_tensor *> <size_t> address)
        c.ggml_graph_reset(graph)

    def dump_dot(self, path, CGraph forward=None):
        """Write the graph as a drawing for Graphviz; nodes that are in `forward`, and have a gradient, are green.

        Raises: FileAccessError if the file cannot be written.
        Wraps: ggml_graph_dump_dot.
        """
        cdef c.ggml_cgraph * graph = self.ptr()
        cdef c.ggml_cgraph * other = NULL if forward is None else forward.ptr()
        cdef bytes name = os.fsencode(path)
        reach([self.ctx] if forward is None else [self.ctx, forward.ctx])
        try:
            with open(path, "w"):  # ggml aborts if it cannot open the file
                pass
        except OSError as exc:
            raise FileAccessError.of(path, exc) from exc
        c.ggml_graph_dump_dot(graph, other, name)

    def to_dot(self, CGraph forward=None):
        """Return what dump_dot() writes."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "graph.dot")
            self.dump_dot(path, forward)
            with open(path, encoding="utf-8", errors="replace") as f:
                return f.read()

    cdef Tensor _wrap(self, c.ggml_tensor * t):
        return self.ctx.home(t).wrap(t)

    cdef int _check_node(self, Backend backend, c.ggml_tensor * t) except -1:
        """Raise unless the node and its operands have data where the backend can use it, and the backend has the op."""
        cdef c.ggml_tensor * src
        cdef int k
        if not c.ggml_backend_supports_op(backend.ptr(), t):
            raise BackendError(f"{backend.name} cannot compute {self._wrap(t)!r} "
                               f"from {[self._wrap(t.src[k]) for k in range(c.GGML_MAX_SRC) if t.src[k]]}")
        for k in range(c.GGML_MAX_SRC + 1):
            src = t.src[k] if k < c.GGML_MAX_SRC else t
            if src == NULL or not c.ggml_nbytes(src):
                continue
            check_data(self, src)
            buft = c.ggml_backend_buffer_get_type(root_of(src).buffer)
            if not c.ggml_backend_supports_buft(backend._ptr, buft):
                raise BackendError(f"{backend.name} cannot compute with the data of {self._wrap(src)!r}")
        return 0

    cdef int _check_supported(self, Backend backend, list owners) except -1:
        """Raise unless the backend can compute every node; remembered until the graph grows."""
        cdef int i
        if self._supported_by is backend:
            return 0
        for i in range(c.ggml_graph_n_nodes(self._ptr)):
            self._check_node(backend, c.ggml_graph_node(self._ptr, i))
        check_writable(self, owners)
        self._indices = find_indices(self)
        self._callbacks = find_callbacks(self._ptr)
        self._supported_by = backend
        return 0

    cdef c.ggml_status _compute_into(self, Backend backend, Tensor result, out) except *:
        """Compute, and leave the bytes of `result` in the buffer `out`."""
        cdef Py_buffer view
        cdef c.ggml_tensor * t
        cdef void * own
        cdef c.ggml_status status
        cdef int last = c.ggml_graph_n_nodes(self._ptr) - 1
        cdef bint at_once
        if result.ctx is not self.ctx:
            raise ShapeError(f"compute: tensor {result.name!r} belongs to another Context than the graph")
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            t = result.range(0, 0)
            own = t.data
            if <size_t> view.len != c.ggml_nbytes(t):
                raise ShapeError(f"compute: {view.len} bytes for tensor {result.name!r} of {c.ggml_nbytes(t)}")
            # of the last node no other reads, so a CPU can as well write it elsewhere; device memory goes by address
            at_once = (backend.threadpool is not None and t.view_src == NULL and not self._callbacks
                       and last >= 0 and t == c.ggml_graph_node(self._ptr, last))
            if at_once:
                t.data = view.buf
            with nogil:
                status = c.ggml_backend_graph_compute(backend._ptr, self._ptr)
                t.data = own
                if not at_once and status == c.GGML_STATUS_SUCCESS:
                    c.ggml_backend_tensor_get(t, view.buf, 0, view.len)
        finally:
            PyBuffer_Release(&view)
        return status

    def compute(self, Backend backend not None, Tensor result=None, out=None):
        """Compute every node.  Releases the GIL.

        result, out: a contiguous tensor, and the writable contiguous buffer that its bytes are wanted in; of the last
        node they are not copied but computed there.
        Raises: ShapeError if `out` has another size or `result` another Context; ClosedError if an owner of a tensor
        was closed, BackendError if the backend cannot compute a node, IndexRangeError if an input picks a row or expert
        that is not there, BusyError if another thread computes with the backend or the graph, ComputeAborted if the
        backend's abort flag was set.
        Wraps: ggml_backend_graph_compute.
        """
        cdef c.ggml_cgraph * graph = self.ptr()
        cdef c.ggml_backend_t b = backend.ptr()
        cdef c.ggml_status status
        cdef list owners = [self.ctx, backend]
        check_idle(self.ctx)
        check_backend_idle(backend)
        before = None
        owners = acquire(owners)
        try:
            self._check_supported(backend, owners)
            check_indices(self, self._indices)
            if self._callbacks:
                arm(self._callbacks, self.ctx, [backend])
            if backend.threadpool is not None:
                before = backend.threadpool.enter()
            if result is not None:
                status = self._compute_into(backend, result, out)
            else:
                with nogil:
                    status = c.ggml_backend_graph_compute(b, graph)
        finally:
            if before is not None:
                backend.threadpool.leave(before)
            release(owners)
        raise_status(self, status, "graph compute")

    def compute_async(self, Backend backend not None):
        """Start computing; Backend.synchronize() waits for the end.  Releases the GIL.

        Until then everything that the graph uses is in use, and cannot be closed.  A backend without Device.props'
        async, as the CPU's, has computed when this returns.
        Raises: as compute().
        Wraps: ggml_backend_graph_compute_async.
        """
        cdef c.ggml_cgraph * graph = self.ptr()
        cdef c.ggml_backend_t b = backend.ptr()
        cdef c.ggml_status status
        if not backend._async:
            return self.compute(backend)
        backend.check_queue([self.ctx, backend])
        cdef list owners = acquire([self.ctx, backend])
        try:
            self._check_supported(backend, owners)
            check_indices(self, self._indices)
            with nogil:
                status = c.ggml_backend_graph_compute_async(b, graph)
        except BaseException:
            release(owners)
            raise
        backend.queue(owners, None)
        raise_status(self, status, "graph compute")

    def __repr__(self):
        return f"<CGraph of {self.n_nodes} nodes>"


cdef class GAllocr(Owner):
    """Own the memory of the nodes of one graph.

    One allocator serves one graph: ggml's takes a tensor that has data for allocated, so an allocator that moved on
    to another graph would leave the first one's nodes dangling.
    Wraps: ggml_gallocr_new, ggml_gallocr_free.
    """

    def __cinit__(self, BufferType buffer_type not None):
        self._ptr = c.ggml_gallocr_new(buffer_type.ptr())
        if self._ptr == NULL:
            raise AllocError("ggml_gallocr_new failed")

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            c.ggml_gallocr_free(self._ptr)
            self._ptr = NULL

    cdef bint owns(self, c.ggml_backend_buffer * buffer) noexcept:
        return self._buffers is not None and <size_t> buffer in self._buffers

    def alloc_graph(self, CGraph graph not None):
        """Allocate every node and input of `graph` that has no data.

        Raises: AllocError when there is not enough memory, BackendError for a second graph, ClosedError if an operand
        from another Context has no data.
        Wraps: ggml_gallocr_alloc_graph.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        cdef bint ok
        self.check()
        if self._served:
            raise BackendError("alloc_graph: this allocator serves a graph already")
        check_idle(graph.ctx)
        reach([graph.ctx])
        check_foreign(graph)
        check_not_empty(graph)
        self._served = True
        waiting = without_data(graph)
        ok = c.ggml_gallocr_alloc_graph(self._ptr, g)  # with the GIL: nobody can close what the graph uses meanwhile
        if not ok:
            raise AllocError(f"no memory for the compute buffer of a graph of {graph.n_nodes} nodes: {last_log()}")
        self._buffers = buffers_of(waiting)
        graph.ctx.depend_on(self)

    def reserve(self, CGraph graph not None):
        """Allocate the memory that `graph` needs, but none of its tensors: alloc_graph() of one not larger is quick.

        Raises: as alloc_graph().
        Wraps: ggml_gallocr_reserve.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        self.check()
        if self._served:
            raise BackendError("reserve: this allocator serves a graph already")
        check_idle(graph.ctx)
        reach([graph.ctx])
        check_foreign(graph)
        check_not_empty(graph)
        if not c.ggml_gallocr_reserve(self._ptr, g):
            raise AllocError(f"no memory for the compute buffer of a graph of {graph.n_nodes} nodes: {last_log()}")

    @property
    def nbytes(self):
        """Return the bytes that were allocated.  Wraps: ggml_gallocr_get_buffer_size."""
        self.check()
        return c.ggml_gallocr_get_buffer_size(self._ptr, 0)
