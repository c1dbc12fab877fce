"""Graphs, their gradients, and what allocates and computes them."""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free, malloc

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.backend cimport Backend, BufferType
from pyggml_adapt.ggml.callback cimport arm, disarm, find_callbacks
from pyggml_adapt.ggml.context cimport (
    Context, Owner, Tensor, check_idle, check_open, count, is_view, name_bytes, occupy, point_operands, put_in, reach,
    root_of, take_out, vacate,
)
from pyggml_adapt.ggml.status cimport check

import os
import tempfile

from pyggml_adapt.errors import (
    AllocError, BackendError, BusyError, ClosedError, DTypeError, FileAccessError, IndexRangeError, ParameterError,
    ShapeError,
)
from pyggml_adapt.ggml.status import last_log


include "graph_checks.pxi"
include "work.pxi"
include "indices.pxi"
include "backward.pxi"


cdef int raise_status(CGraph graph, c.ggml_status status, str doing) except -1:
    """Raise what a Callback of the graph has raised, or what the status says."""
    if graph._callbacks:
        error = disarm(graph._callbacks)
        if error is not None:
            raise error
    return check(status, doing)


cdef int n_lending = 0  # computations that have exchanged operands for the moment


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
        self._check_still()
        cdef size_t n_tensors = self.ctx.n_tensors + self.ctx.n_foreign
        if n_tensors > <size_t> self.size:
            seen = set()
            n_leaves = count(self._members() + [<size_t> t], seen)
            if max(n_leaves, len(seen) - n_leaves + n_params_of(seen)) > self.size:
                raise AllocError(f"a graph of {self.size} nodes is too small for {tensor.name!r} and its operands")
        self._changed()
        if self._expanded is None:
            self._expanded = set()
        if t.op == c.GGML_OP_NONE:
            self._expanded.add(<size_t> t)
        if t.op == c.GGML_OP_NONE:  # no node's operand yet: a scheduler finds no place for it otherwise
            c.ggml_set_input(t)
        if n_tensors > MAX_DEPTH:
            self._expand_deep(t)
        c.ggml_build_forward_expand(self._ptr, t)
        return tensor

    cdef list _members(self):
        """Return the addresses of the nodes, and of leaves that need not be operands of any."""
        return nodes_of(self) + list(self._expanded or ())

    cdef int _check_still(self) except -1:
        """Check that no computation has exchanged operands of tensors that the graph could reach, for the moment."""
        check_idle(self.ctx)
        check_open(self.ctx)
        for owner in reach([self.ctx]) if n_lending else ():
            if isinstance(owner, Context) and (<Context> owner).n_lent:
                check_idle(<Owner> owner)
        return 0

    cdef int _expand_deep(self, c.ggml_tensor * t) except -1:
        """Add what t is computed from, operands first, in ggml's order but without its recursion."""
        cdef c.ggml_tensor * cur
        cdef size_t address
        cdef int k
        todo = [(<size_t> t, 0)]
        while todo:
            address, k = todo.pop()
            cur = <c.ggml_tensor *> address
            while k < c.GGML_MAX_SRC and (cur.src[k] == NULL or <size_t> cur.src[k] in self._expanded):
                k += 1
            if k < c.GGML_MAX_SRC:
                todo.append((address, k + 1))
                todo.append((<size_t> cur.src[k], 0))
            elif address not in self._expanded:
                self._expanded.add(address)
                c.ggml_build_forward_expand(self._ptr, cur)
        return 0

    cdef int _changed(self) except -1:
        """Forget what was checked."""
        self._supported_by = self._homes = None
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
        cdef c.ggml_tensor * t = c.ggml_graph_get_tensor(self.ptr(), name_bytes(name))
        return None if t == NULL else self._wrap(t)

    def clear(self):
        """Take every node and leaf out; the tensors stay in the Context.  Wraps: ggml_graph_clear."""
        cdef c.ggml_cgraph * graph = self.ptr()
        check_idle(self.ctx)
        self._changed()
        self._expanded = None
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
        dst._expanded = None if self._expanded is None else set(self._expanded)
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
        self._check_still()
        trained = find_trained(self)
        check_backward(self, trained)
        seen = set()
        n_leaves = count(self._members(), seen)
        n_new = MAX_PER_NODE * len(trained) + 1
        if max(n_leaves, len(seen)) + n_new > self.size:
            raise AllocError(f"a graph of {self.size} nodes is too small for {n_new} more")
        ctx = self.ctx.room(n_new)
        self._changed()
        self._n_backward = c.ggml_graph_n_nodes(graph)
        keep_results(trained)
        c.ggml_build_backward_expand(ctx, graph, NULL)
        for i in range(self._n_backward, c.ggml_graph_n_nodes(graph)):
            fill_zeros(c.ggml_graph_node(graph, i))

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
        try:  # ggml aborts if it cannot open the file, and waits for the reader of a pipe
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NONBLOCK", 0), 0o666))
        except OSError as exc:
            raise FileAccessError.of(path, exc) from exc
        reach([self.ctx] if forward is None else [self.ctx, forward.ctx])  # now, as others ran while it was opened
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
        """Raise unless the backend can compute every node; remembered until the graph grows, or Slots are bound."""
        cdef int i
        if self.was_checked(backend, owners):
            return 0
        point_views(self)
        for i in range(c.ggml_graph_n_nodes(self._ptr)):
            self._check_node(backend, c.ggml_graph_node(self._ptr, i))
        check_writable(self, owners)
        check_order(self, owners)
        split_norms(self)
        check_work(self, backend)
        self._indices = Indices(self)
        self._callbacks = find_callbacks(self._ptr)
        return self.remember(backend, owners)

    cdef bint was_checked(self, by, list owners) noexcept:
        """Return whether the graph is as it was when a backend or scheduler was found to have all that it needs."""
        return (self._supported_by is by and self._last_bind == self.ctx.last_bind
                and self._foreign_bind == last_bind_of(owners, self.ctx))

    cdef int remember(self, by, list owners) except -1:
        self._supported_by, self._last_bind = by, self.ctx.last_bind
        self._foreign_bind = last_bind_of(owners, self.ctx)
        return 0

    cdef int check_nodes_idle(self) except -1:
        """Check that no computation uses the nodes of the graph."""
        check_idle(self.ctx)
        if self._homes is None:
            self._homes = homes_of(self)
        for owner in self._homes:
            check_idle(<Owner> owner)
        return 0

    cdef int check_alone(self, list owners) except -1:
        """Check that no other computation uses memory that this one writes leaves in; owners: its own, occupied."""
        cdef Owner owner
        if self._written_in is None:
            self._written_in = owners_of_data(self._written, owners)
        for owner in self._written_in:
            if owner._computing > 1:
                raise BusyError(f"compute: the graph writes into memory of a {type(owner).__name__} that another "
                                f"computation uses")
        return 0

    cdef list begin(self, Backend backend, list owners):
        """Return the owners, and all that they depend on, occupied, when the graph can be computed."""
        self.check_nodes_idle()
        check_backend_idle(backend)
        owners = occupy(owners)
        try:
            self._check_supported(backend, owners)
            self.check_alone(owners)
            self._indices.read(self)
            if self._callbacks:
                arm(self._callbacks, self.ctx, [backend])
        except BaseException:
            vacate(owners)
            raise
        return owners

    cdef int lend(self, Indices indices) except -1:
        """Let the nodes compute with the indices as they were read, until restore()."""
        global n_lending
        n_lending += 1
        self.ctx.n_lent += 1
        for owner in self._homes:
            (<Context> owner).n_lent += 1
        indices.lend()
        return 0

    cdef int restore(self, Indices indices) except -1:
        global n_lending
        n_lending -= 1
        indices.restore()
        for owner in self._homes:
            (<Context> owner).n_lent -= 1
        self.ctx.n_lent -= 1
        return 0

    cdef c.ggml_status _compute_into(self, Backend backend, Tensor result, out) except *:
        """Compute, and leave the bytes of `result` in the buffer `out`."""
        cdef Py_buffer view
        cdef c.ggml_tensor copy
        cdef c.ggml_tensor * t
        cdef c.ggml_tensor ** nodes = c.ggml_graph_nodes(self._ptr)
        cdef c.ggml_status status
        cdef int last = c.ggml_graph_n_nodes(self._ptr) - 1
        cdef bint at_once
        if result.ctx is not self.ctx:
            raise ShapeError(f"compute: tensor {result.name!r} belongs to another Context than the graph")
        check_result(self, result.ptr(), nodes[last] if last >= 0 else NULL)
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            t = result.range(0, 0)
            if <size_t> view.len != c.ggml_nbytes(t):
                raise ShapeError(f"compute: {view.len} bytes for tensor {result.name!r} of {c.ggml_nbytes(t)}")
            # of the last node no other reads, so a CPU can as well write it elsewhere; device memory goes by address
            at_once = (backend.threadpool is not None and t.view_src == NULL and t.op != c.GGML_OP_NONE
                       and not self._callbacks and last >= 0 and t == nodes[last] and is_apart(t, &view, 2))
            if at_once:
                copy = t[0]
                copy.data = view.buf
                put_in(&copy, t)
                nodes[last] = &copy
            with nogil:
                status = c.ggml_backend_graph_compute(backend._ptr, self._ptr)
                if not at_once and status == c.GGML_STATUS_SUCCESS:
                    c.ggml_backend_tensor_get(t, view.buf, 0, view.len)
            if at_once:
                nodes[last] = t
                take_out(&copy)
        finally:
            PyBuffer_Release(&view)
        return status

    cdef c.ggml_status _compute(self, Backend backend, Tensor result, out) except *:
        """Compute, the backend's threads where they belong, with the indices that were read."""
        cdef c.ggml_status status
        before = None if backend.threadpool is None else backend.threadpool.enter()
        try:
            self.lend(self._indices)
            if result is not None:
                return self._compute_into(backend, result, out)
            with nogil:
                status = c.ggml_backend_graph_compute(backend._ptr, self._ptr)
            return status
        finally:
            self.restore(self._indices)
            if before is not None:
                backend.threadpool.leave(before)

    def compute(self, Backend backend not None, Tensor result=None, out=None):
        """Compute every node.  Releases the GIL.

        What leaves pick rows or experts with is read when it starts.  Until it ends, nothing else can write into memory
        that it uses, but through arrays that show it, see Tensor.to_numpy.
        result, out: a contiguous tensor, and the writable contiguous buffer that its bytes are wanted in; of the last
        node they are not copied but computed there.
        Raises: ParameterError if `result` is neither the last node nor an output; ShapeError if `out` has another size
        or `result` another Context, or if a leaf that is written lies in memory of a node; ClosedError if an owner of a
        tensor was closed, BackendError if the backend cannot compute a node, IndexRangeError if an input picks a row or
        expert that is not there, BusyError while the backend or the graph computes, ComputeAborted if the backend's
        abort flag was set, AllocError if there is no memory to compute.
        Wraps: ggml_backend_graph_compute.
        """
        cdef c.ggml_status status
        self.ptr()
        backend.ptr()
        if (result is None) != (out is None):
            raise ParameterError("compute: result and out are given both, or none of them")
        cdef list owners = self.begin(backend, [self.ctx, backend])
        try:
            status = self._compute(backend, result, out)
        finally:
            vacate(owners)
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
        cdef list owners = occupy([self.ctx, backend])
        try:
            self._check_supported(backend, owners)
            self._indices.read(self)
            with nogil:
                status = c.ggml_backend_graph_compute_async(b, graph)
        except BaseException:
            vacate(owners)
            raise
        backend._computed.extend(owners)
        raise_status(self, status, "graph compute")

    def __repr__(self):
        return f"<CGraph of {self.n_nodes} nodes>"


include "allocr.pxi"
