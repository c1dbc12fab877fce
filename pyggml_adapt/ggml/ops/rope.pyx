"""Rotary position embedding: each head's elements, in pairs, rotated by angles that grow with the position."""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport bad_shape, bad_type, bad_value, fits, has_rows, is_float, result


cdef struct Yarn:
    int n_ctx_orig
    float freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow


ctypedef c.ggml_tensor * (*ext_op)(c.ggml_context *, c.ggml_tensor *, c.ggml_tensor *, c.ggml_tensor *, int, int, int,
                                   float, float, float, float, float, float)
ctypedef c.ggml_tensor * (*multi_op)(c.ggml_context *, c.ggml_tensor *, c.ggml_tensor *, c.ggml_tensor *, int, int *,
                                     int, int, float, float, float, float, float, float)


cdef int check_rope(str op, Tensor a, Tensor pos, Tensor freq_factors, int n_dims, int n_pos) except -1:
    """Check what is rotated, and that there are n_pos positions for each token."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pp = pos.ptr()
    cdef c.ggml_tensor * pf
    operands = ("a", a, "pos", pos, "freq_factors", freq_factors)
    if not is_float(pa):
        raise bad_type(op, "a must be F32 or F16", operands)
    if pp.type != c.GGML_TYPE_I32:
        raise bad_type(op, "pos must be I32", operands)
    if not has_rows(pa):
        raise bad_shape(op, "the rows of a must be contiguous", operands)
    if n_dims < 2 or n_dims % 2 or n_dims > pa.ne[0]:
        raise bad_shape(op, f"n_dims = {n_dims} is not an even number up to ne0", operands)
    if pa.ne[0] % 2:
        raise bad_shape(op, "ne0 must be even", operands)
    if not fits(pa):
        raise bad_shape(op, "a is too large", operands)
    if pp.ne[0] != n_pos * pa.ne[2] or pp.ne[1] * pp.ne[2] * pp.ne[3] != 1 or not has_rows(pp):
        each = "one position" if n_pos == 1 else f"{n_pos} positions"
        raise bad_shape(op, f"pos needs {each} for each token", operands)
    if freq_factors is not None:
        pf = freq_factors.ptr()
        if (pf.type != c.GGML_TYPE_F32 or pf.ne[0] < n_dims // 2 or pf.ne[1] * pf.ne[2] * pf.ne[3] != 1
                or not has_rows(pf)):
            raise bad_shape(op, "freq_factors must be F32 [>= n_dims/2]", operands)
    return 0


cdef c.ggml_tensor * factors_of(Context ctx, Tensor freq_factors, Tensor a) except? NULL:
    """Return the frequency factors, with zeros behind if there are less than ne0/2.

    The kernel reads ne0/2 of them, though it uses only n_dims/2: without the zeros it would read beyond the tensor.
    """
    cdef c.ggml_tensor * pf
    cdef int missing
    if freq_factors is None:
        return NULL
    pf = freq_factors.ptr()
    missing = <int> (a.ptr().ne[0] // 2 - pf.ne[0])
    return pf if missing <= 0 else c.ggml_pad(ctx.room(1), pf, missing, 0, 0, 0)


cdef int check_mode(str op, int mode) except -1:
    if mode != c.GGML_ROPE_TYPE_NORMAL and mode != c.GGML_ROPE_TYPE_NEOX:
        raise bad_value(op, f"mode {mode} is neither RopeType.NORMAL nor RopeType.NEOX")
    return 0


cdef Tensor ext(str op, ext_op call, Context ctx, Tensor a, Tensor pos, Tensor freq_factors, int n_dims, int mode,
                Yarn y):
    check_mode(op, mode)
    check_rope(op, a, pos, freq_factors, n_dims, 1)
    cdef c.ggml_tensor * pf = factors_of(ctx, freq_factors, a)
    return result(ctx, call(ctx.room(1), a.ptr(), pos.ptr(), pf, n_dims, mode, y.n_ctx_orig, y.freq_base, y.freq_scale,
                            y.ext_factor, y.attn_factor, y.beta_fast, y.beta_slow), a, pos, freq_factors)


cdef int read_sections(int * dims, str op, sections, int64_t ne0) except -1:
    """Fill dims from the four numbers, which must be from 0 up, with one above 0 among the first three, up to ne0."""
    cdef int i
    numbers = tuple(sections)
    if len(numbers) != 4 or min(numbers) < 0 or sum(numbers) > ne0 or not any(numbers[:3]):
        raise bad_value(op, f"sections {list(numbers)} are not four numbers from 0 up, one of the first three above 0, "
                            f"of at most {ne0} together")
    for i in range(4):
        dims[i] = numbers[i]
    return 0


cdef Tensor multi(str op, multi_op call, Context ctx, Tensor a, Tensor pos, Tensor freq_factors, int n_dims, sections,
                  int mode, Yarn y):
    cdef int dims[4]
    cdef int64_t ne0 = a.ptr().ne[0]
    cdef bint sectioned = (mode == c.GGML_ROPE_TYPE_MROPE or mode == c.GGML_ROPE_TYPE_IMROPE
                           or mode == c.GGML_ROPE_TYPE_VISION)
    if not sectioned and mode != c.GGML_ROPE_TYPE_NORMAL and mode != c.GGML_ROPE_TYPE_NEOX:
        raise bad_value(op, f"mode {mode} is not a RopeType")
    check_rope(op, a, pos, freq_factors, n_dims, 4 if sectioned else 1)
    if sectioned:
        read_sections(dims, op, sections, ne0)
    else:
        dims[0] = dims[1] = dims[2] = dims[3] = 0
    if mode == c.GGML_ROPE_TYPE_VISION and n_dims * 2 != ne0:
        raise bad_shape(op, f"n_dims = {n_dims} is not half of ne0, as RopeType.VISION needs", ("a", a))
    if mode == c.GGML_ROPE_TYPE_VISION and (dims[0] == 0 or (dims[1] == 0 and dims[2] + dims[3])
                                            or (dims[2] == 0 and dims[3])):
        # the kernel starts a section again where the one before ends, and takes only one of those that begin there
        raise bad_value(op, f"sections {list(sections)} have an empty one before another, not with RopeType.VISION")
    cdef c.ggml_tensor * pf = factors_of(ctx, freq_factors, a)
    return result(ctx, call(ctx.room(1), a.ptr(), pos.ptr(), pf, n_dims, dims, mode, y.n_ctx_orig, y.freq_base,
                            y.freq_scale, y.ext_factor, y.attn_factor, y.beta_fast, y.beta_slow), a, pos, freq_factors)


cdef Tensor simple(str op, c.ggml_tensor * (*call)(c.ggml_context *, c.ggml_tensor *, c.ggml_tensor *, int, int),
                   Context ctx, Tensor a, Tensor pos, int n_dims, int mode):
    check_mode(op, mode)
    check_rope(op, a, pos, None, n_dims, 1)
    return result(ctx, call(ctx.room(1), a.ptr(), pos.ptr(), n_dims, mode), a, pos)


def rope(Context ctx not None, Tensor a not None, Tensor pos not None, int n_dims, int mode):
    """Return a with rotary position embedding of base 10000, shape and type of a.

    a: F32 or F16 [n_embd_head, n_head, n_tokens, ...].  pos: I32 [n_tokens].
    n_dims: how many elements of each head are rotated.  mode: RopeType.NORMAL or NEOX.
    Raises: ShapeError if these do not match, or n_dims or ne0 is odd.
    Wraps: ggml_rope.
    """
    return simple("rope", c.ggml_rope, ctx, a, pos, n_dims, mode)


def rope_inplace(Context ctx not None, Tensor a not None, Tensor pos not None, int n_dims, int mode):
    """Return a view of a, in whose memory rope's result is written.

    Raises: as rope.
    Wraps: ggml_rope_inplace.
    """
    return simple("rope_inplace", c.ggml_rope_inplace, ctx, a, pos, n_dims, mode)


def rope_ext(Context ctx not None, Tensor a not None, Tensor pos not None, Tensor freq_factors, int n_dims, int mode,
             int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast,
             float beta_slow):
    """Return a with rotary position embedding, shape and type of a.

    a: F32 or F16 [n_embd_head, n_head, n_tokens, ...].  pos: I32 [n_tokens].  freq_factors: F32 [>= n_dims/2], what
    the frequencies are divided by, or None; less than n_embd_head/2 are padded by one more node.
    n_dims: how many elements of each head are rotated.  mode: RopeType.NORMAL or NEOX.  The others as YaRN has them.
    Raises: ShapeError if these do not match, or n_dims or ne0 is odd.
    Wraps: ggml_rope_ext.
    """
    return ext("rope_ext", c.ggml_rope_ext, ctx, a, pos, freq_factors, n_dims, mode,
               Yarn(n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow))


def rope_ext_inplace(Context ctx not None, Tensor a not None, Tensor pos not None, Tensor freq_factors, int n_dims,
                     int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor,
                     float beta_fast, float beta_slow):
    """Return a view of a, in whose memory rope_ext's result is written.

    Raises: as rope_ext.
    Wraps: ggml_rope_ext_inplace.
    """
    return ext("rope_ext_inplace", c.ggml_rope_ext_inplace, ctx, a, pos, freq_factors, n_dims, mode,
               Yarn(n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow))


def rope_ext_back(Context ctx not None, Tensor a not None, Tensor pos not None, Tensor freq_factors, int n_dims,
                  int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor,
                  float beta_fast, float beta_slow):
    """Return the gradient of rope_ext's operand, a being that of its result: rotated the other way, shape of a.

    Raises: as rope_ext.
    Wraps: ggml_rope_ext_back.
    """
    return ext("rope_ext_back", c.ggml_rope_ext_back, ctx, a, pos, freq_factors, n_dims, mode,
               Yarn(n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow))


def rope_multi(Context ctx not None, Tensor a not None, Tensor pos not None, Tensor freq_factors, int n_dims, sections,
               int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor,
               float beta_fast, float beta_slow):
    """Return a rotated by up to four positions of each token (time, height, width, extra), shape and type of a.

    pos: I32 [4 * n_tokens], first all of time, then of height, of width, and the extra ones.
    sections: four numbers: how many pairs turn by each of them.  mode: RopeType.MROPE, IMROPE (sections interleaved)
    or VISION (each section from the first frequency on; n_dims is ne0/2, and all of ne0 is rotated); NORMAL and NEOX,
    which have no sections and one position for each token.  All else as rope_ext.
    Raises: ShapeError if these do not match, the sections are negative, more than ne0 or none, or with VISION one
    is empty before another.
    Wraps: ggml_rope_multi.
    """
    return multi("rope_multi", c.ggml_rope_multi, ctx, a, pos, freq_factors, n_dims, sections, mode,
                 Yarn(n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow))


def rope_multi_inplace(Context ctx not None, Tensor a not None, Tensor pos not None, Tensor freq_factors, int n_dims,
                       sections, int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor,
                       float attn_factor, float beta_fast, float beta_slow):
    """Return a view of a, in whose memory rope_multi's result is written.

    Raises: as rope_multi.
    Wraps: ggml_rope_multi_inplace.
    """
    return multi("rope_multi_inplace", c.ggml_rope_multi_inplace, ctx, a, pos, freq_factors, n_dims, sections, mode,
                 Yarn(n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow))


def rope_multi_back(Context ctx not None, Tensor a not None, Tensor pos not None, Tensor freq_factors, int n_dims,
                    sections, int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor,
                    float attn_factor, float beta_fast, float beta_slow):
    """Return the gradient of rope_multi's operand, a being that of its result, shape of a.

    Raises: as rope_multi.
    Wraps: ggml_rope_multi_back.
    """
    return multi("rope_multi_back", c.ggml_rope_multi_back, ctx, a, pos, freq_factors, n_dims, sections, mode,
                 Yarn(n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow))


def rope_set_offset(Tensor a not None, int n_offs):
    """Return a, the result of a rope op, which now leaves the first n_offs elements of each head as they are and
    rotates the n_dims after these.

    Raises: ShapeError unless a is such a result, not of RopeType.VISION, and n_offs is even and leaves room for n_dims.
    Wraps: ggml_rope_set_offset.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    a.check_settable()
    if pa.op != c.GGML_OP_ROPE and pa.op != c.GGML_OP_ROPE_BACK:
        raise bad_value("rope_set_offset", f"{a.op} is not the result of rope")
    if pa.op_params[2] == c.GGML_ROPE_TYPE_VISION:
        raise bad_value("rope_set_offset", "RopeType.VISION rotates all elements")
    if n_offs < 0 or n_offs % 2 or n_offs > pa.ne[0] - pa.op_params[1]:
        raise bad_shape("rope_set_offset", f"n_offs = {n_offs} is not an even number up to ne0 - n_dims", ("a", a))
    c.ggml_rope_set_offset(pa, n_offs)
    return a
