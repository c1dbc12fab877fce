"""Attention: masked softmax, rotary positions, and flash attention."""

from libc.math cimport INFINITY
from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    bad_shape, bad_type, bad_value, check_rows, check_size, check_weights, has_rows, is_float, is_weight, result,
)


cdef bint covers(c.ggml_tensor * mask, int64_t n_kv, int64_t n_tokens, int64_t n_head, int64_t n_seq) noexcept nogil:
    """Return whether the mask has a number for each logit, if it is broadcast over heads and sequences."""
    return (mask.ne[0] == n_kv and mask.ne[1] >= n_tokens and mask.ne[2] != 0 and mask.ne[3] != 0
            and n_head % mask.ne[2] == 0 and n_seq % mask.ne[3] == 0 and c.ggml_is_contiguous(mask))


cdef int check_qkv(c.ggml_tensor * pq, c.ggml_tensor * pk, c.ggml_tensor * pv, operands) except -1:
    check_weights("flash_attn_ext", pk, pq, operands)
    if pq.type != c.GGML_TYPE_F32 or not is_weight(pv):
        raise bad_type("flash_attn_ext", "q must be F32, k and v of floating-point or quantised types", operands)
    if (pk.ne[2] == 0 or pq.ne[2] % pk.ne[2] or pk.ne[1] != pv.ne[1] or pv.ne[2] == 0 or pq.ne[2] % pv.ne[2]
            or pq.ne[3] != pk.ne[3] or pq.ne[3] != pv.ne[3] or not has_rows(pv)):
        raise bad_shape("flash_attn_ext", "q, k and v do not match", operands)
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


def soft_max(Context ctx not None, Tensor a not None):
    """Return the softmax along ne0, shape of a.  Wraps: ggml_soft_max."""
    check_rows("soft_max", a)
    if not c.ggml_is_contiguous(a.ptr()):
        raise bad_shape("soft_max", "a must be contiguous", [("a", a)])
    return result(ctx, c.ggml_soft_max(ctx.room(1), a.ptr()), a)


def soft_max_ext(Context ctx not None, Tensor a not None, Tensor mask, float scale=1.0, float max_bias=0.0,
                 Tensor sinks=None):
    """Return softmax(a * scale + mask) along ne0, shape of a.

    mask: F16 or F32 [a.ne0, >= a.ne1, ...], broadcast over ne2 and ne3, or None.  max_bias: ALiBi's, 0 for none.
    sinks: F32 [a.ne2] or None: of each head one more logit, which takes its share and is then left out.
    Raises: ShapeError if the mask does not cover a, or the sinks are not one for each head.
    Wraps: ggml_soft_max_ext, ggml_soft_max_add_sinks.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pm = NULL
    check_rows("soft_max_ext", a)
    operands = [("a", a), ("mask", mask), ("sinks", sinks)]
    if not c.ggml_is_contiguous(pa) or (max_bias > 0 and mask is None):
        raise bad_shape("soft_max_ext", "a must be contiguous, and max_bias needs a mask", operands)
    if mask is not None:
        pm = mask.ptr()
        if not is_float(pm):
            raise bad_type("soft_max_ext", "mask must be F16 or F32", operands)
        if not covers(pm, pa.ne[0], pa.ne[1], pa.ne[2], pa.ne[3]):
            raise bad_shape("soft_max_ext", "mask does not cover a", operands)
    check_sinks("soft_max_ext", sinks, pa.ne[2], operands)
    cdef c.ggml_tensor * t = c.ggml_soft_max_ext(ctx.room(1), pa, pm, scale, max_bias)
    if sinks is not None:
        c.ggml_soft_max_add_sinks(t, sinks.ptr())
    return result(ctx, t, a, mask, sinks)


def rope_ext(Context ctx not None, Tensor a not None, Tensor pos not None, Tensor freq_factors, int n_dims, int mode,
             int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast,
             float beta_slow):
    """Return a with rotary position embedding, shape of a.

    a: F32 [n_embd_head, n_head, n_tokens].  pos: I32 [n_tokens].  freq_factors: F32 [>= n_dims/2] or None.
    n_dims: how many elements of each head are rotated.  mode: RopeType.NORMAL or NEOX.  The others as YaRN has them.
    Raises: ShapeError if these do not match.
    Wraps: ggml_rope_ext.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pp = pos.ptr()
    cdef c.ggml_tensor * pf = NULL
    operands = [("a", a), ("pos", pos), ("freq_factors", freq_factors)]
    if mode != c.GGML_ROPE_TYPE_NORMAL and mode != c.GGML_ROPE_TYPE_NEOX:
        raise bad_value("rope_ext", f"mode {mode} is neither RopeType.NORMAL nor RopeType.NEOX")
    check_rows("rope_ext", a)
    if pp.type != c.GGML_TYPE_I32:
        raise bad_type("rope_ext", "pos must be I32", operands)
    if n_dims < 2 or n_dims % 2 or n_dims > pa.ne[0]:
        raise bad_shape("rope_ext", f"n_dims = {n_dims} is not an even number up to ne0", operands)
    if pa.ne[0] % 2:
        raise bad_shape("rope_ext", "ne0 must be even", operands)
    if pp.ne[0] != pa.ne[2] or pp.ne[1] * pp.ne[2] * pp.ne[3] != 1 or not has_rows(pp):
        raise bad_shape("rope_ext", "pos needs one position for each token", operands)
    if freq_factors is not None:
        pf = freq_factors.ptr()
        if pf.type != c.GGML_TYPE_F32 or pf.ne[0] < n_dims // 2 or not has_rows(pf):
            raise bad_shape("rope_ext", "freq_factors must be F32 [>= n_dims/2]", operands)
    return result(ctx, c.ggml_rope_ext(ctx.room(1), pa, pp, pf, n_dims, mode, n_ctx_orig, freq_base, freq_scale,
                                       ext_factor, attn_factor, beta_fast, beta_slow), a, pos, freq_factors)


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
    operands = [("q", q), ("k", k), ("v", v), ("mask", mask), ("sinks", sinks)]
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
