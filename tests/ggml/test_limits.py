"""What a process may not have: memory for kernels beside the tensors, and threads; ggml or OpenMP would end it."""

from __future__ import annotations

import platform

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the limits are Linux's, mallopt is glibc's")

PRELUDE = """
    import ctypes, resource
    from pyggml_adapt.ggml import ops
    from pyggml_adapt.ggml.opt import OptContext, OptLossType

    ctypes.CDLL(None).mallopt(-8, 1), ctypes.CDLL(None).mallopt(-3, 1 << 20)  # glibc: no memory put by

    def limit(more):
        size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
        resource.setrlimit(resource.RLIMIT_AS, (size + more,) * 2)

    def leaf(ctx, *ne, type=Type.F32):
        return ctx.new_tensor(type, ne)
"""

# of 8 MiB more than it has, none of these has enough
NODES = {
    "mul_mat": "ops.mul_mat(ctx, leaf(ctx, 1 << 20, 1, type=Type.F16), leaf(ctx, 1 << 20, 6))",
    "mul_mat_id": """ops.mul_mat_id(ctx, leaf(ctx, 1, 1, 1 << 10), leaf(ctx, 1, 1, 64),
        leaf(ctx, 32, 64, type=Type.I32))""",
    "flash_attn_ext": "ops.flash_attn_ext(ctx, q := leaf(ctx, 1 << 18, 1), q, q, None, 1.0)",
    "conv_2d_direct": "ops.conv_2d_direct(ctx, leaf(ctx, 1, 1), leaf(ctx, 8, 8), 1, 1, 0, 0, 1, 1)",
    "conv_3d_direct": "ops.conv_3d_direct(ctx, leaf(ctx, 1, 1), leaf(ctx, 8, 8), 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1)",
    "conv_transpose_1d": "ops.conv_transpose_1d(ctx, leaf(ctx, 1 << 20, 1, 4), leaf(ctx, 4, 4), 1, 0, 1)",
    "conv_transpose_2d": """ops.conv_transpose_2d_p0(ctx, leaf(ctx, 1 << 11, 1 << 11, type=Type.F16),
        leaf(ctx, 1, 1), 1)""",
    "gated_delta_net": """ops.gated_delta_net(ctx, *[leaf(ctx, 1 << 11, 1)] * 3, *[leaf(ctx, 1, 1)] * 2,
        leaf(ctx, 1 << 11, 1 << 11), 2)""",
    "soft_max": "ops.soft_max(ctx, leaf(ctx, 1 << 21, 1))",
}


@pytest.mark.parametrize("node", NODES)
def test_memory_for_kernels(python, node):
    out = python(f"""{PRELUDE}
    ctx, backend = Context(Context.size_for(64, 64)), Backend(n_threads=2)
    node = {NODES[node]}
    graph = CGraph(ctx, 64)
    graph.expand(node.set_output())
    GAllocr(backend.device.buffer_type).alloc_graph(graph)
    limit(8 << 20)
    try:
        graph.compute(backend)
    except AllocError as error:
        print(error)
    """)
    assert out.startswith("no memory for 2 threads that need "), out


def test_memory_for_training(python):
    out = python(f"""{PRELUDE}
    ctx, backend = Context(Context.size_for(400, 2048)), Backend(n_threads=2)
    x, w, s = leaf(ctx, 1 << 20, 4), leaf(ctx, 1 << 20, 8, type=Type.F16), leaf(ctx, 8, 4).set_param()
    ctx.alloc_tensors(backend.device.buffer_type)
    outputs = ops.add(ctx, ops.mul_mat(ctx, w, x), s)
    opt = OptContext(Sched([backend], 8192), x, outputs, loss_type=OptLossType.MEAN_SQUARED_ERROR)
    opt.alloc(backward=True)
    limit(4 << 20)
    try:
        opt.eval()
    except AllocError as error:
        print(error)
    """)
    assert out.startswith("no memory for 2 threads that need "), out


def test_threads(python):
    """Of 64 MiB a few threads have their stacks, of 8 MiB as a rule; not 500."""
    out = python(f"""{PRELUDE}
    limit(64 << 20)
    try:
        Backend(n_threads=500)
    except BackendError as error:
        print(error)
    print(Backend(n_threads=2).n_threads)
    """)
    assert out.startswith("this process cannot start 499 threads more, only "), out
    assert out.endswith("\n2\n")
