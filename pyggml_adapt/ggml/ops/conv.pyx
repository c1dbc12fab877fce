"""Convolutions, of one to three dimensions, and the columns that they are multiplied from.

Kernels are a [width, height, ...], data b [width, height, ...].  s0, s1, s2 are strides, p0, p1, p2 zeros that are
thought before and behind the data, d0, d1, d2 dilations, of width, height and depth.  Along each dimension a result
has (b + 2 p - d (a - 1) - 1) / s + 1 elements, rounded down.  No operand may be empty.
"""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, bad_value, check_size, has_rows, is_float, is_packed, result, type_of,
)

include "conv_checks.pxi"


cdef int check_data(str op, c.ggml_tensor * pb, c.ggml_type type, bint is_2d, operands) except -1:
    """Check what im2col takes for granted of the data: rows that follow each other, distances that are ints."""
    cdef int i
    if type != c.GGML_TYPE_F32 and type != c.GGML_TYPE_F16:
        raise bad_type(op, "columns must be F32 or F16", operands)
    if pb.type != c.GGML_TYPE_F32 and not (pb.type == c.GGML_TYPE_F16 and type == c.GGML_TYPE_F16):
        raise bad_type(op, "b must be F32, or F16 if the columns are", operands)
    if not has_rows(pb) or (is_2d and pb.ne[1] > 1 and pb.nb[1] != pb.ne[0] * pb.nb[0]):
        raise bad_shape(op, "the rows of b must be contiguous" + (", and each plane" if is_2d else ""), operands)
    for i in range(1, 4):
        if pb.ne[i] > 1 and pb.nb[i] > MAX_INT:
            raise bad_shape(op, "b is too large", operands)
    return 0


cdef double check_columns(str op, c.ggml_tensor * pa, c.ggml_tensor * pb, Steps st, bint is_2d, operands) except -1:
    """Check that kernel and data match, and return how many columns there are for each of b's sequences."""
    check_filled(op, pa, pb, operands)
    if is_2d:
        if pa.ne[2] != pb.ne[2]:
            raise bad_shape(op, "channels (ne2) differ", operands)
        return <double> count(op, pa, pb, st, 0, operands) * count(op, pa, pb, st, 1, operands)
    if pa.ne[1] != pb.ne[1] or pb.ne[3] != 1:
        raise bad_shape(op, "channels (ne1) differ, or b has four dimensions", operands)
    return count(op, pa, pb, st, 0, operands)


