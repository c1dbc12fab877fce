"""Ops that make tensors larger or smaller: joining, repeating, padding, scaling, and parting into windows."""

from libc.stdint cimport int64_t, uint32_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor, read_ne
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, bad_value, check_rows, check_size, fits, has_rows, result,
)


cdef enum:
    MAX_SCALED = 1 << 22  # upscaling divides positions by a float factor: of larger ones the last could round up


def concat(Context ctx not None, Tensor a not None, Tensor b not None, int dim):
    """Return a followed by b along dimension dim (0 to 3), a's type.

    a, b: of one type; contiguous rows if that is quantised or has elements of 8 bytes.
    Raises: ShapeError if another dimension differs, DTypeError if the types do.
    Wraps: ggml_concat.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    if not 0 <= dim < c.GGML_MAX_DIMS:
        raise bad_value("concat", f"dim {dim} is not 0 to 3")
    if pa.type != pb.type:
        raise bad_type("concat", "both must have one type", operands)
    for i in range(4):
        if i != dim and pa.ne[i] != pb.ne[i]:
            raise bad_shape("concat", f"ne{i} differs", operands)
    if (c.ggml_is_quantized(pa.type) or c.ggml_type_size(pa.type) == 8) and not (has_rows(pa) and has_rows(pb)):
        raise bad_shape("concat", "rows of blocks or of 8-byte elements must be contiguous", operands)
    if pa.ne[dim] + pb.ne[dim] > MAX_INT or not fits(pa) or not fits(pb):
        raise bad_shape("concat", "a dimension is too large", operands)
    check_size("concat", <double> c.ggml_nelements(pa) + c.ggml_nelements(pb), operands)
    return result(ctx, c.ggml_concat(ctx.room(1), pa, pb, dim), a, b)


cdef int check_repeat(str op, Tensor a, int64_t * d, ne, operands) except -1:
    """Check that copies of a fill ne, which d has as numbers."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef size_t size = c.ggml_type_size(pa.type)
    if c.ggml_blck_size(pa.type) != 1 or not (size == 2 or size == 4):
        raise bad_type(op, "a must be F32, F16, BF16, I32 or I16", operands)
    for i in range(4):
        if d[i] > 0x7FFFFFFF:  # the kernel counts with int
            raise bad_shape(op, f"{list(ne)} is too large", operands)
        if d[i] % pa.ne[i] if pa.ne[i] else d[i]:
            raise bad_shape(op, f"{list(ne)} is not a multiple of a", operands)
    if not has_rows(pa):
        raise bad_shape(op, "the rows of a must be contiguous", operands)
    return 0


