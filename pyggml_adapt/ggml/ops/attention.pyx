"""Attention: masked softmax, flash attention, and what selects the keys that it looks at."""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor, root_of
from pyggml_adapt.ggml.ops.checks cimport (
    bad_shape, bad_type, bad_value, check_even_rows, check_rows, check_size, check_weights, fits, has_rows,
    is_float, is_weight, keep_apart, result,
)


ctypedef c.ggml_tensor * (*ext_op)(c.ggml_context *, c.ggml_tensor *, c.ggml_tensor *, float, float)


cdef bint covers(c.ggml_tensor * mask, int64_t n_kv, int64_t n_tokens, int64_t n_head, int64_t n_seq) noexcept nogil:
    """Return whether the mask has a number for each logit, if it is broadcast over heads and sequences."""
    return (mask.ne[0] == n_kv and mask.ne[1] >= n_tokens and mask.ne[2] != 0 and mask.ne[3] != 0
            and n_head % mask.ne[2] == 0 and n_seq % mask.ne[3] == 0 and c.ggml_is_contiguous(mask))


cdef int check_qkv(c.ggml_tensor * pq, c.ggml_tensor * pk, c.ggml_tensor * pv, operands) except -1:
    check_weights("flash_attn_ext", pk, pq, operands)
    if pq.type != c.GGML_TYPE_F32 or not is_weight(pv):
        raise bad_type("flash_attn_ext", "q must be F32, k and v of floating-point or quantised types", operands)
    if (pk.ne[2] == 0 or pq.ne[2] % pk.ne[2] or pk.ne[1] != pv.ne[1] or pv.ne[2] == 0 or pq.ne[2] % pv.ne[2]
            or pq.ne[3] == 0 or pq.ne[3] != pk.ne[3] or pq.ne[3] != pv.ne[3] or not has_rows(pv)):
        raise bad_shape("flash_attn_ext", "q, k and v do not match", operands)
    if not fits(pq) or not fits(pk) or not fits(pv):
        raise bad_shape("flash_attn_ext", "q, k or v is too large", operands)
    return check_size("flash_attn_ext", <double> pv.ne[0] * pq.ne[1] * pq.ne[2] * pq.ne[3], operands)


cdef int check_sinks(str op, Tensor sinks, int64_t n_head, operands) except -1:
    """Check that there is one sink for each head, unless there are none."""
    cdef c.ggml_tensor * ps
    if sinks is None:
        return 0
    ps = sinks.ptr()
    if ps.type != c.GGML_TYPE_F32:
        raise bad_type(op, "sinks must be F32", operands)
    if ps.ne[0] != n_head or ps.ne[1] * ps.ne[2] * ps.ne[3] != 1 or not has_rows(ps):
        raise bad_shape(op, "sinks must be one contiguous number for each head", operands)
    return 0


cdef int check_logits(str op, Tensor a) except -1:
    check_rows(op, a)
    if not c.ggml_is_contiguous(a.ptr()):
        raise bad_shape(op, "a must be contiguous", ("a", a))
    if not fits(a.ptr()):
        raise bad_shape(op, "a is too large", ("a", a))
    return 0


def soft_max(Context ctx not None, Tensor a not None):
    """Return the softmax along ne0, shape of a.  a: F32, contiguous.  Wraps: ggml_soft_max."""
    check_logits("soft_max", a)
    return result(ctx, c.ggml_soft_max(ctx.room(1), a.ptr()), a)


def soft_max_inplace(Context ctx not None, Tensor a not None):
    """Return a view of a, in whose memory its softmax along ne0 is written.  Wraps: ggml_soft_max_inplace."""
    check_logits("soft_max_inplace", a)
    return result(ctx, c.ggml_soft_max_inplace(ctx.room(1), a.ptr()), a)


cdef Tensor masked(str op, ext_op call, Context ctx, Tensor a, Tensor mask, float scale, float max_bias, Tensor sinks):
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pm = NULL
    check_rows(op, a)
    operands = ("a", a, "mask", mask, "sinks", sinks)
    if not c.ggml_is_contiguous(pa) or (max_bias > 0 and mask is None):
        raise bad_shape(op, "a must be contiguous, and max_bias needs a mask", operands)
    if not fits(pa):
        raise bad_shape(op, "a is too large", operands)
    if mask is not None:
        pm = mask.ptr()
        if not is_float(pm):
            raise bad_type(op, "mask must be F16 or F32", operands)
        if not covers(pm, pa.ne[0], pa.ne[1], pa.ne[2], pa.ne[3]):
            raise bad_shape(op, "mask does not cover a", operands)
    check_sinks(op, sinks, pa.ne[2], operands)
    cdef c.ggml_tensor * t = call(ctx.room(1), pa, pm, scale, max_bias)
    if sinks is not None:
        keep_apart(t, sinks)
        c.ggml_soft_max_add_sinks(t, sinks.ptr())
    return result(ctx, t, a, mask, sinks)


