"""Every precondition of every op: what ggml would abort on, or compute nonsense from, is an exception here."""

from __future__ import annotations

import re

import pytest

from pyggml_adapt.errors import AllocError, ClosedError, DTypeError, ShapeError
from pyggml_adapt.ggml import Context, OpHint, Prec, RopeType, Type, ops


def tensors(*specs):
    """Return a context and a tensor for each (type, ne)."""
    ctx = Context(Context.size_for(64))
    return ctx, *(ctx.new_tensor(type, ne) for type, ne in specs)


def f32(*ne):
    return Type.F32, ne


def i32(*ne):
    return Type.I32, ne


def rope_of(ctx, a, pos, factors=None, n_dims=4, mode=RopeType.NEOX):
    return ops.rope_ext(ctx, a, pos, factors, n_dims, mode, 0, 1e4, 1.0, 0.0, 1.0, 0.0, 0.0)


def transposed(op):
    return lambda ctx, a, *more: op(ctx, ops.transpose(ctx, a), *more)


def uneven(op):
    """Return op on a [4, 1, 3] view that ggml calls contiguous, though its rows are not nb1 apart."""
    return lambda ctx, a, *more: op(ctx, ops.permute(ctx, a, 0, 2, 1, 3), *more)


BIG = 1 << 30
SHAPES = [
    (ops.add, [f32(4, 3), f32(3)], "add: b does not broadcast to a"),
    (transposed(ops.div), [f32(4, 3), f32(3, 4)], "div: the rows of a must be contiguous"),
    (transposed(lambda ctx, a: ops.scale(ctx, a, 2)), [f32(4, 3)], "scale: the rows of a must be contiguous"),
    (uneven(lambda ctx, a: ops.scale(ctx, a, 2)), [f32(4, 3)], "scale: the rows of a must lie at one distance"),
    (uneven(lambda ctx, a: ops.clamp(ctx, a, 0)), [f32(4, 3)], "clamp: the rows of a must lie at one distance"),
    (
        uneven(lambda ctx, a: ops.argsort_top_k(ctx, a, 1)),
        [f32(4, 3)],
        "argsort_top_k: the rows of a must lie at one distance",
    ),
    (lambda ctx, a: ops.scale(ctx, ops.view(ctx, a, (4, 1), (16, 32)), 2), [f32(4, 3)], "scale: a must be contiguous"),
    (transposed(ops.sum_rows), [f32(4, 1)], "sum_rows: the rows of a must be contiguous"),
    (transposed(ops.silu), [f32(4, 3)], "silu: the rows of a must be contiguous"),
    (transposed(ops.gelu), [f32(4, 3)], "gelu: the rows of a must be contiguous"),
    (transposed(ops.relu), [f32(4, 3)], "relu: the rows of a must be contiguous"),
    (transposed(ops.sqr), [f32(4, 3)], "sqr: the rows of a must be contiguous"),
    (transposed(ops.sigmoid), [f32(4, 3)], "sigmoid: the rows of a must be contiguous"),
    (
        uneven(lambda ctx, a: ops.xielu(ctx, a, 1, 1, 1, 0)),
        [f32(4, 3)],
        "xielu: the rows of a must lie at one distance",
    ),
    (uneven(ops.swiglu), [f32(4, 3)], "swiglu: the rows of a must lie at one distance"),
    (ops.swiglu, [f32(5, 3)], "swiglu: ne0 is odd"),
    (ops.geglu_split, [f32(4), f32(3)], "geglu_split: shapes differ"),
    (transposed(ops.tanh), [f32(4, 3)], "tanh: the rows of a must be contiguous"),
    (lambda ctx, a, b: ops.swiglu_oai(ctx, a, b, 1, 7), [f32(4), f32(3)], "swiglu_oai: shapes differ"),
    (
        uneven(lambda ctx, a, b: ops.swiglu_oai(ctx, b, a, 1, 7)),
        [f32(4, 3), f32(4, 1, 3)],
        "swiglu_oai: the rows of b must be contiguous, and lie at one distance",
    ),
    (
        lambda ctx, a: ops.swiglu_oai(ctx, a, a, 1, -1),
        [f32(4)],
        "swiglu_oai: limit -1.0 is not a number from 0 up",
    ),
    (
        lambda ctx, a: ops.swiglu_oai(ctx, a, a, 1, float("nan")),
        [f32(4)],
        "swiglu_oai: limit nan is not a number from 0 up",
    ),
    (
        lambda ctx, a: ops.repeat_4d(ctx, a, 4, 4, 1, 1),
        [f32(4, 3)],
        "repeat_4d: [4, 4, 1, 1] is not a multiple of a",
    ),
    (
        lambda ctx, a: ops.repeat_4d(ctx, a, 4, 1, 1, 1),
        [f32(4, 0)],
        "repeat_4d: [4, 1, 1, 1] is not a multiple of a",
    ),
    (lambda ctx, a: ops.repeat_4d(ctx, a, 4, -3, 1, 1), [f32(4, 3)], "repeat_4d: impossible shape [4, -3, 1, 1]"),
    (
        lambda ctx, a: ops.repeat_4d(ctx, a, 1 << 31, 1, 1, 1),
        [f32(1)],
        f"repeat_4d: {[1 << 31, 1, 1, 1]} is too large",
    ),
    (
        transposed(lambda ctx, a: ops.repeat_4d(ctx, a, 3, 8, 1, 1)),
        [f32(4, 3)],
        "repeat_4d: the rows of a must be contiguous",
    ),
    (
        lambda ctx, a: ops.pad(ctx, a, 1, 0, -2, 0),
        [f32(4, 3)],
        "pad: cannot add -2 elements",
    ),
    (lambda ctx, a: ops.pad(ctx, a, 0, BIG, BIG, 0), [f32(4, 3)], "pad: the result is too large"),
    (lambda ctx, a: ops.norm(ctx, a, -1), [f32(4)], "norm: eps -1.0 is not a number from 0 up"),
    (lambda ctx, a, b: ops.concat(ctx, a, b, 4), [f32(4), f32(4)], "concat: dim 4 is not 0 to 3"),
    (lambda ctx, a, b: ops.concat(ctx, a, b, 0), [f32(4, 2), f32(4, 3)], "concat: ne1 differs"),
    (
        lambda ctx, a: ops.concat(ctx, ops.transpose(ctx, a), ops.transpose(ctx, a), 0),
        [(Type.I64, (4, 3))],
        "concat: rows of blocks or of 8-byte elements must be contiguous",
    ),
    (ops.swiglu_split, [f32(4), f32(3)], "swiglu_split: shapes differ"),
    (lambda ctx, a: ops.rms_norm(ctx, a, -1), [f32(4)], "rms_norm: eps -1.0 is not a number from 0 up"),
    (lambda ctx, a: ops.rms_norm(ctx, a, float("nan")), [f32(4)], "rms_norm: eps nan is not a number from 0 up"),
    (transposed(lambda ctx, a: ops.rms_norm(ctx, a, 0)), [f32(4, 3)], "rms_norm: the rows of a must be contiguous"),
    (ops.mul_mat, [f32(4, 3), f32(5, 3)], "mul_mat: ne0 differs"),
    (ops.mul_mat, [f32(4, 3, 2), f32(4, 3, 3)], "mul_mat: b is not a multiple of a in ne2 and ne3"),
    (ops.mul_mat, [f32(4, 3, 0), f32(4, 3, 0)], "mul_mat: b is not a multiple of a in ne2 and ne3"),
    (ops.mul_mat, [f32(0, 3), f32(0, 2)], "mul_mat: the first operand must not be transposed"),
    (transposed(ops.mul_mat), [f32(3, 4), f32(4, 2)], "mul_mat: the first operand must not be transposed"),
    (
        lambda ctx, a, b: ops.mul_mat(ctx, a, ops.transpose(ctx, b)),
        [f32(4, 3), f32(2, 4)],
        "mul_mat: the rows of the second operand must be contiguous",
    ),
    (ops.mul_mat, [f32(1, BIG), f32(1, BIG)], "mul_mat: the result is too large"),
    (
        lambda ctx, a, b: ops.mul_mat_set_hint(ops.mul_mat(ctx, a, b), OpHint.SRC0_IS_HADAMARD),
        [f32(4, 8), f32(4)],
        "mul_mat_set_hint: [4, 8] is not square with a power of two rows",
    ),
    (
        lambda ctx, a, b: ops.mul_mat_set_hint(ops.mul_mat(ctx, a, b), OpHint.SRC0_IS_HADAMARD),
        [f32(12, 12), f32(12)],
        "mul_mat_set_hint: [12, 12] is not square with a power of two rows",
    ),
    (
        lambda ctx, a: ops.mul_mat_set_hint(a, OpHint.SRC0_IS_HADAMARD),
        [f32(4, 4)],
        "mul_mat_set_hint: NONE is not MUL_MAT",
    ),
    (lambda ctx, a: ops.prec_set_acc(a, Prec.F32), [f32(4, 4)], "prec_set_acc: the op NONE has no such setting"),
    (ops.mul_mat_id, [f32(4, 3, 2), f32(4, 1, 5), i32(2, 4)], "mul_mat_id: ids must have a list for each token of b"),
    (ops.mul_mat_id, [f32(4, 3, 2, 2), f32(4, 1, 5), i32(2, 5)], "mul_mat_id: as and b have three dimensions, ids two"),
    (ops.add_id, [f32(4, 2, 3), f32(4, 5), i32(3, 2)], "add_id: shapes do not match"),
    (lambda ctx, a: ops.cast(ctx, a, Type.Q8_0), [f32(33)], "cast: ne0 = 33 is not a multiple of Q8_0's block size"),
    (transposed(lambda ctx, a: ops.cast(ctx, a, Type.Q8_0)), [f32(3, 32)], "cast: the rows of a must be contiguous"),
    (lambda ctx, a: ops.cont(ctx, a, 5, 3), [f32(4, 3)], "cont: [5, 3] has another number of elements"),
    (lambda ctx, a: ops.cont(ctx, a, -1), [f32(4, 3)], "cont: impossible shape [-1]"),
    (lambda ctx, a: ops.cont(ctx, a, 1, 2, 3, 4, 5), [f32(4, 3)], "cont: 5 dimensions, not 1 to 4"),
    (lambda ctx, a: ops.reshape(ctx, a), [f32(4, 3)], "reshape: 0 dimensions, not 1 to 4"),
    (lambda ctx, a: ops.reshape(ctx, a, 1 << 62, 4), [f32(4, 3)], f"reshape: impossible shape {[1 << 62, 4]}"),
    (lambda ctx, a: ops.reshape(ctx, a, 1 << 70), [f32(4, 3)], f"reshape: impossible shape {[1 << 70]}"),
    (
        lambda ctx, a: ops.reshape(ctx, a, 16, 4),
        [(Type.Q8_0, (32, 2))],
        "reshape: ne0 = 16 is not a multiple of Q8_0's block size",
    ),
    (transposed(lambda ctx, a: ops.reshape(ctx, a, 12)), [f32(4, 3)], "reshape: a must be contiguous"),
    (lambda ctx, a: ops.view(ctx, a, (5, 3)), [f32(4, 3)], "view: [5, 3] with strides [] at byte 0 leaves a"),
    (lambda ctx, a: ops.view(ctx, a, (4, 3), (), 4), [f32(4, 3)], "view: [4, 3] with strides [] at byte 4 leaves a"),
    (lambda ctx, a: ops.view(ctx, a, (4, 2), (48,)), [f32(4, 3)], "view: [4, 2] with strides [48] at byte 0 leaves a"),
    (
        lambda ctx, a: ops.view(ctx, a, (4,), (), (1 << 64) - 1),
        [f32(4, 3)],
        f"view: [4] with strides [] at byte {(1 << 64) - 1} leaves a",
    ),
    (
        lambda ctx, a: ops.view(ctx, a, (4, 1 << 39), (0,)),
        [f32(4, 3)],
        f"view: {[4, 1 << 39]} with strides [0] at byte 0 leaves a",
    ),
    (lambda ctx, a: ops.view(ctx, a, (4, 0)), [f32(4, 3)], "view: impossible shape [4, 0] or strides []"),
    (
        lambda ctx, a: ops.view(ctx, a, (4,), (16, 16, 16, 16)),
        [f32(4, 3)],
        "view: impossible shape [4] or strides [16, 16, 16, 16]",
    ),
    (lambda ctx, a: ops.view(ctx, a, (4, 2), (18,)), [f32(4, 3)], "view: impossible strides [18]"),
    (
        lambda ctx, a: ops.view(ctx, a, (16,)),
        [(Type.Q8_0, (32,))],
        "view: ne0 = 16 is not a multiple of Q8_0's block size",
    ),
    (
        lambda ctx, a: ops.permute(ctx, a, 0, 1, 1, 3),
        [f32(4)],
        "permute: 0, 1, 1, 3 is not a permutation of 0, 1, 2, 3",
    ),
    (
        lambda ctx, a: ops.permute(ctx, a, 1, 0, 2, 3),
        [(Type.Q8_0, (32, 2))],
        "permute: the rows of a quantised a must stay",
    ),
    (ops.transpose, [(Type.Q8_0, (32, 2))], "transpose: the rows of a quantised a must stay"),
    (ops.get_rows, [f32(4, 3, 2), i32(2)], "get_rows: ids do not match a"),
    (ops.get_rows, [f32(4, 0), i32(2)], "get_rows: a has no rows"),
    (transposed(ops.get_rows), [f32(4, 3), i32(2)], "get_rows: the rows of a must be contiguous"),
    (ops.set_rows, [f32(4, 3), f32(4, 2), i32(3)], "set_rows: shapes do not match"),
    (transposed(ops.set_rows), [f32(3, 4), f32(4, 2), i32(2)], "set_rows: the rows of a and b must be contiguous"),
    (transposed(ops.soft_max), [f32(3, 4)], "soft_max: the rows of a must be contiguous"),
    (
        lambda ctx, a: ops.soft_max(ctx, ops.permute(ctx, a, 0, 2, 1, 3)),
        [f32(4, 3, 2)],
        "soft_max: a must be contiguous",
    ),
    (ops.soft_max_ext, [f32(4, 3), f32(4, 2)], "soft_max_ext: mask does not cover a"),
    (
        lambda ctx, a: ops.soft_max_ext(ctx, a, None, 1, 8),
        [f32(4, 3)],
        "soft_max_ext: a must be contiguous, and max_bias needs a mask",
    ),
    (
        lambda ctx, a, s: ops.soft_max_ext(ctx, a, None, sinks=s),
        [f32(4, 3, 2), f32(3)],
        "soft_max_ext: sinks must be one contiguous number for each head",
    ),
    (
        lambda ctx, a, s: ops.soft_max_ext(ctx, a, None, sinks=s),
        [f32(4, 3, 2), f32(2, 3)],
        "soft_max_ext: sinks must be one contiguous number for each head",
    ),
    (
        lambda ctx, a, s: ops.soft_max_ext(ctx, a, None, sinks=ops.transpose(ctx, ops.view(ctx, s, (1, 2), s.nb[1:2]))),
        [f32(4, 3, 2), f32(2, 2)],
        "soft_max_ext: sinks must be one contiguous number for each head",
    ),
    (rope_of, [f32(8, 2, 3), i32(2)], "rope_ext: pos needs one position for each token"),
    (rope_of, [f32(7, 2, 3), i32(3)], "rope_ext: ne0 must be even"),
    (rope_of, [f32(8, 2, 3), i32(3), f32(1)], "rope_ext: freq_factors must be F32 [>= n_dims/2]"),
    (
        lambda ctx, a, p: rope_of(ctx, a, p, None, 10),
        [f32(8, 2, 3), i32(3)],
        "rope_ext: n_dims = 10 is not an even number up to ne0",
    ),
    (
        lambda ctx, a, p: rope_of(ctx, a, p, None, 4, 8),
        [f32(8, 2, 3), i32(3)],
        "rope_ext: mode 8 is neither RopeType.NORMAL nor RopeType.NEOX",
    ),
    (lambda ctx, a: ops.argsort_top_k(ctx, a, 5), [f32(4)], "argsort_top_k: k = 5 is not from 1 to ne0"),
    (lambda ctx, a: ops.argsort_top_k(ctx, a, 0), [f32(4)], "argsort_top_k: k = 0 is not from 1 to ne0"),
    (
        lambda ctx, q, k, v: ops.flash_attn_ext(ctx, q, k, v, None, 1),
        [f32(8, 2, 3), f32(8, 5, 2), f32(8, 5, 2)],
        "flash_attn_ext: q, k and v do not match",
    ),
    (
        lambda ctx, q, k, m: ops.flash_attn_ext(ctx, q, k, k, m, 1),
        [f32(8, 2), f32(8, 5), (Type.F16, (5, 1))],
        "flash_attn_ext: mask does not cover q and k",
    ),
    (
        lambda ctx, q, k: ops.flash_attn_ext(ctx, q, k, k, None, 1, 8),
        [f32(8, 2), f32(8, 5)],
        "flash_attn_ext: max_bias needs a mask",
    ),
    (
        lambda ctx, q, k, s: ops.flash_attn_ext(ctx, q, k, k, None, 1, sinks=s),
        [f32(8, 2, 4), f32(8, 5, 2), f32(2)],
        "flash_attn_ext: sinks must be one contiguous number for each head",
    ),
    *(
        (
            lambda ctx, q, k, cap=cap: ops.flash_attn_ext(ctx, q, k, k, None, 1, logit_softcap=cap),
            [f32(8, 2), f32(8, 5)],
            f"flash_attn_ext: logit_softcap {cap} is not a finite number from 0 up",
        )
        for cap in (-1.0, float("nan"), float("inf"))
    ),
]
TYPES = [
    (ops.mul, [f32(4), (Type.F16, (4,))], "mul: a must be F32, F16 or BF16, b F32 or of a's type"),
    (lambda ctx, a: ops.scale(ctx, a, 2), [i32(4)], "scale: a must be F32 or BF16"),
    (ops.sum_rows, [(Type.F16, (4,))], "sum_rows: a must be F32"),
    (lambda ctx, a, b: ops.concat(ctx, a, b, 0), [f32(4), i32(4)], "concat: both must have one type"),
    (ops.mul_mat, [i32(4, 3), f32(4)], "mul_mat: the first operand must be of a floating-point or quantised type"),
    (
        ops.mul_mat,
        [(Type.Q8_K, (256, 3)), f32(256)],
        "mul_mat: the first operand must be of a floating-point or quantised type",
    ),
    (ops.mul_mat, [f32(4, 3), i32(4)], "mul_mat: the second operand must be F32, F16 or BF16"),
    (
        ops.mul_mat_id,
        [f32(4, 3, 2), (Type.F16, (4, 1, 5)), i32(2, 5)],
        "mul_mat_id: b must be F32 or of the type of as, ids I32",
    ),
    (ops.add_id, [f32(4, 2, 3), f32(4, 5), f32(2, 3)], "add_id: a and b must be F32, ids I32"),
    (lambda ctx, a: ops.cast(ctx, a, Type.F16), [(Type.Q8_0, (32,))], "cast: cannot convert to F16"),
    (lambda ctx, a: ops.cast(ctx, a, Type.IQ2_XXS), [f32(256)], "cast: cannot convert to IQ2_XXS"),
    (ops.get_rows, [f32(4, 3), f32(2)], "get_rows: a must be of a floating-point or quantised type or I32, ids I32"),
    (
        ops.get_rows,
        [(Type.I64, (4, 3)), i32(2)],
        "get_rows: a must be of a floating-point or quantised type or I32, ids I32",
    ),
    (ops.set_rows, [f32(4, 3), f32(4, 2), f32(2)], "set_rows: b must be F32 or F16, ids I64 or I32"),
    (ops.set_rows, [(Type.I64, (4, 3)), f32(4, 2), i32(2)], "set_rows: a must be of a type that ggml can convert to"),
    (ops.soft_max_ext, [f32(4, 3), i32(4, 3)], "soft_max_ext: mask must be F16 or F32"),
    (
        lambda ctx, a, s: ops.soft_max_ext(ctx, a, None, sinks=s),
        [f32(4, 3, 2), (Type.F16, (2,))],
        "soft_max_ext: sinks must be F32",
    ),
    (
        lambda ctx, q, s: ops.flash_attn_ext(ctx, q, q, q, None, 1, sinks=s),
        [f32(8, 2, 4), i32(4)],
        "flash_attn_ext: sinks must be F32",
    ),
    (ops.tanh, [i32(4)], "tanh: a must be F32, F16 or BF16"),
    (lambda ctx, a, b: ops.swiglu_oai(ctx, a, b, 1, 7), [f32(4), (Type.F16, (4,))], "swiglu_oai: types differ"),
    *(
        (
            lambda ctx, a: ops.repeat_4d(ctx, a, 64, 1, 1, 1),
            [(type, (32,))],
            "repeat_4d: a must be F32, F16, BF16, I32 or I16",
        )
        for type in (Type.I64, Type.I8, Type.Q8_0, Type.MXFP4)
    ),
    (lambda ctx, a: ops.pad(ctx, a, 1, 0, 0, 0), [(Type.F16, (4,))], "pad: a must be F32"),
    (rope_of, [f32(8, 2, 3), f32(3)], "rope_ext: pos must be I32"),
    (
        lambda ctx, q, k, v: ops.flash_attn_ext(ctx, q, k, v, None, 1),
        [f32(8, 2), f32(8, 5), i32(8, 5)],
        "flash_attn_ext: q must be F32, k and v of floating-point or quantised types",
    ),
    (
        lambda ctx, q, k, m: ops.flash_attn_ext(ctx, q, k, k, m, 1),
        [f32(8, 2), f32(8, 5), f32(5, 2)],
        "flash_attn_ext: mask must be F16",
    ),
]


