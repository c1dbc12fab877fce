"""Devices, buffers and backends: preconditions, lifetime, threads."""

from __future__ import annotations

import importlib.util
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pyggml_adapt.errors import AllocError, BackendError, BusyError, ClosedError, ComputeAborted, ShapeError
from pyggml_adapt.ggml import (
    Backend,
    Buffer,
    BufferType,
    CGraph,
    Context,
    Device,
    DeviceType,
    GAllocr,
    Type,
    default_n_threads,
    ops,
)


@pytest.fixture
def ctx():
    return Context(Context.size_for(32))


def test_devices():
    cpu = Device.cpu()
    assert (cpu.name, cpu.type, cpu.backend_name) == ("CPU", DeviceType.CPU, "CPU")
    assert cpu.name in [device.name for device in Device.all()]
    assert "CPU" in Device.backends()
    assert cpu.description
    free, total = cpu.memory
    assert 0 < free <= total
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in cpu.features.items())
    assert (cpu.buffer_type.name, cpu.buffer_type.is_host) == ("CPU", True)
    assert cpu.buffer_type.alignment % 16 == 0
    assert repr(cpu.buffer_type) == "<BufferType CPU>"


@pytest.mark.parametrize(
    "cls, message",
    [
        (Device, "devices come from Device.all() and Device.cpu()"),
        (BufferType, "buffer types come from Device.buffer_type"),
        (Buffer, "buffers come from Buffer.allocate() and Buffer.from_mapping()"),
    ],
)
def test_borrowed_things_cannot_be_made_by_hand(cls, message):
    with pytest.raises(TypeError) as caught:
        cls()
    assert str(caught.value) == message
    stray = cls.__new__(cls)
    for name in ("name", "memory", "buffer_type", "alignment", "nbytes"):
        if hasattr(cls, name):
            with pytest.raises(ClosedError):
                getattr(stray, name)


def test_buffer(ctx):
    with Buffer.allocate(Device.cpu().buffer_type, 1000, clear=True) as buffer:
        assert buffer.nbytes == 1000
        assert repr(buffer) == "<Buffer of 1000 bytes>"
        t = ctx.new_tensor(Type.F32, (4,), "t")
        buffer.place(t, 1000 - 16)
        assert t.to_numpy().tolist() == [0, 0, 0, 0]
    assert buffer.closed
    buffer.close()
    assert repr(buffer) == "<Buffer, closed>"
    with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
        buffer.nbytes
    with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
        buffer.place(ctx.new_tensor(Type.F32, (4,)), 0)


def test_place_preconditions(ctx):
    buffer = Buffer.allocate(Device.cpu().buffer_type, 64)
    t = ctx.new_tensor(Type.F32, (4,), "t")
    for offset in (49, 64, 65, (1 << 64) - 1):
        with pytest.raises(ShapeError, match=rf"^place: tensor 't' needs 16 bytes at {offset} of a buffer of 64$"):
            buffer.place(t, offset)
    with pytest.raises(OverflowError):
        buffer.place(t, -1)
    buffer.place(t, 48)
    with pytest.raises(ShapeError, match=r"^place: tensor 't' has data already, or is a view$"):
        buffer.place(t, 0)
    view = ops.view(ctx, ctx.new_tensor(Type.F32, (4,)), (2,))
    with pytest.raises(ShapeError, match=r"has data already, or is a view$"):
        buffer.place(view, 0)
    other = ctx.new_tensor(Type.F32, (4,))
    ctx.close()
    with pytest.raises(ClosedError, match=r"^the Context of this Tensor is closed$"):
        buffer.place(other, 0)


def test_empty_buffer(ctx):
    buffer = Buffer.allocate(Device.cpu().buffer_type, 0, clear=True)
    t = ctx.new_tensor(Type.F32, (0, 4))
    buffer.place(t, 0)
    assert not t.is_allocated
    with pytest.raises(ShapeError, match=r"needs 4 bytes at 0 of a buffer of 0$"):
        buffer.place(ctx.new_tensor(Type.F32, (1,)), 0)


@pytest.mark.parametrize("nbytes", [1 << 55, 1 << 62, (1 << 64) - 1])
def test_a_buffer_larger_than_memory(nbytes):
    with pytest.raises(AllocError, match=rf"^no memory for a buffer of {nbytes} bytes"):
        Buffer.allocate(Device.cpu().buffer_type, nbytes)


