# What graph.pyx checks before ggml builds gradients: it aborts on an op, type or shape that it has none for.

_FIRST = (
    c.GGML_OP_DUP, c.GGML_OP_SQR, c.GGML_OP_SQRT, c.GGML_OP_LOG, c.GGML_OP_SIN, c.GGML_OP_COS, c.GGML_OP_SUM,
    c.GGML_OP_SUM_ROWS, c.GGML_OP_MEAN, c.GGML_OP_REPEAT, c.GGML_OP_REPEAT_BACK, c.GGML_OP_RMS_NORM, c.GGML_OP_SCALE,
    c.GGML_OP_CPY, c.GGML_OP_CONT, c.GGML_OP_RESHAPE, c.GGML_OP_VIEW, c.GGML_OP_PERMUTE, c.GGML_OP_TRANSPOSE,
    c.GGML_OP_GET_ROWS, c.GGML_OP_DIAG_MASK_INF, c.GGML_OP_DIAG_MASK_ZERO, c.GGML_OP_SOFT_MAX, c.GGML_OP_ROPE,
    c.GGML_OP_POOL_2D, c.GGML_OP_CROSS_ENTROPY_LOSS, c.GGML_OP_ADD1,
)
_BOTH = (
    c.GGML_OP_ADD, c.GGML_OP_ACC, c.GGML_OP_SUB, c.GGML_OP_MUL, c.GGML_OP_DIV, c.GGML_OP_MUL_MAT, c.GGML_OP_SET,
)
_UNARY = (
    c.GGML_UNARY_OP_ABS, c.GGML_UNARY_OP_NEG, c.GGML_UNARY_OP_RELU, c.GGML_UNARY_OP_SILU, c.GGML_UNARY_OP_EXP,
    c.GGML_UNARY_OP_EXPM1, c.GGML_UNARY_OP_SOFTPLUS,
)
# these hand the gradient on as it lies in memory
_PASSING = (
    c.GGML_OP_DUP, c.GGML_OP_ADD, c.GGML_OP_SUB, c.GGML_OP_RESHAPE, c.GGML_OP_PERMUTE, c.GGML_OP_TRANSPOSE,
    c.GGML_OP_NONE,
)
# and these compute the gradient from operands of any layout that the op itself takes
_STRIDED = (*_PASSING, *_BOTH, c.GGML_OP_CPY, c.GGML_OP_CONT, c.GGML_OP_SUM, c.GGML_OP_SUM_ROWS, c.GGML_OP_MEAN,
            c.GGML_OP_REPEAT, c.GGML_OP_REPEAT_BACK, c.GGML_OP_GET_ROWS, c.GGML_OP_ADD1)

cdef enum:
    MAX_PER_NODE = 8  # tensors that ggml makes for the gradients of a node's operands, at most


cdef object no_backward(c.ggml_tensor * t, str why):
    name = (<bytes> t.name).decode("utf-8", "replace")
    return ShapeError(f"build_backward: {(<bytes> c.ggml_op_desc(t)).decode()} node {name!r}: {why}")


cdef tuple differentiable(c.ggml_tensor * t):
    """Return which operands ggml has a gradient for."""
    if t.op in _BOTH:
        return (0, 1)
    if t.op in _FIRST:
        return (0,)
    if t.op == c.GGML_OP_IM2COL:
        return (1,)
    if t.op == c.GGML_OP_UNARY:
        return (0,) if t.op_params[0] in _UNARY else ()
    if t.op == c.GGML_OP_GLU and t.op_params[0] == c.GGML_GLU_OP_SWIGLU and t.src[1] != NULL:
        return (0, 1)
    return ()


cdef bint is_ignored(c.ggml_tensor * t, int j) noexcept:
    """Return whether ggml takes the result for constant in operand j."""
    if t.op == c.GGML_OP_IM2COL or t.op == c.GGML_OP_IM2COL_BACK:
        return j == 0
    if t.op == c.GGML_OP_UNARY and (t.op_params[0] == c.GGML_UNARY_OP_SGN or t.op_params[0] == c.GGML_UNARY_OP_STEP):
        return j == 0
    return j == 1 and t.op in (c.GGML_OP_CPY, c.GGML_OP_GET_ROWS, c.GGML_OP_GET_ROWS_BACK, c.GGML_OP_ROPE)


cdef dict overwriters_of(CGraph graph):
    """Return {root: nodes that write into it} of what nodes write into that have no memory of their own."""
    cdef c.ggml_tensor * t
    found = {}
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        if t.view_src != NULL and not is_view(t):
            found.setdefault(<size_t> root_of(t), []).append(<size_t> t)
    return found


cdef int check_unwritten(c.ggml_tensor * t, dict writers) except -1:
    """Check that what a node reads is still the same when gradients are computed from it."""
    cdef c.ggml_tensor * src
    for j in range(c.GGML_MAX_SRC):
        if t.src[j] == NULL or t.op == c.GGML_OP_CPY and j == 1:
            continue
        by = writers.get(<size_t> root_of(t.src[j]), [])
        src = t.src[j]
        while by and is_view(src):
            src = src.src[0]
        if by and by != [<size_t> src]:
            raise no_backward(t, f"operand {j} is written over by another node")
    return 0


