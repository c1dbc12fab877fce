"""Ops with a state that goes from token to token: Mamba, RWKV, linear attention; and DeepSeek's hyper-connections."""

from libc.stdint cimport int32_t, int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, bad_value, check_size, fits, has_rows, is_packed, result,
)


cdef enum:
    MAX_ITERATIONS = 1 << 16  # of dsv4_hc_comb, which cannot be interrupted


cdef int check_f32(str op, operands) except -1:
    """Check that all operands are F32 and not too large for ints."""
    for each in operands[1::2]:
        if each is not None and (<Tensor> each).ptr().type != c.GGML_TYPE_F32:
            raise bad_type(op, "all must be F32", operands)
        if each is not None and not fits((<Tensor> each).ptr()):
            raise bad_shape(op, "an operand is too large", operands)
    return 0


cdef int check_packed(str op, operands) except -1:
    """Check that all operands are F32, not empty, and their strides without gaps: the kernels look at none."""
    check_f32(op, operands)
    for name, each in zip(operands[::2], operands[1::2]):
        if c.ggml_nelements((<Tensor> each).ptr()) == 0:
            raise bad_shape(op, f"{name} is empty", operands)
        if not is_packed((<Tensor> each).ptr()):
            raise bad_shape(op, f"{name} must be contiguous", operands)
    return 0


cdef bint has_shape(c.ggml_tensor * t, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) noexcept nogil:
    return t.ne[0] == ne0 and t.ne[1] == ne1 and t.ne[2] == ne2 and t.ne[3] == ne3


def ssm_conv(Context ctx not None, Tensor sx not None, Tensor c_ not None):
    """Return the convolution of each channel with weights of its own, F32 [d_inner, n_t, n_s].

    sx: F32 [d_conv - 1 + n_t, d_inner, n_s]: the last d_conv - 1 values before, then those of n_t tokens; contiguous
    planes.  c_: F32 [d_conv, d_inner], contiguous.
    Raises: ShapeError if these do not match.
    Wraps: ggml_ssm_conv.
    """
    cdef c.ggml_tensor * ps = sx.ptr()
    cdef c.ggml_tensor * pc = c_.ptr()
    operands = ("sx", sx, "c", c_)
    check_f32("ssm_conv", operands)
    if pc.ne[0] < 1 or ps.ne[0] < pc.ne[0] - 1 or ps.ne[1] != pc.ne[1] or ps.ne[3] * pc.ne[2] * pc.ne[3] != 1:
        raise bad_shape("ssm_conv", "sx must be [d_conv - 1 + n_t, d_inner, n_s], c [d_conv, d_inner]", operands)
    if not has_rows(ps) or ps.nb[1] != ps.ne[0] * ps.nb[0] or not is_packed(pc):
        raise bad_shape("ssm_conv", "c and the planes of sx must be contiguous", operands)
    if <double> ps.ne[0] * ps.ne[1] > MAX_INT or c.ggml_nelements(pc) > MAX_INT:
        raise bad_shape("ssm_conv", "an operand is too large", operands)
    check_size("ssm_conv", <double> ps.ne[1] * (ps.ne[0] - pc.ne[0] + 1) * ps.ne[2], operands)
    return result(ctx, c.ggml_ssm_conv(ctx.room(1), ps, pc), sx, c_)


