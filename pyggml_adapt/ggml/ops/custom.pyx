"""Custom ops: nodes that call a Python function with NumPy arrays.

The function is called as fun(dst, a, b, ...) and fills dst; the operands cannot be written.  With n_tasks other than 1
it is called as fun(dst, a, b, ..., ith, nth) on nth threads at once, ith counting them, each to do its part; with
n_tasks = -1 these are as many as the backend has.  The arrays are in NumPy's order of dimensions, quantised types and
BF16 as their bytes, see Tensor.to_numpy; they show memory that the graph uses again, so what is to be kept must be
copied.  What the function raises comes out of compute(), and the nodes after it are not computed.  Only CPU backends
have custom ops.
"""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.callback cimport Callback, call_back, check_callback, new_callback
from pyggml_adapt.ggml.context cimport Context, Tensor, read_ne
from pyggml_adapt.ggml.ops.checks cimport bad_shape, has_rows, result, type_of


cdef void call_1(c.ggml_tensor * dst, const c.ggml_tensor * a, int ith, int nth, void * userdata) noexcept nogil:
    call_back(dst, ith, nth, userdata)


cdef void call_2(c.ggml_tensor * dst, const c.ggml_tensor * a, const c.ggml_tensor * b, int ith, int nth,
                 void * userdata) noexcept nogil:
    call_back(dst, ith, nth, userdata)


cdef void call_3(c.ggml_tensor * dst, const c.ggml_tensor * a, const c.ggml_tensor * b, const c.ggml_tensor * d,
                 int ith, int nth, void * userdata) noexcept nogil:
    call_back(dst, ith, nth, userdata)


cdef Callback prepare(str op, Context ctx, fun, int n_tasks, operands):
    """Return the callback of a node of ctx, which keeps it alive; check that its operands can be NumPy arrays."""
    cdef Tensor operand
    cdef c.ggml_tensor * t
    cdef Py_ssize_t i
    check_callback(op, fun, n_tasks)
    for i in range(len(operands)):
        operand = <Tensor?> operands[i]
        t = operand.ptr()
        if not has_rows(t) and (c.ggml_is_quantized(t.type) or t.type == c.GGML_TYPE_BF16):
            raise bad_shape(op, "the rows of what has no NumPy type must be contiguous", (f"operand {i}", operand))
    ctx.room(1)
    ctx.n_tensors -= 1
    callback = new_callback(fun, n_tasks)
    ctx.depend_on(callback)
    return callback


def map_custom1(Context ctx not None, Tensor a not None, fun, int n_tasks=1):
    """Return what fun(dst, a) leaves in dst, a new tensor of a's type and shape.

    Raises: DTypeError if fun cannot be called, ShapeError for another n_tasks than -1, 1 or more.
    Wraps: ggml_map_custom1.
    """
    cdef Callback callback = prepare("map_custom1", ctx, fun, n_tasks, (a,))
    return result(ctx, c.ggml_map_custom1(ctx.room(1), a.ptr(), call_1, n_tasks, <void *> callback), a)


def map_custom1_inplace(Context ctx not None, Tensor a not None, fun, int n_tasks=1):
    """Return a view of a, whose data fun(dst, a) changes.

    Raises: as map_custom1.  Wraps: ggml_map_custom1_inplace.
    """
    cdef Callback callback = prepare("map_custom1_inplace", ctx, fun, n_tasks, (a,))
    return result(ctx, c.ggml_map_custom1_inplace(ctx.room(1), a.ptr(), call_1, n_tasks, <void *> callback), a)


def map_custom2(Context ctx not None, Tensor a not None, Tensor b not None, fun, int n_tasks=1):
    """Return what fun(dst, a, b) leaves in dst, a new tensor of a's type and shape.

    Raises: as map_custom1.  Wraps: ggml_map_custom2.
    """
    cdef Callback callback = prepare("map_custom2", ctx, fun, n_tasks, (a, b))
    return result(ctx, c.ggml_map_custom2(ctx.room(1), a.ptr(), b.ptr(), call_2, n_tasks, <void *> callback), a, b)