cdef int check_readers(CGraph graph, set trained, dict writers) except -1:
    """Check that what parameters take part in is read as the result of the node that writes it: else ggml misses it."""
    cdef c.ggml_tensor * t
    writers = {root: by for root, by in writers.items() if not trained.isdisjoint(by)}
    for i in range(c.ggml_graph_n_nodes(graph._ptr) if writers else 0):
        t = c.ggml_graph_node(graph._ptr, i)
        if <size_t> t not in trained and not is_view(t):
            check_unwritten(t, writers)
    return 0


cdef set find_trained(CGraph graph):
    """Return the addresses of the nodes that parameters take part in, each checked to be one that can be trained."""
    cdef c.ggml_tensor * t
    cdef int i, j
    cdef bint needed, any_params = False, any_loss = False
    found = set()
    writers = overwriters_of(graph)
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        needed = (t.flags & (c.GGML_TENSOR_FLAG_PARAM | c.GGML_TENSOR_FLAG_LOSS)) != 0
        any_params = any_params or t.flags & c.GGML_TENSOR_FLAG_PARAM
        any_loss = any_loss or t.flags & c.GGML_TENSOR_FLAG_LOSS
        for j in range(c.GGML_MAX_SRC):
            if t.src[j] != NULL and t.src[j].flags & c.GGML_TENSOR_FLAG_PARAM and t.src[j].op == c.GGML_OP_NONE:
                if <size_t> t.src[j] not in found:  # was a leaf when the graph was expanded
                    raise no_backward(t, "a parameter must be set with Tensor.set_param() before CGraph.expand()")
            if t.src[j] != NULL and not is_ignored(t, j) and <size_t> t.src[j] in found:
                needed = True
        if not needed or t.type == c.GGML_TYPE_I32:
            continue
        if t.type != c.GGML_TYPE_F32:
            raise DTypeError(f"build_backward: {graph._wrap(t)!r} must be F32 to have a gradient")
        if t.view_src != NULL and not is_view(t) and t.op != c.GGML_OP_CPY:
            raise no_backward(t, "there is no gradient for what is computed in place")
        if not c.ggml_nelements(t):
            raise no_backward(t, "there is no gradient for an empty tensor")
        check_unwritten(t, writers)
        found.add(<size_t> t)
    check_readers(graph, found, writers)
    if not any_params:
        raise ShapeError("build_backward: no node is a parameter; use Tensor.set_param() before CGraph.expand()")
    if not any_loss:
        raise ShapeError("build_backward: no node is a loss; use Tensor.set_loss()")
    return found


cdef int check_backward(CGraph graph, set trained) except -1:
    """Check that ggml has a gradient for each node between the parameters and the losses."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * src
    cdef int i, j
    cdef bint contiguous
    contiguity = {}  # of the gradients so far
    for i in reversed(range(c.ggml_graph_n_nodes(graph._ptr))):
        t = c.ggml_graph_node(graph._ptr, i)
        if t.flags & c.GGML_TENSOR_FLAG_LOSS:
            contiguity[<size_t> t] = True
        if <size_t> t not in contiguity:
            continue
        contiguous = contiguity[<size_t> t]
        if not contiguous and t.op not in _PASSING:
            raise no_backward(t, "its gradient is permuted; put an ops.reshape before the permutation")
        allowed = differentiable(t)
        if not allowed and t.op != c.GGML_OP_NONE and not is_ignored(t, 0):
            raise no_backward(t, "ggml has no gradient for operand 0")
        for j in range(c.GGML_MAX_SRC):
            src = t.src[j]
            if src == NULL or is_ignored(t, j) or <size_t> src not in trained:
                if src != NULL and <size_t> src in trained and <size_t> src not in contiguity:
                    raise no_backward(t, f"it is constant in operand {j}, which has no other use")
                continue
            if j not in allowed:
                raise no_backward(t, f"ggml has no gradient for operand {j}")
            check_gradient(t, src, j, contiguity)
            if t.op in (c.GGML_OP_PERMUTE, c.GGML_OP_TRANSPOSE):
                contiguity[<size_t> src] = <size_t> src in contiguity
            elif t.op in (c.GGML_OP_DUP, c.GGML_OP_ADD) or t.op == c.GGML_OP_SUB and j == 0:
                contiguity[<size_t> src] = contiguous or <size_t> src in contiguity
            else:
                contiguity[<size_t> src] = True
    return 0


cdef bint is_padded(c.ggml_tensor * t) noexcept:
    """Return whether rows are at one distance; ggml_is_contiguous does not look at the strides of single rows."""
    return t.nb[0] == 4 and t.nb[2] == t.nb[1] * t.ne[1] and t.nb[3] == t.nb[2] * t.ne[2]


cdef bint is_disjoint(int64_t * ne, size_t * nb) noexcept:
    """Return whether each row, matrix, ... begins behind the end of the one before."""
    cdef size_t end = nb[0]
    cdef int i
    for i in range(c.GGML_MAX_DIMS):
        if ne[i] > 1:
            if nb[i] < end:
                return False
            end += (ne[i] - 1) * nb[i]
    return True


cdef bint has_overlap(c.ggml_tensor * t) noexcept:
    """Return whether what a view shows, or SET or ACC write, may be rows that overlap."""
    cdef size_t nb[4]
    cdef int i
    if t.op == c.GGML_OP_VIEW:
        return not is_disjoint(t.ne, t.nb)
    nb[0] = 4
    for i in range(3):
        nb[i + 1] = <size_t> t.op_params[i]
    return not is_disjoint(t.src[1].ne, nb)


cdef int keep_results(set trained) except -1:
    """Let no gradient be put where the result of a softmax is: ggml's kernel still reads that when it writes."""
    cdef size_t address
    for address in trained:
        if (<c.ggml_tensor *> address).op == c.GGML_OP_SOFT_MAX:
            (<c.ggml_tensor *> address).flags |= c.GGML_TENSOR_FLAG_OUTPUT
    return 0