cdef int check_scan(c.ggml_tensor * s, c.ggml_tensor * x, c.ggml_tensor * dt, c.ggml_tensor * A, c.ggml_tensor * B,
                    c.ggml_tensor * C, c.ggml_tensor * ids, int64_t K, operands) except -1:
    cdef int64_t d_state = s.ne[0]
    cdef int64_t n_head = x.ne[1]
    if ids.type != c.GGML_TYPE_I32:
        raise bad_type("ssm_scan", "ids must be I32", operands)
    if not 1 <= K <= 0x7FFFFFFF or (K > 1 and A.ne[0] != 1):
        raise bad_value("ssm_scan", f"K = {K} is not from 1 up, or not 1 though A.ne0 is not")
    for each in operands[1::2]:
        if c.ggml_nelements((<Tensor> each).ptr()) == 0:
            raise bad_shape("ssm_scan", "an operand is empty", operands)
    if (not has_shape(dt, n_head, x.ne[2], x.ne[3], 1) or s.ne[1] != x.ne[0] or s.ne[2] != n_head
            or not has_shape(B, d_state, B.ne[1], x.ne[2], x.ne[3]) or n_head % B.ne[1]
            or not c.ggml_are_same_shape(B, C) or not has_shape(ids, x.ne[3], 1, 1, 1)
            or not has_shape(A, A.ne[0], n_head, 1, 1) or (A.ne[0] != 1 and A.ne[0] != d_state)):
        raise bad_shape("ssm_scan", "shapes do not match", operands)
    if not is_packed(s) or not is_packed(dt) or not is_packed(A) or not has_rows(ids):
        raise bad_shape("ssm_scan", "s, dt, A and ids must be contiguous", operands)
    if (not has_rows(x) or x.nb[1] != x.ne[0] * x.nb[0] or not has_rows(B) or B.nb[1] != B.ne[0] * B.nb[0]
            or not has_rows(C) or C.nb[1] != C.ne[0] * C.nb[0]):
        raise bad_shape("ssm_scan", "the planes of x, B and C must be contiguous", operands)
    if <double> d_state * x.ne[0] * n_head > MAX_INT or not fits(s) or not fits(x):
        raise bad_shape("ssm_scan", "an operand is too large", operands)
    return check_size("ssm_scan", <double> x.ne[0] * n_head * x.ne[3] * (x.ne[2] + <double> K * d_state), operands)


def ssm_scan(Context ctx not None, Tensor s not None, Tensor x not None, Tensor dt not None, Tensor A not None,
             Tensor B not None, Tensor C not None, Tensor ids not None, int64_t K):
    """Return Mamba's selective scan, F32: y, the shape of x, and behind it K states [d_state, dim, n_head, n_seqs].

    With dt' = log(1 + exp(dt)) the state becomes exp(dt' A) state + dt' x B, and y is C times the state.
    s: states before [d_state, dim, n_head, n].  x: [dim, n_head, n_seq_tokens, n_seqs].  dt: [n_head, n_seq_tokens,
    n_seqs].  A: [1 or d_state, n_head].  B, C: [d_state, n_group, n_seq_tokens, n_seqs].  All F32.
    ids: I32 [n_seqs], which of the states each sequence begins with, from 0 to n - 1 (checked when the graph is
    computed, if they are an input).  K: how many of the last states are wanted, the latest first; those before the
    first token are left unset; 1 unless A.ne0 is.
    Raises: ShapeError if these do not match; s, dt, A and the planes of x, B and C must be contiguous.
    Wraps: ggml_ssm_scan.
    """
    operands = ("s", s, "x", x, "dt", dt, "A", A, "B", B, "C", C, "ids", ids)
    check_f32("ssm_scan", operands[:12])
    check_scan(s.ptr(), x.ptr(), dt.ptr(), A.ptr(), B.ptr(), C.ptr(), ids.ptr(), K, operands)
    cdef c.ggml_tensor * t = c.ggml_ssm_scan(ctx.room(1), s.ptr(), x.ptr(), dt.ptr(), A.ptr(), B.ptr(), C.ptr(),
                                             ids.ptr(), K)
    result(ctx, t, s, x, dt, A)
    return result(ctx, t, B, C, ids)


cdef int check_heads(str op, operands, Tensor state, bint vectorised) except -1:
    """Check operands [S, n_head, n_tokens] in one shape, and a state of S * S * n_head for each sequence."""
    cdef c.ggml_tensor * first = (<Tensor> operands[1]).ptr()
    cdef c.ggml_tensor * ps = state.ptr()
    cdef int64_t size = first.ne[0]
    everything = operands + ("state", state)
    check_packed(op, everything)
    for each in operands[1::2]:
        if not c.ggml_are_same_shape(first, (<Tensor> each).ptr()) or first.ne[3] != 1:
            raise bad_shape(op, "operands must be [S, n_head, n_tokens], of one shape", everything)
    if <double> size * size * first.ne[1] * ps.ne[1] != <double> c.ggml_nelements(ps) or first.ne[2] % ps.ne[1]:
        raise bad_shape(op, "state must be [S * S * n_head, n_seqs], n_tokens a multiple of n_seqs", everything)
    if vectorised and size % 64:  # the kernel goes on in steps of up to 64 and leaves its operands otherwise
        raise bad_shape(op, "S is not a multiple of 64", everything)
    return check_size(op, <double> size * first.ne[1] * (first.ne[2] + <double> size * ps.ne[1]), everything)