def soft_max_ext(Context ctx not None, Tensor a not None, Tensor mask, float scale=1.0, float max_bias=0.0,
                 Tensor sinks=None):
    """Return softmax(a * scale + mask) along ne0, shape of a.

    a: F32, contiguous.  mask: contiguous F16 or F32 [a.ne0, >= a.ne1, ...], broadcast over ne2 and ne3, or None.
    max_bias: ALiBi's, 0 for none.
    sinks: F32 [a.ne2] or None: of each head one more logit, which takes its share and is then left out.
    Raises: ShapeError if the mask does not cover a, or the sinks are not one for each head.
    Wraps: ggml_soft_max_ext, ggml_soft_max_add_sinks.
    """
    return masked("soft_max_ext", c.ggml_soft_max_ext, ctx, a, mask, scale, max_bias, sinks)


def soft_max_ext_inplace(Context ctx not None, Tensor a not None, Tensor mask, float scale=1.0, float max_bias=0.0,
                         Tensor sinks=None):
    """Return a view of a, in whose memory soft_max_ext's result is written.

    Raises: as soft_max_ext.
    Wraps: ggml_soft_max_ext_inplace.
    """
    return masked("soft_max_ext_inplace", c.ggml_soft_max_ext_inplace, ctx, a, mask, scale, max_bias, sinks)


cdef int check_back(str op, Tensor a, Tensor b, float max_bias) except -1:
    """Check that a and b are rows at one distance, in one shape."""
    operands = ("a", a, "b", b)
    check_even_rows(op, a)
    check_even_rows(op, b)
    if not c.ggml_are_same_shape(a.ptr(), b.ptr()):
        raise bad_shape(op, "shapes differ", operands)
    if not c.ggml_is_contiguous(a.ptr()) or not c.ggml_is_contiguous(b.ptr()) or not fits(a.ptr()):
        raise bad_shape(op, "a and b must be contiguous, and not too large", operands)
    if max_bias != 0:  # the kernel asserts it
        raise bad_value(op, f"max_bias must be 0, not {max_bias}")
    return 0


def soft_max_ext_back(Context ctx not None, Tensor a not None, Tensor b not None, float scale=1.0, float max_bias=0.0):
    """Return the gradient of soft_max_ext's operand, shape of a.

    a: the gradient of its result.  b: its result.  Both F32 and contiguous.  max_bias: 0, ggml has no other.
    Raises: ShapeError if shapes differ or max_bias is not 0.
    Wraps: ggml_soft_max_ext_back.
    """
    check_back("soft_max_ext_back", a, b, max_bias)
    cdef c.ggml_tensor * t = c.ggml_soft_max_ext_back(ctx.room(1), a.ptr(), b.ptr(), scale, max_bias)
    keep_apart(t, b)
    return result(ctx, t, a, b)