@pytest.mark.parametrize(
    "op, specs, message, error", [(*case, ShapeError) for case in SHAPES] + [(*case, DTypeError) for case in TYPES]
)
def test_preconditions(op, specs, message, error):
    ctx, *operands = tensors(*specs)
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        op(ctx, *operands)


def test_messages_name_the_operands():
    ctx, a, b, ids = tensors(f32(4, 2, 3), f32(4, 5), i32(3, 2))
    with pytest.raises(ShapeError) as caught:
        ops.add_id(ctx, a, b, ids)
    assert str(caught.value) == "add_id: shapes do not match (a [4, 2, 3, 1], b [4, 5, 1, 1], ids [3, 2, 1, 1])"
    with pytest.raises(DTypeError) as caught:
        ops.add_id(ctx, a, ids, b)
    assert str(caught.value) == "add_id: a and b must be F32, ids I32 (a F32, b I32, ids F32)"


def test_operand_types_are_checked():
    ctx = Context(Context.size_for(4))
    with pytest.raises(TypeError, match=r"got NoneType"):
        ops.add(ctx, None, None)
    with pytest.raises(ValueError, match=r"999"):
        ops.cast(ctx, ctx.new_tensor(Type.F32, (4,)), 999)
    with pytest.raises(DTypeError, match=r"^cast: cannot convert to I64 \(a F32\)$"):
        ops.cast(ctx, ctx.new_tensor(Type.F32, (4,)), Type.I64)