def map_custom2_inplace(Context ctx not None, Tensor a not None, Tensor b not None, fun, int n_tasks=1):
    """Return a view of a, whose data fun(dst, a, b) changes.

    Raises: as map_custom1.  Wraps: ggml_map_custom2_inplace.
    """
    cdef Callback callback = prepare("map_custom2_inplace", ctx, fun, n_tasks, (a, b))
    return result(ctx, c.ggml_map_custom2_inplace(ctx.room(1), a.ptr(), b.ptr(), call_2, n_tasks, <void *> callback),
                  a, b)


def map_custom3(Context ctx not None, Tensor a not None, Tensor b not None, Tensor c_ not None, fun, int n_tasks=1):
    """Return what fun(dst, a, b, c_) leaves in dst, a new tensor of a's type and shape.

    Raises: as map_custom1.  Wraps: ggml_map_custom3.
    """
    cdef Callback callback = prepare("map_custom3", ctx, fun, n_tasks, (a, b, c_))
    return result(ctx, c.ggml_map_custom3(ctx.room(1), a.ptr(), b.ptr(), c_.ptr(), call_3, n_tasks, <void *> callback),
                  a, b, c_)


def map_custom3_inplace(Context ctx not None, Tensor a not None, Tensor b not None, Tensor c_ not None, fun,
                        int n_tasks=1):
    """Return a view of a, whose data fun(dst, a, b, c_) changes.

    Raises: as map_custom1.  Wraps: ggml_map_custom3_inplace.
    """
    cdef Callback callback = prepare("map_custom3_inplace", ctx, fun, n_tasks, (a, b, c_))
    return result(ctx, c.ggml_map_custom3_inplace(ctx.room(1), a.ptr(), b.ptr(), c_.ptr(), call_3, n_tasks,
                                                  <void *> callback), a, b, c_)


cdef int read_args(str op, args, int most, c.ggml_tensor ** pointers) except -1:
    """Fill in the pointers of the operands; return how many there are."""
    cdef Py_ssize_t i
    if len(args) > most:
        raise bad_shape(op, f"{len(args)} operands, at most {most}", ())
    for i in range(len(args)):
        pointers[i] = (<Tensor?> args[i]).ptr()
    return len(args)


def custom_4d(Context ctx not None, type, ne, args, fun, int n_tasks=1):
    """Return what fun(dst, *args) leaves in dst, a new tensor of any type and of 1 to 4 dimensions ne.

    args: up to 9 tensors.
    Raises: as map_custom1, and Context.new_tensor.  Wraps: ggml_custom_4d.
    """
    cdef c.ggml_tensor * pointers[10]
    cdef int64_t dims[4]
    cdef c.ggml_type t = type_of(type)
    args = tuple(args)
    cdef int n = read_args("custom_4d", args, c.GGML_MAX_SRC - 1, pointers)
    read_ne(dims, "custom_4d", ne)
    if dims[0] % c.ggml_blck_size(t):
        raise bad_shape("custom_4d", f"ne0 = {dims[0]} is not a multiple of the type's block size", ())
    cdef Callback callback = prepare("custom_4d", ctx, fun, n_tasks, args)
    cdef Tensor out = ctx.wrap(c.ggml_custom_4d(ctx.room(1), t, dims[0], dims[1], dims[2], dims[3], pointers, n,
                                                <c.ggml_custom_op_t> call_back, n_tasks, <void *> callback))
    for each in args:
        result(ctx, out._ptr, each)
    return out


def custom_inplace(Context ctx not None, Tensor a not None, args, fun, int n_tasks=1):
    """Return a view of a, whose data fun(dst, a, *args) changes.

    args: up to 8 tensors.
    Raises: as map_custom1.  Wraps: ggml_custom_inplace.
    """
    cdef c.ggml_tensor * pointers[10]
    args = tuple(args)
    cdef int n = read_args("custom_inplace", args, c.GGML_MAX_SRC - 2, pointers)
    cdef Callback callback = prepare("custom_inplace", ctx, fun, n_tasks, (a, *args))
    cdef Tensor out = result(ctx, c.ggml_custom_inplace(ctx.room(1), a.ptr(), pointers, n,
                                                        <c.ggml_custom_op_t> call_back, n_tasks, <void *> callback), a)
    for each in args:
        result(ctx, out._ptr, each)
    return out
