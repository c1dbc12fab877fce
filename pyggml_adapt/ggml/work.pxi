# The memory that kernels of the CPU need beside the tensors: ggml ends the process without.  graph.pyx includes this.

cdef enum:
    LINE = 64  # bytes, of a cache
    SLOT = 512 << 10  # bytes, in which a thread keeps tiles of a matrix
    TILE = 64  # queries, and keys, that flash attention computes with at once
    COLUMNS = 16 << 20  # bytes, of the columns that a convolution multiplies at once


cdef size_t work_of(c.ggml_tensor * t, size_t n_threads) noexcept:
    """Return how many bytes a node's kernel needs, at most.  Source: ggml_graph_plan."""
    cdef size_t slots = LINE + n_threads * SLOT
    cdef size_t heads, n_k, n_v
    if t.op == c.GGML_OP_MUL_MAT:
        return 4 * c.ggml_nelements(t.src[1]) + LINE + slots
    if t.op == c.GGML_OP_MUL_MAT_ID:  # and for each expert a table of rows, a counter, and the chunk that is next
        return (4 * c.ggml_nelements(t.src[1]) + t.src[0].ne[2] * (8 + LINE + 8 * c.ggml_nelements(t.src[2]))
                + 4 * LINE + slots)
    if t.op == c.GGML_OP_FLASH_ATTN_EXT:
        heads, n_k, n_v = t.src[0].ne[2], t.src[1].ne[0], t.src[2].ne[0]
        return 4 * n_threads * (2 * TILE * (n_k + n_v + TILE) + heads * (2 + n_v))
    if t.op == c.GGML_OP_GATED_DELTA_NET:
        return 4 * n_threads * t.src[2].ne[0] * (1 + t.src[2].ne[0])
    if t.op == c.GGML_OP_CONV_2D or t.op == c.GGML_OP_CONV_3D:
        return COLUMNS
    if t.op == c.GGML_OP_CONV_TRANSPOSE_1D or t.op == c.GGML_OP_CONV_TRANSPOSE_2D:
        return 4 * (c.ggml_nelements(t.src[0]) + c.ggml_nelements(t.src[1]))
    return 2 * 4 * n_threads * longest_row(t)  # at most two rows for each thread


cdef size_t longest_row(c.ggml_tensor * t) noexcept:
    """Return the elements of the longest row of a node and its operands."""
    cdef size_t found = t.ne[0]
    cdef int k
    for k in range(c.GGML_MAX_SRC):
        if t.src[k] != NULL:
            found = max(found, <size_t> t.src[k].ne[0])
    return found


cdef int check_work(CGraph graph, Backend backend) except -1:
    """Check that there is memory for what the CPU's threads need beside the tensors: ggml ends the process without."""
    cdef size_t need = 0
    cdef int i
    if backend.threadpool is None:
        return 0
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        need = max(need, work_of(c.ggml_graph_node(graph._ptr, i), backend.n_threads))
    need += LINE * backend.n_threads
    cdef void * attempt = malloc(need)
    if attempt == NULL:
        raise AllocError(f"no memory for {backend.n_threads} threads that need {need} bytes")
    free(attempt)
    return 0