def test_mapping(ctx, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(np.arange(1024, dtype="f").tobytes())
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    buffer = Buffer.from_mapping(mapping)
    t = ctx.new_tensor(Type.F32, (4, 2))
    buffer.place(t, 64)
    assert t.to_numpy().tolist() == [[16, 17, 18, 19], [20, 21, 22, 23]]
    with pytest.raises(BufferError, match=r"exported pointers exist"):
        mapping.close()
    buffer.close()
    mapping.close()
    with pytest.raises(ClosedError, match=r"^Buffer is closed$"):
        t.to_numpy()


def test_the_mapping_lives_as_long_as_its_tensors(ctx):
    mapping = mmap.mmap(-1, 4096)
    mapping[:4] = b"abcd"
    t = ctx.new_tensor(Type.I8, (4,))
    Buffer.from_mapping(mapping).place(t, 0)
    del mapping
    assert t.to_numpy().tobytes() == b"abcd"


def test_mapping_preconditions(ctx):
    backing = np.zeros(256, "u1")
    start = -backing.ctypes.data % 64 + 1
    buffer = Buffer.from_mapping(memoryview(backing)[start:])
    assert buffer.nbytes == 256 - start
    for type, ne, n in ((Type.F32, (4,), 4), (Type.F16, (4,), 2), (Type.F64, (4,), 8), (Type.Q8_0, (32,), 4)):
        message = rf"^place: tensor 't' of {type.name} must begin at a multiple of {n} bytes$"
        with pytest.raises(ShapeError, match=message):
            buffer.place(ctx.new_tensor(type, ne, "t"), 0)
    bytes_ = ctx.new_tensor(Type.I8, (256 - start,))
    buffer.place(bytes_, 0)
    backing[:] = 7
    assert (bytes_.to_numpy() == 7).all()
    with pytest.raises(ShapeError, match=r"^place: tensor 't' needs 2 bytes at \d+ of a buffer of \d+$"):
        buffer.place(ctx.new_tensor(Type.I8, (2,), "t"), 255 - start)
    with pytest.raises(TypeError):
        Buffer.from_mapping("text")
    with pytest.raises((BufferError, ValueError)):
        Buffer.from_mapping(np.zeros((4, 4))[:, ::2])


def test_backend():
    with Backend(n_threads=2) as backend:
        assert (backend.name, backend.n_threads, backend.abort_flag) == ("CPU", 2, False)
        assert backend.device.type == DeviceType.CPU
        assert repr(backend) == "<Backend CPU, 2 threads>"
    backend.close()
    assert repr(backend) == "<Backend, closed>"
    with pytest.raises(ClosedError, match=r"^Backend is closed$"):
        backend.name
    assert 1 <= default_n_threads() <= 512


@pytest.mark.parametrize("n_threads", [0, -1, 513])
def test_number_of_threads(n_threads):
    with pytest.raises(BackendError, match=rf"^n_threads must be 1 to 512, not {n_threads}$"):
        Backend(n_threads=n_threads)


class Work:
    """A graph that computes for a while, on its own backend."""

    def __init__(self, backend: Backend, n_nodes: int, n: int = 256):
        ctx = Context(Context.size_for(n_nodes + 8, n_nodes + 8))
        self.backend, self.ctx, self.graph = backend, ctx, CGraph(ctx, n_nodes + 8)
        self.x = cur = ctx.new_tensor(Type.F32, (n, n)).set_input()
        for _ in range(n_nodes):
            cur = ops.mul_mat(ctx, self.x, cur)
        self.out = self.graph.expand(cur.set_output())
        self.allocr = GAllocr(backend.device.buffer_type)
        self.allocr.alloc_graph(self.graph)
        self.x.set_data(np.eye(n, dtype="f"))

    def __call__(self):
        self.graph.compute(self.backend)


@pytest.fixture
def busy():
    """Return start(work): a context manager inside which another thread computes, until its abort flag is set."""

    class Busy:
        def __init__(self, work):
            self.work, self.error = work, None
            self.thread = threading.Thread(target=self._run)

        def _run(self):
            try:
                while True:
                    self.work()
            except Exception as exc:
                self.error = exc

        def __enter__(self):
            self.thread.start()
            time.sleep(0.05)
            return self

        def __exit__(self, *exc):
            self.work.backend.abort_flag = True
            self.thread.join(30)
            assert not self.thread.is_alive()

    return Busy


def test_abort_from_another_thread(busy):
    work = Work(Backend(n_threads=2), 3000)  # tens of seconds, unless it is stopped
    start = time.monotonic()
    with busy(work) as run:
        pass
    assert isinstance(run.error, ComputeAborted)
    assert str(run.error) == "graph compute: stopped by its abort flag"
    assert time.monotonic() - start < 20
    work.backend.abort_flag = False
    Work(work.backend, 1)()  # the backend is usable again


def test_in_use_by_another_thread(busy):
    backend = Backend(n_threads=1)
    work, second = Work(backend, 3000), Work(backend, 1)
    message = r"^{} is in use by a computation that has not ended$"
    with busy(work) as run:
        for owner in (work.ctx, work.allocr, backend):
            with pytest.raises(BusyError, match=message.format(type(owner).__name__)):
                owner.close()
            assert not owner.closed
        with pytest.raises(BusyError, match=message.format("Context")):
            work()
        with pytest.raises(BusyError, match=message.format("Backend")):
            second()
        with pytest.raises(BusyError, match=message.format("Context")):
            work.graph.expand(work.out)
        second.ctx.close()  # is not in use
    assert isinstance(run.error, ComputeAborted)
    work.ctx.close()
    backend.close()


def test_the_gil_is_free_while_computing():
    work = Work(Backend(n_threads=1), 60)
    ticks, stop = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    for _ in range(3):
        before = ticks
        work()
        assert ticks > before  # with the GIL held there would be none
    elapsed = time.monotonic() - start
    stop.set()
    thread.join()
    assert elapsed > 0.003


def test_two_backends_compute_at_once():
    works = [Work(Backend(n_threads=1), 20, 64) for _ in range(2)]
    rng = np.random.default_rng(0)
    inputs = [np.linalg.qr(rng.standard_normal((64, 64)))[0].astype("f") for _ in works]
    outs = [[], []]

    def run(i):
        for _ in range(20):
            works[i].x.set_data(inputs[i])
            works[i]()
            outs[i].append(works[i].out.to_numpy())

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(2):
        assert all(np.array_equal(out, outs[i][0]) for out in outs[i])
        exact = x = inputs[i].astype("d")
        for _ in range(20):
            exact = exact @ x.T
        np.testing.assert_allclose(outs[i][0], exact, atol=1e-3)
    assert not np.array_equal(outs[0][0], outs[1][0])


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed")
@pytest.mark.parametrize(
    "imports",
    [
        "import reference\nfrom pyggml_adapt.ggml import ops\n",
        "from pyggml_adapt.ggml import ops\nimport reference\n",
    ],
    ids=["llama_cpp first", "ours first"],
)
def test_beside_llama_cpp(tiny_gguf, imports):
    """Each computes with its own ggml, turn by turn, and gets what it gets alone."""
    path, tests = tiny_gguf("llama", type="Q8_0"), Path(__file__).parents[1]
    theirs = "ref = reference.Reference(Path(sys.argv[1]))\nlogits = ref.eval([5, 6, 7])\n"
    results = []
    for code in ("import reference\n" + theirs, imports + OURS + theirs + OURS_AGAIN):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys\nfrom pathlib import Path\n" + code + "sys.stdout.write(logits.tobytes().hex())",
                path,
            ],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(tests)},
        )
        assert done.returncode == 0, done.stderr
        results.append(np.frombuffer(bytes.fromhex(done.stdout), "f"))
    np.testing.assert_array_equal(*results)


OURS = """
import numpy as np
from pyggml_adapt.ggml import *
ctx = Context(Context.size_for(16, 16))
w, x = ctx.new_tensor(Type.F32, (8, 4)).set_input(), ctx.new_tensor(Type.F32, (8, 2)).set_input()
graph, backend = CGraph(ctx, 16), Backend(n_threads=2)
out = graph.expand(ops.mul_mat(ctx, w, x))
allocr = GAllocr(backend.device.buffer_type)
allocr.alloc_graph(graph)
rng = np.random.default_rng(0)
a, b = rng.standard_normal((4, 8), dtype="f"), rng.standard_normal((2, 8), dtype="f")
w.set_data(a)
x.set_data(b)
def check():
    graph.compute(backend)
    np.testing.assert_allclose(out.to_numpy(), b @ a.T, rtol=1e-4, atol=1e-5)
check()
"""
OURS_AGAIN = """
check()
with open("/proc/self/maps") as file:
    libraries = {line.split()[-1] for line in file if "ggml" in line.rpartition("/")[2] and ".so" in line}
assert any("llama_cpp" in each for each in libraries), libraries
assert any("libpyggml_adapt_ggml" in each for each in libraries), libraries
"""
