"""Convolutions that do not lay out columns: transposed ones, and direct ones, whose kernels go over the data.

Kernels, strides, paddings and dilations as in conv.  No operand may be empty.
"""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, bad_value, check_size, has_rows, is_float, is_packed, result,
)

include "conv_checks.pxi"

cdef enum:
    WORK_SIZE = 16 << 20  # bytes in which the kernels lay out patches, whatever their size


def conv_transpose_1d(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int p0=0, int d0=1):
    """Return the transposed convolution of b with a, F32 [(L - 1) * s0 + K, OC].

    a: F32 or F16 [K, OC, IC].  b: F32 [L, IC].  Contiguous rows.  p0, d0: 0 and 1, ggml has no others.
    Raises: ShapeError if channels differ.
    Wraps: ggml_conv_transpose_1d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef double n
    operands = ("a", a, "b", b)
    if not is_float(pa) or pb.type != c.GGML_TYPE_F32:
        raise bad_type("conv_transpose_1d", "a must be F32 or F16, b F32", operands)
    check_filled("conv_transpose_1d", pa, pb, operands)
    if pa.ne[2] != pb.ne[1] or pa.ne[3] != 1 or pb.ne[2] * pb.ne[3] != 1:
        raise bad_shape("conv_transpose_1d", "a must be [K, OC, IC], b [L, IC]", operands)
    if not has_rows(pa) or not has_rows(pb):
        raise bad_shape("conv_transpose_1d", "the rows of a and b must be contiguous", operands)
    if not 1 <= s0 <= MAX_STEP or p0 != 0 or d0 != 1:
        raise bad_value("conv_transpose_1d", f"stride {s0} is not from 1 to {MAX_STEP}, padding {p0} not 0, "
                                             f"or dilation {d0} not 1")
    n = (<double> pb.ne[0] - 1) * s0 + pa.ne[0]
    if n * pa.ne[1] > MAX_INT or c.ggml_nelements(pa) > MAX_INT or c.ggml_nelements(pb) > MAX_INT:
        raise bad_shape("conv_transpose_1d", "an operand or the result is too large", operands)
    return result(ctx, c.ggml_conv_transpose_1d(ctx.room(1), pa, pb, s0, p0, d0), a, b)


def conv_transpose_2d_p0(Context ctx not None, Tensor a not None, Tensor b not None, int stride):
    """Return the transposed convolution of b with a, F32 [(W - 1) * stride + KW, (H - 1) * stride + KH, OC, N].

    a: F32 or F16 [KW, KH, OC, IC], contiguous planes.  b: F32 [W, H, IC, N], contiguous rows.  No padding.
    Raises: ShapeError if channels differ.
    Wraps: ggml_conv_transpose_2d_p0.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef double n
    operands = ("a", a, "b", b)
    if not is_float(pa) or pb.type != c.GGML_TYPE_F32:
        raise bad_type("conv_transpose_2d_p0", "a must be F32 or F16, b F32", operands)
    check_filled("conv_transpose_2d_p0", pa, pb, operands)
    if pa.ne[3] != pb.ne[2]:
        raise bad_shape("conv_transpose_2d_p0", "channels (a.ne3, b.ne2) differ", operands)
    if not has_rows(pa) or not has_rows(pb) or (pa.ne[1] > 1 and pa.nb[1] != pa.ne[0] * pa.nb[0]):
        raise bad_shape("conv_transpose_2d_p0", "the rows of b and the planes of a must be contiguous", operands)
    if not 1 <= stride <= MAX_STEP:
        raise bad_value("conv_transpose_2d_p0", f"stride {stride} is not from 1 to {MAX_STEP}")
    n = ((<double> pb.ne[0] - 1) * stride + pa.ne[0]) * ((<double> pb.ne[1] - 1) * stride + pa.ne[1])
    if n > MAX_INT or c.ggml_nelements(pa) > MAX_INT or c.ggml_nelements(pb) > MAX_INT:
        raise bad_shape("conv_transpose_2d_p0", "an operand or the result is too large", operands)
    check_size("conv_transpose_2d_p0", n * pa.ne[2] * pb.ne[3], operands)
    return result(ctx, c.ggml_conv_transpose_2d_p0(ctx.room(1), pa, pb, stride), a, b)


cdef int check_direct(str op, c.ggml_tensor * pa, c.ggml_tensor * pb, double n_patch, double n_out,
                      operands) except -1:
    """Check types, and that a patch of n_patch elements with its n_out results has room in the kernel's memory."""
    if not is_float(pa) or pb.type != c.GGML_TYPE_F32:
        raise bad_type(op, "a must be F32 or F16, b F32", operands)
    check_filled(op, pa, pb, operands)
    if not c.ggml_is_contiguous(pa):
        raise bad_shape(op, "a must be contiguous", operands)
    if n_patch * c.ggml_type_size(pa.type) + n_out * 4 > WORK_SIZE:
        raise bad_shape(op, "a is too large", operands)
    return 0


