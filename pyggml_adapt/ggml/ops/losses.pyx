"""The loss of classifiers, its gradient, and the steps that optimisers take."""

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport bad_shape, bad_type, bad_value, check_even_rows, fits, has_rows, result


cdef int check_pair(str op, str name_a, Tensor a, str name_b, Tensor b) except -1:
    """Check logits and what they should be: F32 in one shape, rows at one distance, not empty."""
    operands = (name_a, a, name_b, b)
    check_even_rows(op, a)
    check_even_rows(op, b)
    if not c.ggml_are_same_shape(a.ptr(), b.ptr()):
        raise bad_shape(op, "shapes differ", operands)
    if c.ggml_nelements(a.ptr()) == 0 or not fits(a.ptr()):
        raise bad_shape(op, "an operand is empty or too large", operands)
    return 0


def cross_entropy_loss(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return the mean over rows of -sum(b * log(softmax(a))), F32 [1].

    a: logits.  b: the probabilities that they should give.  Both F32 with contiguous rows at one distance.
    Raises: ShapeError if shapes differ or are empty.
    Wraps: ggml_cross_entropy_loss.
    """
    check_pair("cross_entropy_loss", "a", a, "b", b)
    return result(ctx, c.ggml_cross_entropy_loss(ctx.room(1), a.ptr(), b.ptr()), a, b)


def cross_entropy_loss_back(Context ctx not None, Tensor a not None, Tensor b not None, Tensor c_ not None):
    """Return the gradient of cross_entropy_loss's logits, F32, shape of b.

    a: the gradient of its result, F32 [1].  b, c_: its operands, contiguous.
    Raises: ShapeError if shapes differ or are empty, or a is not one number.
    Wraps: ggml_cross_entropy_loss_back.
    """
    operands = ("a", a, "b", b, "c", c_)
    check_pair("cross_entropy_loss_back", "b", b, "c", c_)
    if a.ptr().type != c.GGML_TYPE_F32:
        raise bad_type("cross_entropy_loss_back", "a must be F32", operands)
    if c.ggml_nelements(a.ptr()) != 1:
        raise bad_shape("cross_entropy_loss_back", "a is not one number", operands)
    if not c.ggml_is_contiguous(b.ptr()) or not c.ggml_is_contiguous(c_.ptr()) or not c.ggml_is_contiguous(a.ptr()):
        raise bad_shape("cross_entropy_loss_back", "the operands must be contiguous", operands)
    return result(ctx, c.ggml_cross_entropy_loss_back(ctx.room(1), a.ptr(), b.ptr(), c_.ptr()), a, b, c_)


cdef int check_step(str op, Tensor a, operands, Tensor params, int n_params) except -1:
    """Check that a is a parameter, and all of operands F32 of its shape and strides, by which the kernel finds them."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * pp = params.ptr()
    cdef int i
    if not pa.flags & c.GGML_TENSOR_FLAG_PARAM:
        raise bad_value(op, f"tensor {a.name!r} is not a parameter: set_param() makes it one")
    for each in operands[1::2]:
        t = (<Tensor> each).ptr()
        if t.type != c.GGML_TYPE_F32:
            raise bad_type(op, "all must be F32", operands)
        if not c.ggml_are_same_shape(pa, t):
            raise bad_shape(op, "shapes differ", operands)
        for i in range(4):
            if t.nb[i] != pa.nb[i]:
                raise bad_shape(op, "strides differ", operands)
    if not has_rows(pa) or not fits(pa):
        raise bad_shape(op, "the rows of a must be contiguous, and not too many", operands)
    if pp.type != c.GGML_TYPE_F32:
        raise bad_type(op, "params must be F32", ("params", params))
    if pp.ne[0] != n_params or c.ggml_nelements(pp) != n_params or not has_rows(pp):
        raise bad_shape(op, f"params must be {n_params} contiguous numbers", ("params", params))
    return 0


def opt_step_adamw(Context ctx not None, Tensor a not None, Tensor grad not None, Tensor m not None, Tensor v not None,
                   Tensor adamw_params not None):
    """Return a view of a, into which a step of AdamW is written; m and v, its momenta, are written too.

    a: a parameter, F32.  grad, m, v: F32, shape and strides of a.  adamw_params: F32 [7]: alpha, beta1, beta2, eps,
    weight decay, 1 / (1 - beta1^i) and 1 / (1 - beta2^i) at step i.
    Raises: ShapeError if a is not a parameter, or shapes or strides differ.
    Wraps: ggml_opt_step_adamw.
    """
    check_step("opt_step_adamw", a, ("a", a, "grad", grad, "m", m, "v", v), adamw_params, 7)
    return result(ctx, c.ggml_opt_step_adamw(ctx.room(1), a.ptr(), grad.ptr(), m.ptr(), v.ptr(), adamw_params.ptr()),
                  a, grad, m, v, adamw_params)


def opt_step_sgd(Context ctx not None, Tensor a not None, Tensor grad not None, Tensor sgd_params not None):
    """Return a view of a, into which a - alpha * (grad + weight decay * a) is written.

    a: a parameter, F32.  grad: F32, shape and strides of a.  sgd_params: F32 [2]: alpha and the weight decay.
    Raises: ShapeError if a is not a parameter, or shapes or strides differ.
    Wraps: ggml_opt_step_sgd.
    """
    check_step("opt_step_sgd", a, ("a", a, "grad", grad), sgd_params, 2)
    return result(ctx, c.ggml_opt_step_sgd(ctx.room(1), a.ptr(), grad.ptr(), sgd_params.ptr()), a, grad, sgd_params)
