# What opt.pyx checks before ggml builds the graphs of a training step: the same graph is built here first, by ops that
# raise where ggml aborts, and counted.

cdef enum:
    STATIC_SIZE = 2048  # GGML_DEFAULT_GRAPH_SIZE: what ggml takes for static graphs
    SPARE = 64  # tensors, beyond those that are counted here
    MAX_NODES = 1 << 15
    MAX_TENSORS = 1 << 24


@cython.final
cdef class Plan:
    """A training step, built but never computed."""

    cdef CGraph graph
    cdef Indices indices
    cdef list homes  # the Contexts of what outputs are computed from
    cdef list leaves
    cdef list marks  # (address, its marks, its op's parameters) of what outputs are computed from
    cdef list places  # (address, its data's and buffer's) of each leaf that had data when the graphs were built
    cdef int n_nodes, n_leaves, n_params, n_tensors


cdef Plan plan_of(Tensor outputs, loss_type, bint accumulate):
    """Return the plan of one training step.  accumulate: whether gradients are added up over several."""
    cdef Plan plan = Plan.__new__(Plan)
    cdef c.ggml_tensor * t
    cdef size_t overhead
    cdef int n_forward, n_leaves
    seen = set()
    n_forward = count([<size_t> outputs.ptr()], seen)
    n_forward = len(seen)
    cdef int size = 9 * n_forward + 2 * SPARE
    if size > MAX_NODES:
        raise AllocError(f"OptContext: a graph of {n_forward} nodes and leaves is too large to train")
    overhead = c.ggml_graph_overhead_custom(size, True)
    cdef Context ctx = Context(size * c.ggml_tensor_overhead() + overhead)
    plan.graph = CGraph(ctx, size, grads=True)
    for address in seen:
        t = <c.ggml_tensor *> <size_t> address
        if t.flags & c.GGML_TENSOR_FLAG_LOSS:
            raise ShapeError(f"OptContext: {outputs.ctx.home(t).wrap(t)!r} is marked as a loss; training has its own")
    plan.marks = [(address, marks_of(address), params_of(address)) for address in seen]
    for each in loss_of(ctx, outputs, loss_type):
        plan.graph.expand(each)
    plan.homes = homes_of(plan.graph)
    plan.leaves = leaves_of(plan.graph)
    plan.places = [(address, place_of(address)) for address, _ in plan.leaves
                   if not ctx.holds(<c.ggml_tensor *> <size_t> address)]
    plan.n_params = sum([1 for address in nodes_of(plan.graph) if is_param(address)])
    split_norms(plan.graph)
    plan.graph.build_backward()
    if not accumulate:
        check_gradients(plan)
    plan.indices = Indices(plan.graph)
    if find_callbacks(plan.graph._ptr):
        raise BackendError("OptContext: a graph with custom ops cannot be trained")
    seen = set()
    n_leaves = count(nodes_of(plan.graph), seen)
    # the step of each parameter, the sum of its gradients, its two moments; and the optimiser's parameters
    plan.n_nodes = plan.graph.n_nodes + (1 + accumulate) * plan.n_params
    plan.n_leaves = n_leaves + 3 * plan.n_params + 1
    plan.n_tensors = (c.ggml_used_mem(ctx._ptr) - overhead) // c.ggml_tensor_overhead() + 2 * plan.n_params + SPARE
    return plan


cdef int fill_all_zeros(Context ctx, set users) except -1:
    """Do with what ggml has built in ctx, beside the user's nodes, what CGraph.build_backward does."""
    cdef c.ggml_tensor * t = c.ggml_get_first_tensor(ctx.ptr())
    while t != NULL:
        if <size_t> t not in users:
            fill_zeros(t)
        t = c.ggml_get_next_tensor(ctx._ptr, t)
    return 0