def im2col(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int s1, int p0, int p1, int d0, int d1,
           bint is_2D, dst_type):
    """Return of each position of the kernel a what it covers of the data b, as dst_type.

    Two dimensions: a [KW, KH, IC, ...], b [W, H, IC, N] give [IC*KH*KW, OW, OH, N].  One: a [K, IC, ...], b [L, IC, N]
    give [IC*K, OL, N]; s1 and d1 are not used then, p1 must be 0.  Of a only the shape matters.
    b: F32, or F16 if dst_type is; dst_type: F32 or F16.
    Raises: ShapeError if channels differ, b is smaller than a or its planes are not contiguous.
    Wraps: ggml_im2col.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_type type = type_of(dst_type)
    operands = ("a", a, "b", b)
    cdef double n = check_columns("im2col", pa, pb, steps(s0, p0, d0, s1, p1, d1), is_2D, operands)
    check_data("im2col", pb, type, is_2D, operands)
    if not is_2D and p1:  # the kernel would shift its only row away
        raise bad_value("im2col", f"p1 = {p1} with one dimension")
    check_size("im2col", n * pa.ne[0] * pa.ne[1] * (pa.ne[2] if is_2D else 1) * pb.ne[2] * pb.ne[3], operands)
    return result(ctx, c.ggml_im2col(ctx.room(1), pa, pb, s0, s1, p0, p1, d0, d1, is_2D, type), a, b)


cdef int read_shape(int64_t * dims, str op, ne, operands) except -1:
    """Fill dims from ne, padded with ones; each must be from 1 up."""
    cdef int i
    numbers = tuple(ne)
    if not 1 <= len(numbers) <= 4 or min(numbers) < 1 or max(numbers) > MAX_INT:
        raise bad_value(op, f"impossible shape {list(numbers)}")
    for i in range(4):
        dims[i] = numbers[i] if i < len(numbers) else 1
    return check_size(op, <double> dims[0] * dims[1] * dims[2] * dims[3], operands)


def im2col_back(Context ctx not None, Tensor a not None, Tensor b not None, ne, int s0, int s1, int p0, int p1, int d0,
                int d1, bint is_2D):
    """Return the gradient of im2col's data, F32 of shape ne.

    a: the gradient of im2col's result, F32, contiguous.  b: its kernel, of F32 or F16, only whose shape matters.
    ne: its data's shape.  (ggml.h names a and b the other way round; its kernel reads them so.)
    Raises: ShapeError unless a has the shape that im2col gives of b and ne.
    Wraps: ggml_im2col_back.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_tensor data
    cdef Steps st = steps(s0, p0, d0, s1, p1, d1)
    cdef int64_t d[4]
    cdef int64_t ow, oh
    operands = ("a", a, "b", b)
    read_shape(d, "im2col_back", ne, operands)
    if pa.type != c.GGML_TYPE_F32 or not is_float(pb):
        raise bad_type("im2col_back", "a must be F32, b F32 or F16", operands)
    data.ne[0], data.ne[1], data.ne[2], data.ne[3] = d[0], d[1], d[2], d[3]
    check_columns("im2col_back", pb, &data, st, is_2D, operands)
    ow = count("im2col_back", pb, &data, st, 0, operands)
    oh = count("im2col_back", pb, &data, st, 1, operands) if is_2D else d[2]
    if (pa.ne[0] != pb.ne[0] * pb.ne[1] * (pb.ne[2] if is_2D else 1) or pa.ne[1] != ow or pa.ne[2] != oh
            or pa.ne[3] != (d[3] if is_2D else 1) or not c.ggml_is_contiguous(pa) or (not is_2D and p1)):
        raise bad_shape("im2col_back", f"a is not the contiguous gradient of im2col of {list(ne)}", operands)
    if 4.0 * d[0] * d[1] * d[2] > MAX_INT:
        raise bad_shape("im2col_back", f"{list(ne)} is too large", operands)
    return result(ctx, c.ggml_im2col_back(ctx.room(1), pa, pb, d, s0, s1, p0, p1, d0, d1, is_2D), a, b)


cdef double check_3d(str op, c.ggml_tensor * pa, c.ggml_tensor * pb, int64_t ic, Steps st, operands) except -1:
    """Check that kernel and data have ic channels or a multiple, and return how many columns each of b has."""
    check_filled(op, pa, pb, operands)
    if not 1 <= ic <= MAX_INT or pa.ne[3] % ic or pb.ne[3] % ic:
        raise bad_shape(op, f"IC = {ic} channels do not divide ne3", operands)
    if pb.type != c.GGML_TYPE_F32:
        raise bad_type(op, "b must be F32", operands)
    if not has_rows(pb):
        raise bad_shape(op, "the rows of b must be contiguous", operands)
    return (<double> count(op, pa, pb, st, 0, operands) * count(op, pa, pb, st, 1, operands)
            * count(op, pa, pb, st, 2, operands))