def rwkv_wkv6(Context ctx not None, Tensor k not None, Tensor v not None, Tensor r not None, Tensor tf not None,
              Tensor td not None, Tensor state not None):
    """Return RWKV-6's attention, F32 [S * n_head, n_tokens + S * n_seqs]: the results, and behind them the states.

    Of each head the result is r (tf k v + state), and the state, S x S, becomes td state + k v.
    k, v, r, td: F32 [S, n_head, n_tokens].  tf: F32 [S, n_head].  state: F32 [S * S * n_head, n_seqs].  Contiguous.
    Raises: ShapeError if these do not match, are empty, or n_tokens is not a multiple of n_seqs.
    Wraps: ggml_rwkv_wkv6.
    """
    operands = ("k", k, "v", v, "r", r, "td", td)
    check_heads("rwkv_wkv6", operands, state, False)
    check_packed("rwkv_wkv6", ("tf", tf))
    if c.ggml_nelements(tf.ptr()) != k.ptr().ne[0] * k.ptr().ne[1]:
        raise bad_shape("rwkv_wkv6", "tf must be [S, n_head]", operands + ("tf", tf))
    cdef c.ggml_tensor * t = c.ggml_rwkv_wkv6(ctx.room(1), k.ptr(), v.ptr(), r.ptr(), tf.ptr(), td.ptr(), state.ptr())
    result(ctx, t, k, v, r)
    return result(ctx, t, tf, td, state)


def rwkv_wkv7(Context ctx not None, Tensor r not None, Tensor w not None, Tensor k not None, Tensor v not None,
              Tensor a not None, Tensor b not None, Tensor state not None):
    """Return RWKV-7's attention, F32 [S * n_head, n_tokens + S * n_seqs]: the results, and behind them the states.

    Of each head the state, S x S, becomes state w + v k + (state a) b, and the result is the new state times r.
    r, w, k, v, a, b: F32 [S, n_head, n_tokens], S a multiple of 64.  state: F32 [S * S * n_head, n_seqs].  Contiguous.
    Raises: ShapeError if these do not match, are empty, or n_tokens is not a multiple of n_seqs.
    Wraps: ggml_rwkv_wkv7.
    """
    check_heads("rwkv_wkv7", ("r", r, "w", w, "k", k, "v", v, "a", a, "b", b), state, True)
    cdef c.ggml_tensor * t = c.ggml_rwkv_wkv7(ctx.room(1), r.ptr(), w.ptr(), k.ptr(), v.ptr(), a.ptr(), b.ptr(),
                                              state.ptr())
    result(ctx, t, r, w, k)
    return result(ctx, t, v, a, b, state)


def gated_linear_attn(Context ctx not None, Tensor k not None, Tensor v not None, Tensor q not None, Tensor g not None,
                      Tensor state not None, float scale):
    """Return gated linear attention, F32 [S * n_head, n_tokens + S * n_seqs]: the results, and behind them the states.

    Of each head the state, S x S, becomes g state + k v, and the result is scale q times the new state.
    k, v, q, g: F32 [S, n_head, n_tokens].  state: F32 [S * S * n_head, n_seqs].  Contiguous.
    Raises: ShapeError if these do not match, are empty, or n_tokens is not a multiple of n_seqs.
    Wraps: ggml_gated_linear_attn.
    """
    check_heads("gated_linear_attn", ("k", k, "v", v, "q", q, "g", g), state, False)
    cdef c.ggml_tensor * t = c.ggml_gated_linear_attn(ctx.room(1), k.ptr(), v.ptr(), q.ptr(), g.ptr(), state.ptr(),
                                                      scale)
    return result(ctx, t, k, v, q, g, state)