def test_full_context():
    ctx = Context(Context.size_for(2))
    a = ops.scale(ctx, ctx.new_tensor(Type.F32, (4,)), 2)
    with pytest.raises(AllocError, match=r"^Context of \d+ bytes is full: \d+ bytes are used$"):
        ops.scale(ctx, a, 2)
    with pytest.raises(AllocError, match=r"is full"):
        ctx.new_tensor(Type.F32, (4,))


def test_closed_contexts():
    ctx, other = Context(Context.size_for(4)), Context(Context.size_for(4))
    a, b = ctx.new_tensor(Type.F32, (4,)), other.new_tensor(Type.F32, (4,))
    other.close()
    with pytest.raises(ClosedError, match=r"^the Context of this Tensor is closed$"):
        ops.add(ctx, a, b)
    with pytest.raises(ClosedError, match=r"^Context is closed$"):
        ops.scale(other, a, 2)


def test_preconditions_that_ggml_aborts_on(python):
    """In a process of its own: nothing there may end it."""
    assert (
        python("""
        import itertools
        ctx = Context(Context.size_for(5000))
        types = [Type.F32, Type.F16, Type.I32, Type.I64, Type.Q8_0, Type.Q8_K, Type.IQ2_XXS]
        shapes = [(256,), (256, 3), (256, 0), (256, 3, 2), (512, 1, 1, 3), (0,)]
        leaves = [ctx.new_tensor(t, ne) for t in types for ne in shapes]
        leaves += [ops.transpose(ctx, x) for x in leaves if x.type.blck_size == 1]
        calls = {
            "binary": [ops.add, ops.mul, ops.div, ops.mul_mat, ops.get_rows, ops.soft_max_ext,
                       ops.swiglu_split, ops.geglu_split, lambda c, a, b: ops.swiglu_oai(c, a, b, 1, 7),
                       lambda c, a, b: ops.soft_max_ext(c, a, None, sinks=b),
                       lambda c, a, b: ops.flash_attn_ext(c, a, a, a, None, 1, sinks=b),
                       lambda c, a, b: ops.concat(c, a, b, 2), lambda c, a, b: ops.set_rows(c, a, a, b),
                       lambda c, a, b: ops.mul_mat_id(c, a, a, b), lambda c, a, b: ops.add_id(c, a, a, b),
                       lambda c, a, b: ops.flash_attn_ext(c, a, b, b, None, 1),
                       lambda c, a, b: ops.rope_ext(c, a, b, None, 2, 0, 0, 1e4, 1, 0, 1, 0, 0)],
            "unary": [lambda c, a: ops.repeat_4d(c, a, 512, 6, 1, 3), lambda c, a: ops.pad(c, a, 1, 2, 3, 4), ops.tanh,
                      ops.sum_rows, ops.silu, ops.gelu, ops.relu, ops.sqr, ops.sigmoid, ops.swiglu,
                      lambda c, a: ops.norm(c, a, 0), lambda c, a: ops.xielu(c, a, 1, 1, 1, 0),
                      ops.soft_max, ops.transpose, lambda c, a: ops.scale(c, a, 1),
                      lambda c, a: ops.rms_norm(c, a, 0), lambda c, a: ops.argsort_top_k(c, a, 3),
                      lambda c, a: ops.reshape(c, a, 256), lambda c, a: ops.cast(c, a, Type.Q4_0)],
        }
        refused = made = 0
        for n, kind in ((1, "unary"), (2, "binary")):
            for call in calls[kind]:
                for operands in itertools.product(leaves, repeat=n):
                    try:
                        call(ctx, *operands)
                        made += 1
                    except (ShapeError, DTypeError):
                        refused += 1
                    except AllocError:
                        ctx = Context(Context.size_for(5000))
        print(refused > 1000, made > 100)
        """)
        == "True True\n"
    )