def repeat(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return copies of a side by side that fill the shape of b, a's type.  b: any tensor, only its shape is taken.

    a: F32, F16, BF16, I32 or I16, with contiguous rows.
    Raises: ShapeError if a dimension of b is not a multiple of a's.
    Wraps: ggml_repeat.
    """
    cdef c.ggml_tensor * pb = b.ptr()
    check_repeat("repeat", a, pb.ne, b.ne, ("a", a, "b", b))
    return result(ctx, c.ggml_repeat(ctx.room(1), a.ptr(), pb), a)


def repeat_4d(Context ctx not None, Tensor a not None, ne0, ne1, ne2, ne3):
    """Return copies of a side by side that fill [ne0, ne1, ne2, ne3], a's type.

    a: F32, F16, BF16, I32 or I16, with contiguous rows.
    Raises: ShapeError if a dimension is not a multiple of a's.
    Wraps: ggml_repeat_4d.
    """
    cdef int64_t d[4]
    ne = (ne0, ne1, ne2, ne3)
    read_ne(d, "repeat_4d", ne)
    check_repeat("repeat_4d", a, d, ne, ("a", a))
    return result(ctx, c.ggml_repeat_4d(ctx.room(1), a.ptr(), d[0], d[1], d[2], d[3]), a)


def repeat_back(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return the gradient of repeat: the sum of the parts of a, each of the shape of b, F32 of that shape.

    a: F32, contiguous rows.  b: any tensor, only its shape is taken.
    Raises: ShapeError if a dimension of a is not a multiple of b's.
    Wraps: ggml_repeat_back.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    check_rows("repeat_back", a)
    if not c.ggml_can_repeat(pb, pa):
        raise bad_shape("repeat_back", "a is not a multiple of b", operands)
    if not fits(pa) or c.ggml_nelements(pb) > MAX_INT:
        raise bad_shape("repeat_back", "a dimension is too large", operands)
    return result(ctx, c.ggml_repeat_back(ctx.room(1), pa, pb), a)


cdef int check_pad(str op, Tensor a, tuple p, bint circular) except -1:
    """Check the numbers of elements p = (before, behind, ...) that are added to each dimension of a."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef double size = 1
    cdef int i
    if pa.type != c.GGML_TYPE_F32:
        raise bad_type(op, "a must be F32", ("a", a))
    if min(p) < 0:
        raise bad_shape(op, f"cannot add {min(p)} elements", ("a", a))
    for i in range(4):
        size *= <double> pa.ne[i] + <double> p[2 * i] + <double> p[2 * i + 1]
        if circular and pa.ne[i] == 0:
            raise bad_shape(op, "a is empty", ("a", a))
        if circular and p[2 * i] > pa.ne[i]:  # the kernel adds ne only once before it takes the remainder
            raise bad_shape(op, f"{p[2 * i]} elements before a are more than ne{i}", ("a", a))
    return check_size(op, size, ("a", a))


def pad(Context ctx not None, Tensor a not None, int p0, int p1, int p2, int p3):
    """Return a followed by p0 to p3 zeros in its dimensions, [a.ne0 + p0, a.ne1 + p1, a.ne2 + p2, a.ne3 + p3].

    a: F32, of any strides.
    Raises: ShapeError if one of them is negative.
    Wraps: ggml_pad.
    """
    check_pad("pad", a, (0, p0, 0, p1, 0, p2, 0, p3), False)
    return result(ctx, c.ggml_pad(ctx.room(1), a.ptr(), p0, p1, p2, p3), a)


def pad_circular(Context ctx not None, Tensor a not None, int p0, int p1, int p2, int p3):
    """Return a followed by p0 to p3 elements in its dimensions, as if a began again there; shape as of pad.

    a: F32, of any strides, not empty.
    Raises: ShapeError if one of them is negative.
    Wraps: ggml_pad_circular.
    """
    check_pad("pad_circular", a, (0, p0, 0, p1, 0, p2, 0, p3), True)
    return result(ctx, c.ggml_pad_circular(ctx.room(1), a.ptr(), p0, p1, p2, p3), a)


def pad_ext(Context ctx not None, Tensor a not None, int lp0, int rp0, int lp1, int rp1, int lp2, int rp2, int lp3,
            int rp3):
    """Return a with lp0 to lp3 zeros before and rp0 to rp3 behind it, [lp0 + a.ne0 + rp0, lp1 + a.ne1 + rp1, ...].

    a: F32, of any strides.
    Raises: ShapeError if one of them is negative.
    Wraps: ggml_pad_ext.
    """
    check_pad("pad_ext", a, (lp0, rp0, lp1, rp1, lp2, rp2, lp3, rp3), False)
    return result(ctx, c.ggml_pad_ext(ctx.room(1), a.ptr(), lp0, rp0, lp1, rp1, lp2, rp2, lp3, rp3), a)


def pad_ext_circular(Context ctx not None, Tensor a not None, int lp0, int rp0, int lp1, int rp1, int lp2, int rp2,
                     int lp3, int rp3):
    """Return a with elements before and behind it as pad_ext, as if a ended and began again there.

    a: F32, of any strides, not empty.
    Raises: ShapeError if one of them is negative, or lp0 to lp3 is more than a has in that dimension.
    Wraps: ggml_pad_ext_circular.
    """
    check_pad("pad_ext_circular", a, (lp0, rp0, lp1, rp1, lp2, rp2, lp3, rp3), True)
    return result(ctx, c.ggml_pad_ext_circular(ctx.room(1), a.ptr(), lp0, rp0, lp1, rp1, lp2, rp2, lp3, rp3), a)


def pad_reflect_1d(Context ctx not None, Tensor a not None, int p0, int p1):
    """Return a with p0 elements before and p1 behind its rows, a mirrored at its ends, [p0 + a.ne0 + p1, a.ne1, ...].

    a: F32, contiguous.
    Raises: ShapeError unless p0 and p1 are from 0 to a.ne0 - 1, and a contiguous.
    Wraps: ggml_pad_reflect_1d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_rows("pad_reflect_1d", a)
    if not c.ggml_is_contiguous(pa) or not fits(pa):
        raise bad_shape("pad_reflect_1d", "a must be contiguous", ("a", a))
    if not (0 <= p0 < pa.ne[0] and 0 <= p1 < pa.ne[0]):
        raise bad_shape("pad_reflect_1d", f"{p0} and {p1} are not from 0 to ne0 - 1", ("a", a))
    check_size("pad_reflect_1d", 3.0 * c.ggml_nelements(pa), ("a", a))
    return result(ctx, c.ggml_pad_reflect_1d(ctx.room(1), pa, p0, p1), a)


def roll(Context ctx not None, Tensor a not None, int shift0, int shift1, int shift2, int shift3):
    """Return a with its elements shift0 to shift3 places further in each dimension, the last ones first; shape of a.

    a: F32, contiguous rows.
    Raises: ShapeError unless each shift is less than that dimension of a, either way.
    Wraps: ggml_roll.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    shifts = (shift0, shift1, shift2, shift3)
    check_rows("roll", a)
    for i in range(4):
        if not -pa.ne[i] < shifts[i] < pa.ne[i]:
            raise bad_shape("roll", f"a shift of {list(shifts)} is not less than ne{i}", ("a", a))
    if not fits(pa):
        raise bad_shape("roll", "a dimension is too large", ("a", a))
    return result(ctx, c.ggml_roll(ctx.room(1), pa, shift0, shift1, shift2, shift3), a)


cdef int check_scaling(str op, Tensor a, int64_t * d, uint32_t mode) except -1:
    """Check that a can be scaled to the shape d; mode: a ScaleMode, with ScaleFlags."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef uint32_t base = mode & 0xFF
    if pa.type != c.GGML_TYPE_F32:
        raise bad_type(op, "a must be F32", ("a", a))
    if (base not in (c.GGML_SCALE_MODE_NEAREST, c.GGML_SCALE_MODE_BILINEAR, c.GGML_SCALE_MODE_BICUBIC)
            or mode & ~<uint32_t> (0xFF | c.GGML_SCALE_FLAG_ALIGN_CORNERS | c.GGML_SCALE_FLAG_ANTIALIAS)):
        raise bad_value(op, f"mode {mode} is not a ScaleMode with ScaleFlags")
    if mode & c.GGML_SCALE_FLAG_ANTIALIAS and base != c.GGML_SCALE_MODE_BILINEAR:
        raise bad_value(op, "ScaleFlag.ANTIALIAS needs ScaleMode.BILINEAR")
    # the last element would not be reached by the nearest in float, and antialiasing would leave out neighbours
    if mode & c.GGML_SCALE_FLAG_ALIGN_CORNERS and (base == c.GGML_SCALE_MODE_NEAREST
                                                   or mode & c.GGML_SCALE_FLAG_ANTIALIAS):
        raise bad_value(op, "ScaleFlag.ALIGN_CORNERS needs ScaleMode.BILINEAR or BICUBIC alone")
    for i in range(4):
        if pa.ne[i] == 0 or pa.ne[i] > MAX_SCALED or d[i] > MAX_SCALED:
            raise bad_shape(op, f"dimensions must be 1 to {MAX_SCALED}, not {[d[0], d[1], d[2], d[3]]}", ("a", a))
    return check_size(op, <double> d[0] * d[1] * d[2] * d[3], ("a", a))


def upscale(Context ctx not None, Tensor a not None, int scale_factor, int mode):
    """Return a scale_factor times as wide and high, F32 [a.ne0 * scale_factor, a.ne1 * scale_factor, a.ne2, a.ne3].

    a: F32 [width, height, ...], of any strides.  mode: a ScaleMode.
    Raises: ShapeError unless scale_factor is 2 or more and dimensions are 1 to 2^22.
    Wraps: ggml_upscale.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef int64_t d[4]
    if scale_factor < 2 or scale_factor > MAX_SCALED:
        raise bad_value("upscale", f"scale_factor {scale_factor} is not from 2 to {MAX_SCALED}")
    d[0], d[1], d[2], d[3] = pa.ne[0] * scale_factor, pa.ne[1] * scale_factor, pa.ne[2], pa.ne[3]
    if mode & ~0xFF:
        raise bad_value("upscale", f"mode {mode} is not a ScaleMode")
    check_scaling("upscale", a, d, mode)
    return result(ctx, c.ggml_upscale(ctx.room(1), pa, scale_factor, <c.ggml_scale_mode> mode), a)


def interpolate(Context ctx not None, Tensor a not None, ne0, ne1, ne2, ne3, uint32_t mode):
    """Return a scaled to F32 [ne0, ne1, ne2, ne3]: ne0 and ne1 as mode says, ne2 and ne3 by the nearest.

    a: F32, of any strides.  mode: a ScaleMode, to which a ScaleFlag can be added: ANTIALIAS to BILINEAR, ALIGN_CORNERS
    to BILINEAR or BICUBIC.  Positions are F32: on the border of two elements, the nearest may be the first of them.
    Raises: ShapeError unless dimensions are 1 to 2^22.
    Wraps: ggml_interpolate.
    """
    cdef int64_t d[4]
    read_ne(d, "interpolate", (ne0, ne1, ne2, ne3))
    check_scaling("interpolate", a, d, mode)
    return result(ctx, c.ggml_interpolate(ctx.room(1), a.ptr(), d[0], d[1], d[2], d[3], mode), a)


def timestep_embedding(Context ctx not None, Tensor timesteps not None, int dim, int max_period):
    """Return sinusoidal embeddings of n timesteps: cosines, then sines, and a 0 if dim is odd, F32 [dim, n].

    timesteps: F32 [n], contiguous.  max_period: the lowest of the dim / 2 frequencies is near 1 / max_period.
    Raises: ShapeError unless dim and max_period are 1 or more.
    Wraps: ggml_timestep_embedding.
    """
    cdef c.ggml_tensor * pt = timesteps.ptr()
    check_rows("timestep_embedding", timesteps)
    operands = ("timesteps", timesteps)
    if dim < 1 or max_period < 1:
        raise bad_value("timestep_embedding", f"dim {dim} or max_period {max_period} is less than 1")
    if pt.ne[1] * pt.ne[2] * pt.ne[3] != 1:
        raise bad_shape("timestep_embedding", "timesteps must have one dimension", operands)
    check_size("timestep_embedding", <double> dim * pt.ne[0], operands)
    return result(ctx, c.ggml_timestep_embedding(ctx.room(1), pt, dim, max_period), timesteps)