def im2col_3d(Context ctx not None, Tensor a not None, Tensor b not None, int64_t IC, int s0, int s1, int s2, int p0,
              int p1, int p2, int d0, int d1, int d2, dst_type):
    """Return of each position of the kernel a what it covers of the data b, as dst_type [IC*KD*KH*KW, OW, OH, OD*N].

    a: [KW, KH, KD, IC*OC], only whose shape matters.  b: F32 [W, H, D, IC*N], contiguous rows.  dst_type: F32 or F16.
    Raises: ShapeError if IC does not divide ne3, or b is smaller than a.
    Wraps: ggml_im2col_3d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_type type = type_of(dst_type)
    operands = ("a", a, "b", b)
    cdef double n = check_3d("im2col_3d", pa, pb, IC, steps(s0, p0, d0, s1, p1, d1, s2, p2, d2), operands)
    if type != c.GGML_TYPE_F32 and type != c.GGML_TYPE_F16:
        raise bad_type("im2col_3d", "columns must be F32 or F16", operands)
    check_size("im2col_3d", n * pa.ne[0] * pa.ne[1] * pa.ne[2] * pb.ne[3], operands)
    return result(ctx, c.ggml_im2col_3d(ctx.room(1), pa, pb, IC, s0, s1, s2, p0, p1, p2, d0, d1, d2, type), a, b)


def col2im_1d(Context ctx not None, Tensor a not None, int s0, int oc, int p0):
    """Return columns added up where they overlap, of a's type [(a.ne1 - 1) * s0 + K - 2 * p0, oc], K being a.ne0 / oc.

    a: F32, F16 or BF16 [K*oc, n], contiguous.  p0: how many elements are cut off at both ends.
    Raises: ShapeError if oc does not divide a.ne0, or nothing remains.
    Wraps: ggml_col2im_1d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef double n
    operands = ("a", a)
    if not is_float(pa) and pa.type != c.GGML_TYPE_BF16:
        raise bad_type("col2im_1d", "a must be F32, F16 or BF16", operands)
    if not 1 <= s0 <= MAX_STEP or not 0 <= p0 <= MAX_STEP:
        raise bad_value("col2im_1d", f"stride {s0} and padding {p0} are not from 1 and 0 up to {MAX_STEP}")
    if c.ggml_nelements(pa) == 0 or pa.ne[2] * pa.ne[3] != 1 or not c.ggml_is_contiguous(pa):
        raise bad_shape("col2im_1d", "a must be a contiguous matrix, and not empty", operands)
    if oc < 1 or pa.ne[0] % oc:
        raise bad_shape("col2im_1d", f"oc = {oc} does not divide ne0", operands)
    n = (<double> pa.ne[1] - 1) * s0 + pa.ne[0] // oc - 2.0 * p0
    if n < 1:
        raise bad_shape("col2im_1d", f"padding {p0} leaves nothing", operands)
    check_size("col2im_1d", n * oc, operands)
    return result(ctx, c.ggml_col2im_1d(ctx.room(1), pa, s0, oc, p0), a)


cdef c.ggml_type check_kernel(str op, c.ggml_tensor * pa, c.ggml_tensor * pb, operands) except? c.GGML_TYPE_COUNT:
    """Check a kernel that is reshaped to a matrix, and return the type of the columns that it is multiplied with."""
    if not is_float(pa) and pa.type != c.GGML_TYPE_BF16:
        raise bad_type(op, "a must be F32, F16 or BF16", operands)
    check_filled(op, pa, pb, operands)
    if not c.ggml_is_contiguous(pa):
        raise bad_shape(op, "a must be contiguous", operands)
    return c.GGML_TYPE_F32 if pa.type == c.GGML_TYPE_BF16 else c.GGML_TYPE_F16