cdef int check_gradients(Plan plan) except -1:
    """Check that gradients are contiguous, where they are not added up first: the optimisers take it for granted."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * grad
    for address, param in plan.leaves:
        t = <c.ggml_tensor *> <size_t> address
        grad = c.ggml_graph_get_grad(plan.graph._ptr, t) if param else NULL
        if grad != NULL and not c.ggml_is_contiguous(grad):
            raise ShapeError(f"OptContext: the gradient of parameter {plan.graph._wrap(t).name!r} is permuted; put an "
                             f"ops.reshape before the permutation")
    return 0


cdef tuple place_of(size_t address):
    """Return the addresses of a tensor's data and of its buffer."""
    cdef c.ggml_tensor * t = <c.ggml_tensor *> address
    return <size_t> t.data, <size_t> t.buffer


cdef bint is_param(size_t address) noexcept:
    return ((<c.ggml_tensor *> address).flags & c.GGML_TENSOR_FLAG_PARAM) != 0


cdef list signature_of(addresses):
    """Return what must be the same of the nodes in each of the dynamic graphs: ggml knows parameters by position."""
    return [(is_param(address), (<c.ggml_tensor *> <size_t> address).ne) for address in addresses]


cdef bytes params_of(size_t address):
    """Return the parameters of a tensor's op."""
    return (<char *> (<c.ggml_tensor *> address).op_params)[:sizeof((<c.ggml_tensor *> address).op_params)]


cdef int marks_of(size_t address) noexcept:
    """Return whether a tensor is marked as a parameter, or as a loss."""
    return (<c.ggml_tensor *> address).flags & (c.GGML_TENSOR_FLAG_PARAM | c.GGML_TENSOR_FLAG_LOSS)


cdef list leaves_of(CGraph graph):
    """Return (address, whether it is a parameter) of each leaf that the graph's nodes are computed from."""
    seen = set()
    count(nodes_of(graph), seen)
    return [(address, is_param(address)) for address in seen if (<c.ggml_tensor *> <size_t> address).op
            == c.GGML_OP_NONE]


cdef int check_tensors(Tensor inputs, Tensor outputs) except -1:
    """Check that outputs are computed from inputs, which are datapoints."""
    cdef c.ggml_tensor * t = inputs.ptr()
    if t.op != c.GGML_OP_NONE or t.view_src != NULL or t.ne[2] * t.ne[3] != 1 or not inputs.is_contiguous:
        raise ShapeError(f"OptContext: inputs must be a leaf [ne_datapoint, ndata_batch], not {inputs!r}")
    if outputs.ptr().op == c.GGML_OP_NONE or not outputs.nelements or not inputs.nelements:
        raise ShapeError(f"OptContext: {outputs!r} is not computed from inputs")
    seen = set()
    count([<size_t> outputs.ptr()], seen)
    if <size_t> t not in seen:
        raise ShapeError(f"OptContext: outputs {outputs.name!r} are not computed from inputs {inputs.name!r}")
    return 0


cdef object read_optimizer(c.ggml_opt_optimizer_params * pars, found, kind):
    """Fill `pars` from an AdamW or SGD, which must be a `kind` unless this is None; return which it is.

    The numbers are checked as they will be used: a subclass can say something else each time.
    """
    if not isinstance(found, kind or (AdamW, SGD)):
        wanted = "AdamW or SGD, or a function that returns one" if kind is None else kind.__name__
        raise ParameterError(f"OptContext: the optimiser must be {wanted}, not {found!r}")
    if isinstance(found, AdamW):
        found = AdamW(<double> found.alpha, <double> found.beta1, <double> found.beta2, <double> found.eps,
                      <double> found.wd)
        pars.adamw.alpha, pars.adamw.beta1, pars.adamw.beta2 = found.alpha, found.beta1, found.beta2
        pars.adamw.eps, pars.adamw.wd = found.eps, found.wd
    else:
        found = SGD(<double> found.alpha, <double> found.wd)
        pars.sgd.alpha, pars.sgd.wd = found.alpha, found.wd
    return type(found)