def conv_2d_direct(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int s1, int p0, int p1, int d0,
                   int d1):
    """Return the convolution of b with a, F32 [OW, OH, OC, N].

    a: F32 or F16 [KW, KH, IC, OC], contiguous.  b: F32 [W, H, IC, N], of any strides; multiplied in a's type.
    Raises: ShapeError if channels differ, b is too small, or a kernel larger than 16 MiB.
    Wraps: ggml_conv_2d_direct.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef Steps st = steps(s0, p0, d0, s1, p1, d1)
    operands = ("a", a, "b", b)
    check_direct("conv_2d_direct", pa, pb, <double> pa.ne[0] * pa.ne[1] * pa.ne[2], pa.ne[3], operands)
    if pa.ne[2] != pb.ne[2]:
        raise bad_shape("conv_2d_direct", "channels (ne2) differ", operands)
    check_size("conv_2d_direct", <double> count("conv_2d_direct", pa, pb, st, 0, operands) * pa.ne[3]
               * count("conv_2d_direct", pa, pb, st, 1, operands) * pb.ne[3], operands)
    return result(ctx, c.ggml_conv_2d_direct(ctx.room(1), pa, pb, s0, s1, p0, p1, d0, d1), a, b)


def conv_3d_direct(Context ctx not None, Tensor a not None, Tensor b not None, int s0, int s1, int s2, int p0, int p1,
                   int p2, int d0, int d1, int d2, int n_channels, int n_batch, int n_channels_out):
    """Return the convolution of b with a, F32 [OW, OH, OD, n_channels_out * n_batch].

    a: F32 or F16 [KW, KH, KD, n_channels * n_channels_out], contiguous.  b: F32 [W, H, D, n_channels * n_batch], of
    any strides; multiplied in a's type.
    Raises: ShapeError if ne3 is not that, b is too small, or a kernel larger than 16 MiB.
    Wraps: ggml_conv_3d_direct.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef Steps st = steps(s0, p0, d0, s1, p1, d1, s2, p2, d2)
    operands = ("a", a, "b", b)
    check_direct("conv_3d_direct", pa, pb, <double> pa.ne[0] * pa.ne[1] * pa.ne[2] * n_channels, n_channels_out,
                 operands)
    if (n_channels < 1 or n_batch < 1 or n_channels_out < 1 or pa.ne[3] != <int64_t> n_channels * n_channels_out
            or pb.ne[3] != <int64_t> n_channels * n_batch):
        raise bad_shape("conv_3d_direct", f"ne3 is not of {n_channels} channels times {n_channels_out} or {n_batch}",
                        operands)
    check_size("conv_3d_direct", <double> count("conv_3d_direct", pa, pb, st, 0, operands) * n_channels_out * n_batch
               * count("conv_3d_direct", pa, pb, st, 1, operands) * count("conv_3d_direct", pa, pb, st, 2, operands),
               operands)
    return result(ctx, c.ggml_conv_3d_direct(ctx.room(1), pa, pb, s0, s1, s2, p0, p1, p2, d0, d1, d2, n_channels,
                                             n_batch, n_channels_out), a, b)


cdef bint is_channels_first(c.ggml_tensor * t, int dim) noexcept nogil:
    """Return whether dimension `dim`, the channels, is the innermost in memory, then come ne0 and ne1, all packed."""
    cdef size_t nb = c.ggml_type_size(t.type)
    return t.nb[dim] == nb and t.nb[0] == t.ne[dim] * nb and t.nb[1] == t.ne[0] * t.nb[0]


def conv_2d_dw_direct(Context ctx not None, Tensor a not None, Tensor b not None, int stride0, int stride1, int pad0,
                      int pad1, int dilation0, int dilation1):
    """Return the convolution of each channel of b with a kernel of its own, F32 [OW, OH, C, N].

    a: F32 or F16 [KW, KH, 1, C].  b: F32 [W, H, C, N].  Either both are contiguous, or both are views whose channels
    are innermost in memory, as permute makes them; the result's are then too.
    Raises: ShapeError if these do not match or b is too small.
    Wraps: ggml_conv_2d_dw_direct.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef Steps st = steps(stride0, pad0, dilation0, stride1, pad1, dilation1)
    cdef bint plain, inner
    operands = ("a", a, "b", b)
    if not is_float(pa) or pb.type != c.GGML_TYPE_F32:
        raise bad_type("conv_2d_dw_direct", "a must be F32 or F16, b F32", operands)
    check_filled("conv_2d_dw_direct", pa, pb, operands)
    if pa.ne[2] != 1 or pa.ne[3] != pb.ne[2]:
        raise bad_shape("conv_2d_dw_direct", "a must be [KW, KH, 1, C] for b's channels (ne2)", operands)
    # the builder asks whether channels are inside, the kernel whether b is contiguous: nothing that is both
    plain = is_packed(pb) and c.ggml_is_contiguous(pa) and pb.nb[0] <= pb.nb[2]
    inner = (is_channels_first(pb, 2) and is_channels_first(pa, 3) and pa.nb[2] <= pa.nb[0]
             and pb.nb[2] < pb.nb[0] < pb.nb[1] and not c.ggml_is_contiguous(pb)
             and (pb.ne[3] == 1 or pb.nb[3] == pb.ne[1] * pb.nb[1]))
    if not plain and not inner:
        raise bad_shape("conv_2d_dw_direct", "a and b must both be contiguous, or both with channels inside", operands)
    check_size("conv_2d_dw_direct", <double> count("conv_2d_dw_direct", pa, pb, st, 0, operands) * pb.ne[2] * pb.ne[3]
               * count("conv_2d_dw_direct", pa, pb, st, 1, operands), operands)
    return result(ctx, c.ggml_conv_2d_dw_direct(ctx.room(1), pa, pb, stride0, stride1, pad0, pad1, dilation0,
                                                dilation1), a, b)