cdef int check_delta(c.ggml_tensor * q, c.ggml_tensor * k, c.ggml_tensor * v, c.ggml_tensor * g, c.ggml_tensor * beta,
                     c.ggml_tensor * state, int64_t K, operands) except -1:
    cdef int64_t size = v.ne[0]
    cdef int64_t n_head = v.ne[1]
    for each in operands[1::2]:
        if c.ggml_nelements((<Tensor> each).ptr()) == 0:
            raise bad_shape("gated_delta_net", "an operand is empty", operands)
    if not 1 <= K <= 0x7FFFFFFF:
        raise bad_value("gated_delta_net", f"K = {K} is not from 1 up")
    if (q.ne[0] != size or k.ne[0] != size or n_head % q.ne[1] or n_head % k.ne[1] or q.ne[2] != v.ne[2]
            or k.ne[2] != v.ne[2] or v.ne[3] % q.ne[3] or v.ne[3] % k.ne[3]
            or not has_shape(g, g.ne[0], n_head, v.ne[2], v.ne[3]) or (g.ne[0] != 1 and g.ne[0] != size)
            or not has_shape(beta, 1, n_head, v.ne[2], v.ne[3]) or not has_shape(state, size, size, n_head, v.ne[3])):
        raise bad_shape("gated_delta_net", "shapes do not match", operands)
    if not has_rows(q) or not has_rows(k) or not has_rows(v):
        raise bad_shape("gated_delta_net", "the rows of q, k and v must be contiguous", operands)
    if not is_packed(g) or not is_packed(beta) or not is_packed(state):
        raise bad_shape("gated_delta_net", "g, beta and state must be contiguous", operands)
    if <double> size * size > MAX_INT:
        raise bad_shape("gated_delta_net", "an operand is too large", operands)
    return check_size("gated_delta_net", <double> size * n_head * v.ne[3] * (v.ne[2] + <double> K * size), operands)


def gated_delta_net(Context ctx not None, Tensor q not None, Tensor k not None, Tensor v not None, Tensor g not None,
                    Tensor beta not None, Tensor state not None, int64_t K):
    """Return the gated delta rule, F32 [S * n_head, n_tokens * n_seqs + K * S * n_seqs]: the results, behind them K
    states.

    Of each head the state, S x S, first becomes exp(g) state, then state + beta (v - state k) k, and the result is the
    new state times q / sqrt(S).  states: row j is of element j of v.
    q, k: F32 [S, n_head or a divisor, n_tokens, n_seqs or a divisor].  v: F32 [S, n_head, n_tokens, n_seqs].
    g: F32 [1 or S, n_head, n_tokens, n_seqs].  beta: F32 [1, n_head, n_tokens, n_seqs].  state: F32 [S, S, n_head,
    n_seqs].  K: how many of the last states are wanted, the latest first; those before the first token are left unset.
    Raises: ShapeError if these do not match; rows of q, k and v, all of the others must be contiguous.
    Wraps: ggml_gated_delta_net.
    """
    operands = ("q", q, "k", k, "v", v, "g", g, "beta", beta, "state", state)
    check_f32("gated_delta_net", operands)
    check_delta(q.ptr(), k.ptr(), v.ptr(), g.ptr(), beta.ptr(), state.ptr(), K, operands)
    cdef c.ggml_tensor * t = c.ggml_gated_delta_net(ctx.room(1), q.ptr(), k.ptr(), v.ptr(), g.ptr(), beta.ptr(),
                                                    state.ptr(), K)
    result(ctx, t, q, k, v)
    return result(ctx, t, g, beta, state)


def dsv4_hc_comb(Context ctx not None, Tensor mixes not None, Tensor scale not None, Tensor base not None, float eps,
                 int32_t n_iter):
    """Return how four streams are mixed, F32 [4, 4, n_tokens], normalised by columns and rows n_iter times.

    What is normalised is the softmax along ne0, plus eps, of the last 16 of mixes * scale[2] + base.
    mixes: F32 [24, n_tokens].  scale: F32 [>= 3].  base: F32 [24].
    Raises: ShapeError if these do not match, or n_iter is not from 1 to 65536.
    Wraps: ggml_dsv4_hc_comb.
    """
    operands = ("mixes", mixes, "scale", scale, "base", base)
    cdef c.ggml_tensor * ps = scale.ptr()
    check_f32("dsv4_hc_comb", operands)
    if not 1 <= n_iter <= MAX_ITERATIONS:
        raise bad_value("dsv4_hc_comb", f"n_iter = {n_iter} is not from 1 to {MAX_ITERATIONS}")
    if (not has_shape(mixes.ptr(), 24, mixes.ptr().ne[1], 1, 1) or ps.ne[0] < 3 or not has_shape(ps, ps.ne[0], 1, 1, 1)
            or not has_shape(base.ptr(), 24, 1, 1, 1)):
        raise bad_shape("dsv4_hc_comb", "mixes must be [24, n_tokens], scale [>= 3], base [24]", operands)
    return result(ctx, c.ggml_dsv4_hc_comb(ctx.room(1), mixes.ptr(), scale.ptr(), base.ptr(), eps, n_iter), mixes,
                  scale, base)