cdef tuple loss_of(Context ctx, Tensor outputs, loss_type):
    """Return the tensors that ggml_opt computes from the outputs: the loss, and what is counted."""
    if outputs.ptr().type != c.GGML_TYPE_F32:
        raise DTypeError(f"OptContext: outputs must be F32, not {outputs.type.name}")
    labels = ctx.new_tensor(outputs.type, outputs.ne).set_input()
    if loss_type == OptLossType.CROSS_ENTROPY:
        loss = _ops.scale(ctx, _ops.cross_entropy_loss(ctx, outputs, labels), 0.5)
        pred = _ops.argmax(ctx, outputs)
        return loss.set_loss(), pred, _ops.count_equal(ctx, pred, _ops.argmax(ctx, labels))
    if loss_type == OptLossType.MEAN_SQUARED_ERROR:
        loss = _ops.sum(ctx, _ops.sqr(ctx, _ops.sub(ctx, outputs, labels)))
    else:
        loss = _ops.sum(ctx, outputs)
    return (_ops.scale(ctx, loss, 0.5).set_loss(),)


cdef int check_plan(Plan plan, Sched sched, int size) except -1:
    """Check that the step fits graphs of `size` nodes and the scheduler, and that a backend has each op."""
    cdef c.ggml_tensor * t
    cdef Backend backend
    cdef int n = plan.n_nodes + plan.n_leaves
    if n > size:
        raise AllocError(f"OptContext: a training step of {n} nodes and leaves, for graphs of {size}")
    if n > sched.graph_size:
        raise AllocError(f"OptContext: a training step of {n} nodes and leaves, for a scheduler of {sched.graph_size}")
    point_views(plan.graph)
    for address in nodes_of(plan.graph):
        t = <c.ggml_tensor *> <size_t> address
        for backend in sched.backends:
            if c.ggml_backend_supports_op(backend.ptr(), t):
                break
        else:
            raise BackendError(f"no backend of the scheduler can compute {plan.graph._wrap(t)!r}")
    return 0


cdef int check_leaves(Plan plan, list owners, Context fresh) except -1:
    """Check that parameters can be written, and that all leaves but those that are allocated in `fresh` have data."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * root
    for address, param in plan.leaves:
        t = <c.ggml_tensor *> <size_t> address
        root = t if t.view_src == NULL else t.view_src
        if plan.graph.ctx.holds(t) or fresh is not None and fresh.holds(t) and not param:
            continue
        if t.data == NULL or root.buffer == NULL:
            raise ClosedError(f"tensor {plan.graph._wrap(t).name!r} has no data: it is not allocated")
        for owner in owners:
            if param and (<Owner> owner).owns_readonly(root.buffer):
                raise DTypeError(f"parameter {plan.graph._wrap(t).name!r} is in a read-only mapping")
    check_writable(plan.graph, owners)
    check_unshared(plan, owners)
    plan.graph._written += [address for address, param in plan.leaves if param]  # by the optimiser
    return 0


cdef int check_unshared(Plan plan, list owners) except -1:
    """Check that no node is in memory that an allocator has nodes of another graph share."""
    for owner in owners:
        if (<Owner> owner).shared is not None:
            for address, _, _ in plan.marks:
                if address in (<Owner> owner).shared and (<c.ggml_tensor *> <size_t> address).op != c.GGML_OP_NONE:
                    raise BackendError(f"{plan.graph._wrap(<c.ggml_tensor *> <size_t> address)!r} was allocated with "
                                       f"another graph, and shares its memory: it cannot be trained")
    return 0


cdef int check_marks(Plan plan) except -1:
    """Check that nothing was marked since: ggml reads the marks when it builds the graphs, and when it copies them."""
    cdef size_t address
    for address, marks, params in plan.marks:
        if marks_of(address) != marks:
            raise ShapeError(f"tensor {plan.graph._wrap(<c.ggml_tensor *> address).name!r} was marked as a parameter, "
                             f"or as a loss, after the graphs were built")
        if params_of(address) != params:
            raise BackendError(f"the parameters of {plan.graph._wrap(<c.ggml_tensor *> address)!r} have changed since "
                               f"the graphs were built")
    return 0


cdef int check_places(Plan plan) except -1:
    """Check that no leaf's data has moved: ggml's copies of static graphs have the addresses that it had."""
    cdef size_t address
    for address, place in plan.places:
        if place_of(address) != place:
            raise BackendError(f"the data of tensor {plan.graph._wrap(<c.ggml_tensor *> address).name!r} has moved "
                               f"since the graphs were built")
    return 0