cdef int half_of(str op, int64_t k, operands) except -1:
    if k // 2 > MAX_STEP:
        raise bad_shape(op, "a is too large", operands)
    return <int> (k // 2)


cdef Tensor conv1(str op, Context ctx, Tensor a, Tensor b, int s0, int p0, int d0, bint half):
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef double n
    operands = ("a", a, "b", b)
    check_data(op, pb, check_kernel(op, pa, pb, operands), False, operands)
    n = check_columns(op, pa, pb, steps(s0, p0, d0), False, operands)
    if pa.ne[3] != 1:
        raise bad_shape(op, "a has four dimensions", operands)
    if pb.ne[2] != 1 and pa.ne[2] != 1:  # ggml would mix up the channels and sequences of its result
        raise bad_shape(op, "several sequences (b.ne2) and several channels (a.ne2)", operands)
    check_size(op, n * pb.ne[2] * max(pa.ne[0] * pa.ne[1], pa.ne[2]), operands)
    if half:
        return result(ctx, c.ggml_conv_1d_ph(ctx.room(5), pa, pb, s0, d0), a, b)
    return result(ctx, c.ggml_conv_1d(ctx.room(5), pa, pb, s0, p0, d0), a, b)


def conv_1d(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int p0, int d0):
    """Return the convolution of b with a, F32 [OL, OC, N].

    a: F32, F16 or BF16 [K, IC, OC], contiguous.  b: F32, or F16 unless a is BF16 [L, IC, N], contiguous rows; N is 1
    unless OC is.  Unless a is BF16 both are multiplied as F16.
    Raises: ShapeError if channels differ or b is too small.
    Wraps: ggml_conv_1d.
    """
    return conv1("conv_1d", ctx, a, b, s0, p0, d0, False)


def conv_1d_ph(Context ctx not None, Tensor a not None, Tensor b not None, int s, int d):
    """Return conv_1d with padding a.ne0 / 2, stride s and dilation d.

    Raises: as conv_1d.
    Wraps: ggml_conv_1d_ph.
    """
    cdef int p = half_of("conv_1d_ph", a.ptr().ne[0], ("a", a, "b", b))
    return conv1("conv_1d_ph", ctx, a, b, s, p, d, True)


cdef Tensor conv1_dw(str op, Context ctx, Tensor a, Tensor b, int s0, int p0, int d0, bint half):
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    check_data(op, pb, check_kernel(op, pa, pb, operands), False, operands)
    if (not is_packed(pa) or not c.ggml_is_contiguous(pb) or pb.ne[2] * pb.ne[3] != 1
            or pa.ne[1] * pa.ne[3] != 1):
        raise bad_shape(op, "a must be [K, 1, C] and b a matrix, both contiguous", operands)
    if pa.ne[2] % pb.ne[1]:
        raise bad_shape(op, "a.ne2 is not a multiple of b's channels (ne1)", operands)
    check_size(op, <double> count(op, pa, pb, steps(s0, p0, d0), 0, operands) * max(pa.ne[0] * pb.ne[1], pa.ne[2]),
               operands)
    if half:
        return result(ctx, c.ggml_conv_1d_dw_ph(ctx.room(4), pa, pb, s0, d0), a, b)
    return result(ctx, c.ggml_conv_1d_dw(ctx.room(4), pa, pb, s0, p0, d0), a, b)


def conv_1d_dw(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int p0, int d0):
    """Return the convolution of each channel of b with kernels of its own, F32 [OL, C].

    a: F32, F16 or BF16 [K, 1, C], contiguous.  b: F32, or F16 unless a is BF16 [L, IC], contiguous; C is a multiple of
    IC, and C / IC kernels in turn take one channel.  Unless a is BF16 both are multiplied as F16.
    Raises: ShapeError if these do not match or b is too small.
    Wraps: ggml_conv_1d_dw.
    """
    return conv1_dw("conv_1d_dw", ctx, a, b, s0, p0, d0, False)


def conv_1d_dw_ph(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int d0):
    """Return conv_1d_dw with padding a.ne0 / 2.

    Raises: as conv_1d_dw.
    Wraps: ggml_conv_1d_dw_ph.
    """
    cdef int p = half_of("conv_1d_dw_ph", a.ptr().ne[0], ("a", a, "b", b))
    return conv1_dw("conv_1d_dw_ph", ctx, a, b, s0, p, d0, True)


cdef int check_conv2(str op, Tensor a, Tensor b, int64_t s0, int64_t s1, int p0, int p1, int d0, int d1) except -1:
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef double n
    operands = ("a", a, "b", b)
    if s0 > MAX_STEP or s1 > MAX_STEP:
        raise bad_value(op, f"stride {max(s0, s1)} is above {MAX_STEP}")
    check_data(op, pb, check_kernel(op, pa, pb, operands), True, operands)
    n = check_columns(op, pa, pb, steps(<int> s0, p0, d0, <int> s1, p1, d1), True, operands) * pb.ne[3]
    return check_size(op, n * max(pa.ne[0] * pa.ne[1] * pa.ne[2], pa.ne[3]), operands)


def conv_2d(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int s1, int p0, int p1, int d0, int d1):
    """Return the convolution of b with a, F32 [OW, OH, OC, N].

    a: F32, F16 or BF16 [KW, KH, IC, OC], contiguous.  b: F32, or F16 unless a is BF16 [W, H, IC, N], contiguous planes.
    Unless a is BF16 both are multiplied as F16.
    Raises: ShapeError if channels differ or b is too small.
    Wraps: ggml_conv_2d.
    """
    check_conv2("conv_2d", a, b, s0, s1, p0, p1, d0, d1)
    return result(ctx, c.ggml_conv_2d(ctx.room(7), a.ptr(), b.ptr(), s0, s1, p0, p1, d0, d1), a, b)


def conv_2d_sk_p0(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return conv_2d with strides of the kernel's size and no padding: of patches that do not overlap.

    Raises: as conv_2d.
    Wraps: ggml_conv_2d_sk_p0.
    """
    check_conv2("conv_2d_sk_p0", a, b, a.ptr().ne[0], a.ptr().ne[1], 0, 0, 1, 1)
    return result(ctx, c.ggml_conv_2d_sk_p0(ctx.room(7), a.ptr(), b.ptr()), a, b)


def conv_2d_s1_ph(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return conv_2d with strides of 1 and half the kernel's size as padding: of odd kernels, [W, H, OC, N].

    Raises: as conv_2d.
    Wraps: ggml_conv_2d_s1_ph.
    """
    operands = ("a", a, "b", b)
    cdef int p0 = half_of("conv_2d_s1_ph", a.ptr().ne[0], operands)
    cdef int p1 = half_of("conv_2d_s1_ph", a.ptr().ne[1], operands)
    check_conv2("conv_2d_s1_ph", a, b, 1, 1, p0, p1, 1, 1)
    return result(ctx, c.ggml_conv_2d_s1_ph(ctx.room(7), a.ptr(), b.ptr()), a, b)


def conv_2d_dw(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int s1, int p0, int p1, int d0,
               int d1):
    """Return the convolution of each channel of b with a kernel of its own, F32 [OW, OH, C, N].

    a: F16 or BF16 [KW, KH, 1, C], contiguous.  b: F32, or F16 unless a is BF16 [W, H, C, N], contiguous.
    With an F16 a both are multiplied as F16.
    Raises: ShapeError if these do not match or b is too small.
    Wraps: ggml_conv_2d_dw.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef Steps st = steps(s0, p0, d0, s1, p1, d1)
    operands = ("a", a, "b", b)
    if pa.type == c.GGML_TYPE_F32:  # ggml would multiply it with columns of F16, for which it has no kernel
        raise bad_type("conv_2d_dw", "a must be F16 or BF16", operands)
    check_data("conv_2d_dw", pb, check_kernel("conv_2d_dw", pa, pb, operands), True, operands)
    if pa.ne[2] * pa.ne[3] != pb.ne[2] or not c.ggml_is_contiguous(pb):
        raise bad_shape("conv_2d_dw", "a must have a kernel for each channel of b, b be contiguous", operands)
    check_size("conv_2d_dw", <double> count("conv_2d_dw", pa, pb, st, 0, operands) * pa.ne[0] * pa.ne[1]
               * count("conv_2d_dw", pa, pb, st, 1, operands) * pb.ne[2] * pb.ne[3], operands)
    return result(ctx, c.ggml_conv_2d_dw(ctx.room(7), pa, pb, s0, s1, p0, p1, d0, d1), a, b)


def conv_3d(Context ctx not None, Tensor a not None, Tensor b not None, int64_t IC, int s0, int s1, int s2, int p0,
            int p1, int p2, int d0, int d1, int d2):
    """Return the convolution of b with a, F32 [OW, OH, OD, OC*N].

    a: F32, F16 or BF16 [KW, KH, KD, IC*OC], contiguous.  b: F32 [W, H, D, IC*N], contiguous rows.
    Unless a is BF16 both are multiplied as F16.
    Raises: ShapeError if IC does not divide ne3, or b is too small.
    Wraps: ggml_conv_3d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    check_kernel("conv_3d", pa, pb, operands)
    cdef double n = check_3d("conv_3d", pa, pb, IC, steps(s0, p0, d0, s1, p1, d1, s2, p2, d2), operands)
    check_size("conv_3d", n * (pb.ne[3] // IC) * max(pa.ne[0] * pa.ne[1] * pa.ne[2] * IC, pa.ne[3] // IC), operands)
    return result(ctx, c.ggml_conv_3d(ctx.room(8), pa, pb, IC, s0, s1, s2, p0, p1, p2, d0, d1, d2), a, b)