def soft_max_ext_back_inplace(Context ctx not None, Tensor a not None, Tensor b not None, float scale=1.0,
                              float max_bias=0.0):
    """Return a view of a, in whose memory soft_max_ext_back's result is written.

    Raises: as soft_max_ext_back; ShapeError if b is in that memory.
    Wraps: ggml_soft_max_ext_back_inplace.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    check_back("soft_max_ext_back_inplace", a, b, max_bias)
    if root_of(pa) == root_of(pb) and (pa.view_offs < pb.view_offs + c.ggml_nbytes(pb)
                                       and pb.view_offs < pa.view_offs + c.ggml_nbytes(pa)):
        raise bad_shape("soft_max_ext_back_inplace", "a and b overlap", ("a", a, "b", b))
    return result(ctx, c.ggml_soft_max_ext_back_inplace(ctx.room(1), pa, pb, scale, max_bias), a, b)


def flash_attn_ext(Context ctx not None, Tensor q not None, Tensor k not None, Tensor v not None, Tensor mask,
                   float scale, float max_bias=0.0, float logit_softcap=0.0, Tensor sinks=None):
    """Return softmax(q k^T * scale + mask) v, F32 [n_embd_head_v, n_head, n_tokens, n_seq].

    q: F32 [n_embd_head, n_tokens, n_head, n_seq].  k, v: [n_embd_head(_v), n_kv, n_head_kv, n_seq], not transposed.
    mask: contiguous F16 [n_kv, >= n_tokens, ...] or None.  logit_softcap: 0 for none.
    sinks: F32 [n_head] or None, as soft_max_ext's.
    Raises: ShapeError if these do not match, or logit_softcap is negative or not finite.
    Wraps: ggml_flash_attn_ext, ggml_flash_attn_ext_add_sinks.
    """
    cdef c.ggml_tensor * pq = q.ptr()
    cdef c.ggml_tensor * pk = k.ptr()
    cdef c.ggml_tensor * pv = v.ptr()
    cdef c.ggml_tensor * pm = NULL
    operands = ("q", q, "k", k, "v", v, "mask", mask, "sinks", sinks)
    check_qkv(pq, pk, pv, operands)
    if not 0 <= logit_softcap < INFINITY:
        raise bad_value("flash_attn_ext", f"logit_softcap {logit_softcap} is not a finite number from 0 up")
    if max_bias > 0 and mask is None:
        raise bad_shape("flash_attn_ext", "max_bias needs a mask", operands)
    if mask is not None:
        pm = mask.ptr()
        if pm.type != c.GGML_TYPE_F16:
            raise bad_type("flash_attn_ext", "mask must be F16", operands)
        if not covers(pm, pk.ne[1], pq.ne[1], pq.ne[2], pq.ne[3]):
            raise bad_shape("flash_attn_ext", "mask does not cover q and k", operands)
    check_sinks("flash_attn_ext", sinks, pq.ne[2], operands)
    cdef c.ggml_tensor * t = c.ggml_flash_attn_ext(ctx.room(1), pq, pk, pv, pm, scale, max_bias, logit_softcap)
    if sinks is not None:
        c.ggml_flash_attn_ext_add_sinks(t, sinks.ptr())
    return result(ctx, t, q, k, v, mask, sinks)


cdef int check_flash(str op, Tensor a) except -1:
    if a.ptr().op != c.GGML_OP_FLASH_ATTN_EXT:
        raise bad_value(op, f"{a.op} is not the result of flash_attn_ext")
    return 0


def flash_attn_ext_get_prec(Tensor a not None):
    """Return how precisely a, the result of flash_attn_ext, is accumulated, as a Prec.

    Raises: ShapeError if a is the result of another op.
    Wraps: ggml_flash_attn_ext_get_prec.
    """
    from pyggml_adapt.ggml.enums import Prec  # at the top it would become a public name of ops
    check_flash("flash_attn_ext_get_prec", a)
    return Prec(<int> c.ggml_flash_attn_ext_get_prec(a.ptr()))


def flash_attn_ext_set_n_kv_max(Tensor a not None, int32_t n_kv_max):
    """Return a, the result of flash_attn_ext, whose mask now leaves each token at most n_kv_max keys; 0: any number.

    A hint for backends that skip the others; those on CPUs do not use it.
    Raises: ShapeError if a is the result of another op, or n_kv_max negative.
    Wraps: ggml_flash_attn_ext_set_n_kv_max.
    """
    check_flash("flash_attn_ext_set_n_kv_max", a)
    if n_kv_max < 0:
        raise bad_value("flash_attn_ext_set_n_kv_max", f"n_kv_max {n_kv_max} is negative")
    a.check_settable()
    c.ggml_flash_attn_ext_set_n_kv_max(a.ptr(), n_kv_max)
    return a


cdef int check_indexer(c.ggml_tensor * q, c.ggml_tensor * k, c.ggml_tensor * w, c.ggml_tensor * m, operands) except -1:
    if q.type != c.GGML_TYPE_F32 or w.type != c.GGML_TYPE_F32 or m.type != c.GGML_TYPE_F16 or not is_weight(k):
        raise bad_type("lightning_indexer",
                       "q and weights must be F32, mask F16, k of a floating-point or quantised type", operands)
    if (q.ne[0] != k.ne[0] or k.ne[1] != 1 or q.ne[1] != w.ne[0] or q.ne[2] != w.ne[1] or w.ne[2] != 1
            or m.ne[0] != k.ne[2] or m.ne[1] != q.ne[2] or m.ne[2] != 1
            or q.ne[3] != k.ne[3] or q.ne[3] != w.ne[3] or m.ne[3] == 0 or q.ne[3] % m.ne[3]):
        raise bad_shape("lightning_indexer", "q, k, weights and mask do not match", operands)
    if not has_rows(q) or not has_rows(k) or not has_rows(w) or not has_rows(m):
        raise bad_shape("lightning_indexer", "the rows of all operands must be contiguous", operands)
    if not fits(q) or not fits(k) or not fits(m):
        raise bad_shape("lightning_indexer", "q, k or mask is too large", operands)
    return check_size("lightning_indexer", <double> k.ne[2] * q.ne[2] * q.ne[3], operands)


def lightning_indexer(Context ctx not None, Tensor q not None, Tensor k not None, Tensor weights not None,
                      Tensor mask not None):
    """Return how much each token wants each key, F32 [n_kv, n_tokens, 1, n_seq]: the sum over heads of
    weights * max(q k, 0), plus the mask.

    q: F32 [n_embd, n_head, n_tokens, n_seq].  k: [n_embd, 1, n_kv, n_seq].  weights: F32 [n_head, n_tokens, 1, n_seq].
    mask: F16 [n_kv, n_tokens, 1, n_seq or a divisor of it].
    Raises: ShapeError if these do not match or their rows are not contiguous.
    Wraps: ggml_lightning_indexer.
    """
    operands = ("q", q, "k", k, "weights", weights, "mask", mask)
    check_indexer(q.ptr(), k.ptr(), weights.ptr(), mask.ptr(), operands)
    return result(ctx, c.ggml_lightning_indexer(ctx.room(1), q.ptr(), k.ptr(), weights.ptr(), mask.ptr()), q, k,
                  weights, mask)
