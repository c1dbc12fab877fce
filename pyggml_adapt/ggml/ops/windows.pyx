"""Windows of images, and the relative positions in them that attention over images takes."""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport MAX_INT, bad_shape, bad_type, bad_value, check_size, fits, result


cdef int check_image(str op, Tensor a) except -1:
    """Check that a is F32 and contiguous: kernels walk through it without looking at strides."""
    cdef c.ggml_tensor * pa = a.ptr()
    if pa.type != c.GGML_TYPE_F32:
        raise bad_type(op, "a must be F32", ("a", a))
    if not c.ggml_is_contiguous(pa) or not fits(pa):
        raise bad_shape(op, "a must be contiguous", ("a", a))
    return 0


def win_part(Context ctx not None, Tensor a not None, int w):
    """Return a parted into windows of w times w, padded with zeros, F32 [a.ne0, w, w, windows], row by row.

    a: F32 [channels, width, height], contiguous.
    Raises: ShapeError unless w is 1 or more and a has three dimensions.
    Wraps: ggml_win_part.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_image("win_part", a)
    if w < 1:
        raise bad_value("win_part", f"w {w} is less than 1")
    if pa.ne[3] != 1:
        raise bad_shape("win_part", "a must have three dimensions", ("a", a))
    cdef double n_windows = ((pa.ne[1] + w - 1) // w) * <double> ((pa.ne[2] + w - 1) // w)
    if n_windows > MAX_INT or pa.ne[1] + w > MAX_INT or pa.ne[2] + w > MAX_INT:
        raise bad_shape("win_part", f"too many or too large windows of {w}", ("a", a))
    check_size("win_part", n_windows * w * w * pa.ne[0], ("a", a))
    return result(ctx, c.ggml_win_part(ctx.room(1), pa, w), a)


def win_unpart(Context ctx not None, Tensor a not None, int w0, int h0, int w):
    """Return the image [a.ne0, w0, h0] whose windows win_part made, F32, without what they were padded with.

    a: F32 [channels, w, w, windows], contiguous.
    Raises: ShapeError unless a has as many windows of w times w as an image of w0 times h0 is parted into.
    Wraps: ggml_win_unpart.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_image("win_unpart", a)
    if w < 1 or w0 < 1 or h0 < 1:
        raise bad_value("win_unpart", f"w0 {w0}, h0 {h0} or w {w} is less than 1")
    cdef int64_t n_windows = ((<int64_t> w0 + w - 1) // w) * ((<int64_t> h0 + w - 1) // w)
    if (pa.ne[1] != w or pa.ne[2] != w or pa.ne[3] != n_windows or <int64_t> w0 + w > MAX_INT
            or <int64_t> h0 + w > MAX_INT):
        raise bad_shape("win_unpart", f"a is not {n_windows} windows of {w} times {w}", ("a", a))
    return result(ctx, c.ggml_win_unpart(ctx.room(1), pa, w0, h0, w), a)


def get_rel_pos(Context ctx not None, Tensor a not None, int qh, int kh):
    """Return for each pair of a query's and a key's place the row of a for their distance, F16 [a.ne0, kh, qh].

    a: F16 [channels, 2 * qh - 1], contiguous.  Row [k, q] of the result is row kh - 1 - k + q of a.
    Raises: ShapeError unless qh = kh and a has a row for each distance.
    Wraps: ggml_get_rel_pos.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    if pa.type != c.GGML_TYPE_F16:  # the kernel takes BF16 too, and calls its bits F16
        raise bad_type("get_rel_pos", "a must be F16", ("a", a))
    if qh < 1 or qh != kh:
        raise bad_value("get_rel_pos", f"qh {qh} and kh {kh} must be one number from 1 up")
    if pa.ne[1] != 2 * <int64_t> qh - 1 or pa.ne[2] * pa.ne[3] != 1 or not c.ggml_is_contiguous(pa):
        raise bad_shape("get_rel_pos", f"a must be contiguous, with {2 * <int64_t> qh - 1} rows", ("a", a))
    check_size("get_rel_pos", <double> pa.ne[0] * kh * qh, ("a", a))
    return result(ctx, c.ggml_get_rel_pos(ctx.room(1), pa, qh, kh), a)


cdef int check_rel_pos(str op, Tensor a, Tensor pw, Tensor ph) except -1:
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * p = pw.ptr()
    operands = ("a", a, "pw", pw, "ph", ph)
    if pa.type != c.GGML_TYPE_F32 or p.type != c.GGML_TYPE_F32 or ph.ptr().type != c.GGML_TYPE_F32:
        raise bad_type(op, "a, pw and ph must be F32", operands)
    if not (c.ggml_is_contiguous(pa) and c.ggml_is_contiguous(p) and c.ggml_is_contiguous(ph.ptr())):
        raise bad_shape(op, "a, pw and ph must be contiguous", operands)
    if not c.ggml_are_same_shape(p, ph.ptr()):
        raise bad_shape(op, "pw and ph differ", operands)
    # the kernel leaves what a has in ne3 as it is
    if (pa.ne[0] != <double> p.ne[0] * p.ne[0] or pa.ne[1] != <double> p.ne[1] * p.ne[2] or pa.ne[2] != p.ne[3]
            or pa.ne[3] != 1 or not fits(p)):
        raise bad_shape(op, "pw and ph do not match a", operands)
    return 0


def add_rel_pos(Context ctx not None, Tensor a not None, Tensor pw not None, Tensor ph not None):
    """Return attention scores a with the biases of relative positions, shape of a.

    a: F32 [k * k, h * w, n].  pw, ph: F32 [k, w, h, n]: pw[i] is added for keys in column i, ph[j] for those in row j.
    All contiguous.
    Raises: ShapeError if these do not match.
    Wraps: ggml_add_rel_pos.
    """
    check_rel_pos("add_rel_pos", a, pw, ph)
    return result(ctx, c.ggml_add_rel_pos(ctx.room(1), a.ptr(), pw.ptr(), ph.ptr()), a, pw, ph)


def add_rel_pos_inplace(Context ctx not None, Tensor a not None, Tensor pw not None, Tensor ph not None):
    """Return a view of a, to which the biases are added as by add_rel_pos.

    Raises: as add_rel_pos.
    Wraps: ggml_add_rel_pos_inplace.
    """
    check_rel_pos("add_rel_pos_inplace", a, pw, ph)
    return result(ctx, c.ggml_add_rel_pos_inplace(ctx.room(1), a.ptr(), pw.ptr(), ph.ptr()), a, pw, ph)
