"""Sums, means, largest elements and the order of elements, along rows.

Operands are F32 with contiguous rows, where nothing else is said: each op raises DTypeError or ShapeError otherwise.
"""

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    bad_shape, bad_type, bad_value, check_even_floats, check_floats, elementwise, result, unary_op,
)


def sum(Context ctx not None, Tensor a not None):
    """Return the sum of all elements, [1], of a's type: F32, F16 or BF16.  Wraps: ggml_sum."""
    return elementwise("sum", c.ggml_sum, ctx, a)


cdef Tensor along_rows(str op, unary_op call, Context ctx, Tensor a):
    check_floats(op, a, False, False)
    return result(ctx, call(ctx.room(1), a.ptr()), a)


def sum_rows(Context ctx not None, Tensor a not None):
    """Return the sums along ne0, F32 [1, a.ne1, a.ne2, a.ne3].  Wraps: ggml_sum_rows."""
    return along_rows("sum_rows", c.ggml_sum_rows, ctx, a)


def cumsum(Context ctx not None, Tensor a not None):
    """Return the sums along ne0 up to each element, F32, shape of a.  Wraps: ggml_cumsum."""
    return along_rows("cumsum", c.ggml_cumsum, ctx, a)


def mean(Context ctx not None, Tensor a not None):
    """Return the means along ne0, F32 [1, a.ne1, a.ne2, a.ne3]; NaN where ne0 is 0.  Wraps: ggml_mean."""
    return along_rows("mean", c.ggml_mean, ctx, a)


def argmax(Context ctx not None, Tensor a not None):
    """Return the index of the largest element of each row, the last one if several are equal, I32 [a.ne1].

    What it is for a row with a NaN in it, is not defined.
    Raises: ShapeError if a has no columns, or more than two dimensions.
    Wraps: ggml_argmax.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_floats("argmax", a, False, False)
    if pa.ne[0] == 0 or pa.ne[2] != 1 or pa.ne[3] != 1:
        raise bad_shape("argmax", "a must be a matrix with at least one column", ("a", a))
    return result(ctx, c.ggml_argmax(ctx.room(1), pa), a)


def count_equal(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return how many elements of a and b are equal, I64 [1].

    a, b: I32 of one shape, of any strides.
    Raises: ShapeError if shapes differ, or have more than two dimensions.
    Wraps: ggml_count_equal.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    if pa.type != c.GGML_TYPE_I32 or pb.type != c.GGML_TYPE_I32:
        raise bad_type("count_equal", "a and b must be I32", operands)
    if not c.ggml_are_same_shape(pa, pb):
        raise bad_shape("count_equal", "shapes differ", operands)
    if pa.ne[2] != 1 or pa.ne[3] != 1:  # the kernel finds the wrong rows then, also outside of a
        raise bad_shape("count_equal", "a and b must not have more than two dimensions", operands)
    return result(ctx, c.ggml_count_equal(ctx.room(1), pa, pb), a, b)


def argsort(Context ctx not None, Tensor a not None, int order):
    """Return the indices that sort each row in that SortOrder, equal elements in any order, I32, shape of a.

    Rows must lie at one distance.  Where a row has a NaN, all of its indices are there, in an undefined order.
    Raises: ShapeError if there is no such SortOrder.
    Wraps: ggml_argsort.
    """
    check_even_floats("argsort", a, False, False)
    if order != c.GGML_SORT_ORDER_ASC and order != c.GGML_SORT_ORDER_DESC:
        raise bad_value("argsort", f"{order} is not a SortOrder")
    return result(ctx, c.ggml_argsort(ctx.room(1), a.ptr(), <c.ggml_sort_order> order), a)


cdef int check_k(str op, Tensor a, int k) except -1:
    check_even_floats(op, a, False, False)
    if not 1 <= k <= a.ptr().ne[0]:
        raise bad_shape(op, f"k = {k} is not from 1 to ne0", ("a", a))
    return 0


def argsort_top_k(Context ctx not None, Tensor a not None, int k):
    """Return the indices of the k largest elements of each row, largest first, I32 [k, a.ne1, a.ne2, a.ne3].

    A view of argsort(a, DESC): what is said there of rows and NaN, goes for it.
    Raises: ShapeError unless 1 <= k <= ne0.
    Wraps: ggml_argsort_top_k.
    """
    check_k("argsort_top_k", a, k)
    return result(ctx, c.ggml_argsort_top_k(ctx.room(2), a.ptr(), k), a)


def top_k(Context ctx not None, Tensor a not None, int k):
    """Return the indices of the k largest elements of each row in no order, I32 [k, a.ne1, a.ne2, a.ne3].

    Rows must lie at one distance.  Where a row has a NaN, any k of its indices may come back.
    Raises: ShapeError unless 1 <= k <= ne0.
    Wraps: ggml_top_k.
    """
    check_k("top_k", a, k)
    return result(ctx, c.ggml_top_k(ctx.room(1), a.ptr(), k), a)
