"""Python functions that ggml calls as the nodes of a graph; see ops.custom."""

from libc.string cimport memcpy

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.backend cimport Backend
from pyggml_adapt.ggml.context cimport Context, Owner

from pyggml_adapt.errors import DTypeError, ShapeError


cdef struct custom_params:  # as ggml lays out the parameters of each kind of custom op
    void * fun
    int n_tasks
    void * userdata


cdef class Callback(Owner):
    """A function that a node calls.  The Context of the node keeps it alive: ggml has only its address."""

    cdef bint _is_open(self) noexcept:
        return True

    cdef int run(self, c.ggml_tensor * dst, int ith, int nth) except -1:
        """Call the function with NumPy arrays of the destination and the operands."""
        cdef int i
        arrays = [self.ctx.wrap(dst).to_numpy()]
        for i in range(c.GGML_MAX_SRC):
            if dst.src[i] != NULL:
                array = self.ctx.wrap(dst.src[i]).to_numpy()
                array.flags.writeable = False
                arrays.append(array)
        if self.n_tasks == 1:
            self.call(*arrays)
        else:
            self.call(*arrays, ith, nth)
        return 0


cdef custom_params params_of(c.ggml_tensor * t) noexcept nogil:
    """Return the parameters of a custom op: a copy, as op_params need not be aligned for pointers."""
    cdef custom_params params
    memcpy(&params, t.op_params, sizeof(params))
    return params


cdef void call_back(c.ggml_tensor * dst, int ith, int nth, void * userdata) noexcept nogil:
    """Call the Callback at `userdata`, on as many threads as it asked for: ggml calls it on each that computes."""
    cdef int n_tasks = params_of(dst).n_tasks
    if n_tasks == c.GGML_N_TASKS_MAX or n_tasks > nth:
        n_tasks = nth
    if ith < n_tasks:
        _call_back(dst, ith, n_tasks, userdata)


cdef void _call_back(c.ggml_tensor * dst, int ith, int nth, void * userdata) noexcept with gil:
    cdef Callback callback = <Callback> userdata
    if callback.error is not None or callback.ctx is None:
        return
    try:
        callback.run(dst, ith, nth)
    except BaseException as exc:
        callback.error = exc
        for backend in callback.backends:
            (<Backend> backend)._flags[1] = 1


cdef list find_callbacks(c.ggml_cgraph * graph):
    """Return the Callbacks of the graph's nodes."""
    cdef c.ggml_tensor * t
    found = []
    for i in range(c.ggml_graph_n_nodes(graph)):
        t = c.ggml_graph_node(graph, i)
        if t.op in (c.GGML_OP_MAP_CUSTOM1, c.GGML_OP_MAP_CUSTOM2, c.GGML_OP_MAP_CUSTOM3, c.GGML_OP_CUSTOM):
            found.append(<object> params_of(t).userdata)
    return found


cdef int arm(list callbacks, Context ctx, backends) except -1:
    """Prepare the Callbacks for a computation of a graph of ctx on these backends."""
    cdef Callback callback
    for backend in backends:
        (<Backend> backend)._flags[1] = 0
    for callback in callbacks:
        callback.error, callback.ctx, callback.backends = None, ctx, backends
    return 0


cdef object disarm(list callbacks):
    """Return the exception that a Callback has left, None if there is none, and let go of what arm() gave them."""
    cdef Callback callback
    error = None
    for callback in callbacks:
        error = error or callback.error
        for backend in callback.backends or ():
            (<Backend> backend)._flags[1] = 0
        callback.error, callback.ctx, callback.backends = None, None, None
    return error


cdef int check_callback(str op, object fun, int n_tasks) except -1:
    if not callable(fun):
        raise DTypeError(f"{op}: fun must be callable, not a {type(fun).__name__}")
    if n_tasks != c.GGML_N_TASKS_MAX and n_tasks < 1:
        raise ShapeError(f"{op}: n_tasks = {n_tasks}, not 1 or more, or {c.GGML_N_TASKS_MAX} for one on each thread")
    return 0


cdef Callback new_callback(object fun, int n_tasks):
    cdef Callback callback = Callback.__new__(Callback)
    callback.call, callback.n_tasks = fun, n_tasks
    return callback