def dsv4_hc_pre(Context ctx not None, Tensor x not None, Tensor weights not None):
    """Return the sum of streams, each times its weight, F32 [n_embd, n_tokens].

    x: F32 [n_embd, n_streams, n_tokens].  weights: F32 [n_streams, n_tokens].  Of any strides.
    Raises: ShapeError if these do not match or there is no stream.
    Wraps: ggml_dsv4_hc_pre.
    """
    cdef c.ggml_tensor * px = x.ptr()
    operands = ("x", x, "weights", weights)
    check_f32("dsv4_hc_pre", operands)
    if px.ne[1] < 1 or px.ne[3] != 1 or not has_shape(weights.ptr(), px.ne[1], px.ne[2], 1, 1):
        raise bad_shape("dsv4_hc_pre", "x must be [n_embd, n_streams, n_tokens], weights [n_streams, n_tokens]",
                        operands)
    return result(ctx, c.ggml_dsv4_hc_pre(ctx.room(1), px, weights.ptr()), x, weights)


def dsv4_hc_pre_gated(Context ctx not None, Tensor x not None, Tensor gate not None, float scale):
    """Return scale times the sum of streams, each element times sigmoid(gate), F32 [n_embd, n_tokens].

    x, gate: F32 [n_embd, n_streams, n_tokens], of any strides.
    Raises: ShapeError if these do not match or there is no stream.
    Wraps: ggml_dsv4_hc_pre_gated.
    """
    cdef c.ggml_tensor * px = x.ptr()
    operands = ("x", x, "gate", gate)
    check_f32("dsv4_hc_pre_gated", operands)
    if px.ne[1] < 1 or px.ne[3] != 1 or not c.ggml_are_same_shape(px, gate.ptr()):
        raise bad_shape("dsv4_hc_pre_gated", "x and gate must be [n_embd, n_streams, n_tokens]", operands)
    return result(ctx, c.ggml_dsv4_hc_pre_gated(ctx.room(1), px, gate.ptr(), scale), x, gate)


def dsv4_hc_post(Context ctx not None, Tensor x not None, Tensor residual not None, Tensor post not None, Tensor comb):
    """Return for each stream x times its post, plus the residual streams, mixed, F32 [n_embd, n_streams, n_tokens].

    x: F32 [n_embd, n_tokens].  residual: F32 [n_embd, n_streams, n_tokens].  post: F32 [n_streams, n_tokens].
    comb: F32 [n_streams to, n_streams from, n_tokens], or None: each keeps its own residual.  Of any strides.
    Raises: ShapeError if these do not match or there is no stream.
    Wraps: ggml_dsv4_hc_post.
    """
    cdef c.ggml_tensor * pr = residual.ptr()
    cdef c.ggml_tensor * pc = NULL
    cdef int64_t n = pr.ne[1]
    operands = ("x", x, "residual", residual, "post", post, "comb", comb)
    check_f32("dsv4_hc_post", operands)
    if comb is not None:
        pc = comb.ptr()
    if (n < 1 or not has_shape(x.ptr(), pr.ne[0], pr.ne[2], 1, 1) or pr.ne[3] != 1
            or not has_shape(post.ptr(), n, pr.ne[2], 1, 1)
            or (pc != NULL and not has_shape(pc, n, n, pr.ne[2], 1))):
        raise bad_shape("dsv4_hc_post", "x, residual, post and comb do not match", operands)
    return result(ctx, c.ggml_dsv4_hc_post(ctx.room(1), x.ptr(), pr, post.ptr(), pc), x, residual, post, comb)
