# Sizes of convolutions: included by the families of them.

cdef enum:
    MAX_STEP = 1 << 28  # of strides, paddings and dilations: ggml multiplies them as int


cdef struct Steps:
    int s[3]
    int p[3]
    int d[3]


cdef Steps steps(int s0, int p0, int d0, int s1=1, int p1=0, int d1=1, int s2=1, int p2=0, int d2=1) noexcept:
    cdef Steps st
    st.s[0], st.s[1], st.s[2] = s0, s1, s2
    st.p[0], st.p[1], st.p[2] = p0, p1, p2
    st.d[0], st.d[1], st.d[2] = d0, d1, d2
    return st


cdef int64_t count(str op, c.ggml_tensor * pa, c.ggml_tensor * pb, Steps st, int dim, operands) except -1:
    """Return how many positions the kernel has along one dimension."""
    cdef int s = st.s[dim]
    cdef int p = st.p[dim]
    cdef int d = st.d[dim]
    if not 1 <= s <= MAX_STEP or not 0 <= p <= MAX_STEP or not 1 <= d <= MAX_STEP:
        raise bad_value(op, f"stride {s}, padding {p}, dilation {d} are not from 1, 0 and 1 up to {MAX_STEP}")
    # ggml's own formula, rounding towards 0, finds a position also for some kernels that are larger than the data
    if <double> pb.ne[dim] + 2.0 * p < <double> d * (pa.ne[dim] - 1) + 1:
        raise bad_shape(op, f"b is too small for a in ne{dim}", operands)
    return (pb.ne[dim] + 2 * <int64_t> p - d * (pa.ne[dim] - 1) - 1) // s + 1


cdef int check_filled(str op, c.ggml_tensor * pa, c.ggml_tensor * pb, operands) except -1:
    if c.ggml_nelements(pa) == 0 or c.ggml_nelements(pb) == 0:
        raise bad_shape(op, "an operand is empty", operands)
    return 0