cdef void fill_zeros(c.ggml_tensor * t) noexcept:
    """Let zeros that ggml adds gradients of views to be made as such, not as 0 times numbers that may be infinite."""
    if t.op == c.GGML_OP_ACC and t.src[0].op == c.GGML_OP_SCALE and (<float *> t.src[0].op_params)[0] == 0:
        t.src[0].op = c.GGML_OP_FILL  # whose parameter is where the factor is


cdef int check_gradient(c.ggml_tensor * t, c.ggml_tensor * src, int j, dict contiguity) except -1:
    """Check what ggml asserts, or takes for granted, when it makes the gradient of operand j of node t."""
    cdef c.ggml_tensor * other
    cdef bint same = c.ggml_are_same_shape(t, src)
    if not contiguity.get(<size_t> src, True):
        raise no_backward(t, f"operand {j} has a permuted gradient from another node; put an ops.reshape between")
    if t.op not in _STRIDED:
        for k in range(2):
            other = t.src[k]
            if other != NULL and other.type == c.GGML_TYPE_F32 and not c.ggml_is_contiguous(other):
                raise no_backward(t, f"operand {k} must be contiguous for a gradient; use ops.cont first")
    if j == 1 and (t.op == c.GGML_OP_SUB or not same) and not contiguity[<size_t> t]:
        raise no_backward(t, "its gradient is permuted; put an ops.reshape before the permutation")
    if t.op in (c.GGML_OP_SUB, c.GGML_OP_DIV) and j == 1 and not same:
        raise no_backward(t, "ggml has no gradient for an operand that is broadcast")
    if t.op == c.GGML_OP_ROPE and t.op_params[15]:
        raise no_backward(t, "ggml has no gradient for a rotation that leaves out the first elements")
    if t.op == c.GGML_OP_MUL_MAT and t.op_params[1] == c.GGML_HINT_SRC0_IS_HADAMARD:
        raise no_backward(t, "ggml has no gradient for a product with a matrix that is not read")
    if not is_padded(t.src[0]) and (
            t.op == c.GGML_OP_GLU or t.op == c.GGML_OP_UNARY and t.op_params[0] == c.GGML_UNARY_OP_SILU):
        raise no_backward(t, "operand 0 must be contiguous for a gradient; use ops.cont first")
    if t.op == c.GGML_OP_MEAN and t.ne[1] * t.ne[2] * t.ne[3] != 1 and <size_t> src in contiguity:
        raise no_backward(t, "ggml cannot add up the gradients of what several nodes use")
    if t.op == c.GGML_OP_MUL_MAT and j == 0 and (src.ne[2] != t.ne[2] or src.ne[3] != t.ne[3]) and t.ne[3] != 1:
        raise no_backward(t, "ggml has no gradient for a matrix that is broadcast in ne3")
    if t.op == c.GGML_OP_GET_ROWS and (t.ne[2] * t.ne[3] != 1 or src.ne[2] * src.ne[3] != 1):
        raise no_backward(t, "ggml has a gradient for the rows of a matrix only")
    if t.op in (c.GGML_OP_VIEW, c.GGML_OP_SET, c.GGML_OP_ACC):
        if j == 0 and not (c.ggml_is_contiguous(src) and is_padded(src)):
            raise no_backward(t, "operand 0 must be contiguous for a gradient; use ops.cont first")
        if c.ggml_nbytes(src) >= <size_t> 1 << 31 or t.nb[0] != 4:
            raise no_backward(t, "ggml has no gradient for a view as large or as strided")
        if has_overlap(t):
            raise no_backward(t, "ggml has no gradient where rows overlap, or interleave")
    return 0
