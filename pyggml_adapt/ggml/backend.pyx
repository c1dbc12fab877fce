"""Devices, the memory that they own, and the backends that compute on them."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport (
    Context, Owner, Tensor, acquire, check_idle, check_same_layout, name_bytes, point_operands, reach, release,
    vacate,
)
from pyggml_adapt.ggml.threadpool cimport Threadpool

import os

from pyggml_adapt.errors import (
    AllocError, BackendError, BusyError, ClosedError, DTypeError, FileAccessError, ShapeError,
)
from pyggml_adapt.ggml.enums import BufferUsage, DeviceType
from pyggml_adapt.ggml.status import last_log
from pyggml_adapt.ggml.threadpool import MAX_THREADS, default_n_threads

__all__ = ["MAX_THREADS", "Backend", "Buffer", "BufferType", "Device", "Event", "default_n_threads", "ggml_version"]

cdef size_t MAX_NBYTES = <size_t> 1 << 60  # of a buffer: ggml adds an alignment without looking for overflow

include "devices.pxi"


cdef class Buffer(Owner):
    """Own a piece of memory that tensors are placed in.

    Wraps: ggml_backend_buft_alloc_buffer, ggml_backend_cpu_buffer_from_ptr, ggml_backend_buffer_free.
    """

    def __init__(self):
        raise TypeError("buffers come from Buffer.allocate() and Buffer.from_mapping()")

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            c.ggml_backend_buffer_free(self._ptr)
            self._ptr = NULL
        if self._mapped:
            self._mapped = False
            PyBuffer_Release(&self._mapping)

    cdef bint owns(self, c.ggml_backend_buffer * buffer) noexcept:
        return buffer == self._ptr or self._parts is not None and <size_t> buffer in self._parts

    cdef bint owns_readonly(self, c.ggml_backend_buffer * buffer) noexcept:
        return buffer == self._ptr and self._mapped and self._mapping.readonly

    cdef c.ggml_backend_buffer_t ptr(self) except NULL:
        if self._ptr == NULL:
            raise ClosedError("Buffer is closed")
        return self._ptr

    @staticmethod
    def allocate(BufferType buffer_type not None, size_t nbytes, *, bint clear=False):
        """Return a new buffer of nbytes, its memory set to zero if `clear`.

        Raises: AllocError when there is not enough memory.
        """
        cdef Buffer self = Buffer.__new__(Buffer)
        cdef c.ggml_backend_buffer_type_t buft = buffer_type.ptr()
        if nbytes > MAX_NBYTES:
            raise AllocError(f"no memory for a buffer of {nbytes} bytes")
        with nogil:
            self._ptr = c.ggml_backend_buft_alloc_buffer(buft, nbytes)
        if self._ptr == NULL:
            raise AllocError(f"no memory for a buffer of {nbytes} bytes of {buffer_type.name} memory: {last_log()}")
        if clear and nbytes:
            with nogil:
                c.ggml_backend_buffer_clear(self._ptr, 0)
        return self

    @staticmethod
    def from_mapping(mapping):
        """Return a buffer over the bytes of an object with the buffer protocol, such as mmap.mmap; nothing is copied.

        The object stays exported, so that it cannot be unmapped, until the buffer is closed.  If it is read-only,
        so are the tensors placed in it.
        """
        cdef Buffer self = Buffer.__new__(Buffer)
        cdef size_t alignment = Device.cpu().buffer_type.alignment
        PyObject_GetBuffer(mapping, &self._mapping, PyBUF_SIMPLE)
        self._mapped = True
        self._pad = <size_t> self._mapping.buf % alignment  # ggml wants the buffer's start aligned, not the tensors'
        self._ptr = c.ggml_backend_cpu_buffer_from_ptr(<char *> self._mapping.buf - self._pad,
                                                       self._mapping.len + self._pad)
        if self._ptr == NULL:
            raise AllocError("ggml_backend_cpu_buffer_from_ptr failed")
        c.ggml_backend_buffer_set_usage(self._ptr, c.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        return self

    @staticmethod
    def for_context(Context ctx not None, BufferType buffer_type not None):
        """Return a buffer that the tensors of ctx that have no data are placed in, see Context.alloc_tensors.

        Raises: AllocError when there is not enough memory; ShapeError if no tensor needs any, or a tensor is a view of
        one without data in another Context.
        Wraps: ggml_backend_alloc_ctx_tensors_from_buft, ggml_backend_alloc_ctx_tensors_from_buft_size.
        """
        cdef Buffer self = Buffer.__new__(Buffer)
        cdef c.ggml_context * ptr = ctx.ptr()
        cdef c.ggml_backend_buffer_type_t buft = buffer_type.ptr()
        cdef c.ggml_tensor * t = c.ggml_get_first_tensor(ptr)
        check_idle(ctx)
        reach([ctx])
        waiting = []
        while t != NULL:
            if t.data == NULL and t.view_src == NULL:
                waiting.append(<size_t> t)
            elif t.buffer == NULL and t.view_src != NULL and t.view_src.buffer == NULL and not ctx.holds(t.view_src):
                raise ShapeError(f"alloc_tensors: {ctx.wrap(t).name!r} is a view of a tensor without data")
            t = c.ggml_get_next_tensor(ptr, t)
        cdef size_t need = c.ggml_backend_alloc_ctx_tensors_from_buft_size(ptr, buft)
        if not need:
            raise ShapeError("alloc_tensors: no tensor of the Context needs memory")
        if need > MAX_NBYTES:
            raise AllocError(f"no memory for a buffer of {need} bytes")
        self._ptr = c.ggml_backend_alloc_ctx_tensors_from_buft(ptr, buft)
        if self._ptr == NULL:
            raise AllocError(f"no memory for {need} bytes of {buffer_type.name} memory: {last_log()}")
        self._parts = {<size_t> (<c.ggml_tensor *> <size_t> address).buffer for address in waiting}
        ctx.depend_on(self)
        return self

    @property
    def name(self):
        """Return the name of its kind of memory.  Wraps: ggml_backend_buffer_name."""
        return text(c.ggml_backend_buffer_name(self.ptr()))

    @property
    def buffer_type(self):
        """Return its kind of memory.  Wraps: ggml_backend_buffer_get_type."""
        cdef BufferType buft = BufferType.__new__(BufferType)
        buft._ptr = c.ggml_backend_buffer_get_type(self.ptr())
        return buft

    @property
    def usage(self):
        """What it holds, a BufferUsage.  Wraps: ggml_backend_buffer_get_usage, ggml_backend_buffer_set_usage."""
        return BufferUsage(<int> c.ggml_backend_buffer_get_usage(self.ptr()))

    @usage.setter
    def usage(self, value):
        c.ggml_backend_buffer_set_usage(self.ptr(), <c.ggml_backend_buffer_usage> <int> BufferUsage(value))

    def clear(self, unsigned char value=0):
        """Set every byte to `value`.  Releases the GIL.

        Raises: DTypeError for a read-only mapping, BusyError while it is computed with.
        Wraps: ggml_backend_buffer_clear.
        """
        cdef c.ggml_backend_buffer_t ptr = self.ptr()
        check_idle(self)
        if self.owns_readonly(ptr):
            raise DTypeError("clear: the buffer is a read-only mapping")
        if self._pad:  # ggml's begins before the mapping
            raise ShapeError("clear: the buffer is a mapping that does not start where ggml aligns")
        self._in_use += 1
        with nogil:
            c.ggml_backend_buffer_clear(ptr, value)
        self._in_use -= 1

    @property
    def nbytes(self):
        """Return the size in bytes.  Wraps: ggml_backend_buffer_get_size."""
        return c.ggml_backend_buffer_get_size(self.ptr()) - self._pad

    def place(self, Tensor tensor not None, size_t offset):
        """Let the tensor's data be the bytes from `offset` on; its Context then keeps this buffer alive.

        Raises: ShapeError if it does not fit, is a view, is computed by an op, has data already, or would begin where
        no element may; or if the buffer is one of Context.alloc_tensors().
        Wraps: ggml_backend_tensor_alloc.
        """
        cdef c.ggml_backend_buffer_t ptr = self.ptr()
        cdef c.ggml_tensor * t = tensor.ptr()
        if t.data != NULL or t.buffer != NULL or t.view_src != NULL:
            raise ShapeError(f"place: tensor {tensor.name!r} has data already, or is a view")
        if self._parts is not None:
            raise ShapeError("place: the buffer is that of all tensors of a Context")
        if t.op != c.GGML_OP_NONE:
            raise ShapeError(f"place: tensor {tensor.name!r} is computed by {tensor.op}: GAllocr, Sched or "
                             f"alloc_tensors() find it memory that no other uses meanwhile")
        cdef size_t need = c.ggml_backend_buffer_get_alloc_size(ptr, t)
        cdef size_t size = c.ggml_backend_buffer_get_size(ptr) - self._pad
        if offset > size or need > size - offset:
            raise ShapeError(f"place: tensor {tensor.name!r} needs {need} bytes at {offset} of a buffer of {size}")
        cdef char * base = <char *> c.ggml_backend_buffer_get_base(ptr)
        cdef size_t multiple = 4 if c.ggml_is_quantized(t.type) else c.ggml_type_size(t.type)
        if <size_t> (base + self._pad + offset) % multiple:
            raise ShapeError(f"place: tensor {tensor.name!r} of {tensor.type.name} must begin at a multiple of "
                             f"{multiple} bytes")
        # of an empty buffer ggml has no address: then the tensor, as empty, needs none
        if base != NULL and c.ggml_backend_tensor_alloc(
                ptr, t, base + self._pad + offset) != c.GGML_STATUS_SUCCESS:
            raise AllocError(f"place: {last_log()}")
        tensor.ctx.depend_on(self)

    def __repr__(self):
        return "<Buffer, closed>" if self._ptr == NULL else f"<Buffer of {self.nbytes} bytes>"


cdef c.bool _aborted(void * flag) noexcept nogil:
    cdef int * flags = <int *> flag
    if flags[0] != 0 or flags[1] != 0:
        flags[2] = 1
        return True
    return False


ctypedef void (*pool_set_t)(c.ggml_backend_t, c.ggml_threadpool *) noexcept nogil


cdef void * find(c.ggml_backend_dev_t device, const char * name) noexcept:
    return c.ggml_backend_reg_get_proc_address(c.ggml_backend_dev_backend_reg(device), name)


cdef class Backend(Owner):
    """Own a stream of computations on a device; a CPU backend has a Threadpool.

    device: the CPU's if None.  n_threads: threads of a CPU backend, by default as many as this process may run on.
    threadpool: the threads to use, in turn with other backends; without it a CPU backend has threads of its own.
    Raises: BackendError if the device cannot be initialised, n_threads is not 1 to 512, or both are given, or a
    threadpool for another device.
    Wraps: ggml_backend_dev_init, ggml_backend_set_n_threads, ggml_backend_cpu_set_threadpool, ggml_backend_free.
    """

    def __cinit__(self, Device device=None, n_threads=None, *, Threadpool threadpool=None):
        cdef pool_set_t pool_set
        self._pending, self._computed, self._exports = [], [], []
        self.device = Device.cpu() if device is None else device
        self.n_threads = default_n_threads() if n_threads is None else n_threads
        if not 1 <= self.n_threads <= c.GGML_MAX_N_THREADS:
            raise BackendError(f"n_threads must be 1 to {c.GGML_MAX_N_THREADS}, not {self.n_threads}")
        self._ptr = c.ggml_backend_dev_init(self.device.ptr(), NULL)
        if self._ptr == NULL:
            raise BackendError(f"device {self.device.name} cannot be initialised: {last_log()}")
        self._async = self.device.props["async"]
        pool_set = <pool_set_t> find(self.device._ptr, "ggml_backend_cpu_set_threadpool")
        if pool_set == NULL:
            if threadpool is not None:
                raise BackendError(f"device {self.device.name} has no use for a threadpool")
        else:
            if threadpool is not None and n_threads is not None:
                raise BackendError("n_threads are those of the threadpool: give one of them")
            self.threadpool = Threadpool(self.n_threads) if threadpool is None else threadpool
            self.n_threads = self.threadpool.n_threads
            pool_set(self._ptr, self.threadpool.ptr())
            self.depend_on(self.threadpool)
        cdef c.ggml_backend_set_n_threads_t set_threads = <c.ggml_backend_set_n_threads_t> find(
            self.device._ptr, "ggml_backend_set_n_threads")
        if set_threads != NULL:
            set_threads(self._ptr, self.n_threads)
        cdef c.ggml_backend_set_abort_callback_t set_abort = <c.ggml_backend_set_abort_callback_t> find(
            self.device._ptr, "ggml_backend_set_abort_callback")
        if set_abort != NULL:
            set_abort(self._ptr, _aborted, self._flags)

    def __del__(self):  # while what it uses is there
        if self._ptr != NULL and (self._pending or self._computed):
            self.synchronize()

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            c.ggml_backend_free(self._ptr)
            self._ptr = NULL

    cdef c.ggml_backend_t ptr(self) except NULL:
        if self._ptr == NULL:
            raise ClosedError("Backend is closed")
        return self._ptr

    @property
    def name(self):
        """Return its name.  Wraps: ggml_backend_name."""
        return (<bytes> c.ggml_backend_name(self.ptr())).decode()

    @property
    def abort_flag(self):
        """Whether computations stop, with ComputeAborted, at their next node; may be set from any thread."""
        return self._flags[0] != 0

    @abort_flag.setter
    def abort_flag(self, bint value):
        self._flags[0] = value

    cdef int check_queue(self, list owners) except -1:
        """Check that only work that is queued on this backend uses the owners."""
        cdef Owner owner
        for owner in owners:
            if owner._in_use > sum([1 for each in self._pending + self._computed if each is owner]):
                raise BusyError(f"{type(owner).__name__} is in use by a computation that has not ended")
        return 0

    cdef int queue(self, list owners, object export) except -1:
        """Keep the acquired owners in use, and the exported memory exported, until synchronize()."""
        if self._async:
            self._pending.extend(owners)
            self._exports.append(export)
        else:
            release(owners)
        return 0

    def synchronize(self):
        """Wait until all that was started here has ended, and let go of what it used.  Releases the GIL.

        Wraps: ggml_backend_synchronize.
        """
        cdef c.ggml_backend_t ptr = self.ptr()
        pending, self._pending = self._pending, []
        computed, self._computed = self._computed, []
        exports, self._exports = self._exports, []
        self._in_use += 1
        with nogil:
            c.ggml_backend_synchronize(ptr)
        self._in_use -= 1
        vacate(computed)
        release(pending)
        exports.clear()

    def set_async(self, Tensor tensor not None, data, size_t offset=0):
        """Start copying a contiguous buffer into the tensor's bytes at `offset`; it must not change before the end.

        Raises: as Tensor.set_data; BusyError if another thread uses the tensor or the backend.
        Wraps: ggml_backend_tensor_set_async.
        """
        self._transfer(tensor, memoryview(data), offset, True)

    def get_async(self, Tensor tensor not None, out, size_t offset=0):
        """Start copying the tensor's bytes from `offset` into the writable contiguous buffer `out`, and return it.

        Raises: as Tensor.get_data; BusyError if another thread uses the tensor or the backend.
        Wraps: ggml_backend_tensor_get_async.
        """
        self._transfer(tensor, memoryview(out), offset, False)
        return out

    cdef _transfer(self, Tensor tensor, export, size_t offset, bint into):
        cdef Py_buffer view
        cdef c.ggml_backend_t ptr = self.ptr()
        cdef c.ggml_tensor * t
        self.check_queue([tensor.ctx, self])
        PyObject_GetBuffer(export, &view, PyBUF_SIMPLE if into else PyBUF_WRITABLE)
        try:
            owners = acquire([tensor.ctx, self])
            try:
                t = tensor.range(offset, view.len)
                self._check_place(tensor, owners, into)
                with nogil:
                    if into:
                        c.ggml_backend_tensor_set_async(ptr, t, view.buf, offset, view.len)
                    else:
                        c.ggml_backend_tensor_get_async(ptr, t, view.buf, offset, view.len)
            except BaseException:
                release(owners)
                raise
            self.queue(owners, export)
        finally:
            PyBuffer_Release(&view)

    cdef int _check_place(self, Tensor tensor, list owners, bint into) except -1:
        """Check that the tensor is in memory of this device, and may be written if data goes into it."""
        cdef c.ggml_backend_buffer * buffer = tensor.buffer()
        if not c.ggml_backend_supports_buft(self._ptr, c.ggml_backend_buffer_get_type(buffer)):
            raise BackendError(f"{self.name} cannot reach the data of {tensor!r}")
        if into:
            tensor.check_writable(owners, self._computed)
        return 0

    def copy_async(self, Tensor src not None, Tensor dst not None, Backend backend_dst=None):
        """Start copying src, which this backend computes, to dst, of backend_dst, by default this one too.

        Raises: as Tensor.copy_from; BusyError if another thread uses a tensor or a backend.
        Wraps: ggml_backend_tensor_copy_async.
        """
        cdef Backend to = self if backend_dst is None else backend_dst
        cdef c.ggml_backend_t b_src = self.ptr(), b_dst = to.ptr()
        cdef c.ggml_tensor * s
        cdef c.ggml_tensor * d
        self.check_queue([src.ctx, dst.ctx, self])
        if to is not self:
            to.check_queue([to])
        owners = acquire([src.ctx, dst.ctx, self, to])
        try:
            s, d = src.range(0, 0), dst.range(0, 0)
            check_same_layout(src, dst)
            if s.buffer == NULL or d.buffer == NULL:  # a view that was not allocated: ggml's copy looks there
                raise ShapeError(f"copy_async: {src.name!r} or {dst.name!r} is a view that is in no allocated graph")
            self._check_place(src, owners, False)
            to._check_place(dst, owners, True)
            with nogil:
                c.ggml_backend_tensor_copy_async(b_src, b_dst, s, d)
        except BaseException:
            release(owners)
            raise
        to.queue(owners, None)

    def supports_op(self, Tensor op not None):
        """Return whether it can compute this node.  Wraps: ggml_backend_supports_op."""
        self.ptr()
        return self.device.supports_op(op)

    def supports_buft(self, BufferType buffer_type not None):
        """Return whether it can compute with data in such memory.  Wraps: ggml_backend_supports_buft."""
        return bool(c.ggml_backend_supports_buft(self.ptr(), buffer_type.ptr()))

    def offload_op(self, Tensor op not None):
        """Return whether it wants to compute this node though its weights are elsewhere.

        Wraps: ggml_backend_offload_op.
        """
        self.ptr()
        return self.device.offload_op(op)

    def __repr__(self):
        return "<Backend, closed>" if self._ptr == NULL else f"<Backend {self.name}, {self.n_threads} threads>"


cdef class Event(Owner):
    """Own a mark in a backend's stream, that other streams of its kind can wait for.

    Raises: BackendError if the device has no events (Device.props), as the CPU has none.
    Wraps: ggml_backend_event_new, ggml_backend_event_free.
    """

    def __cinit__(self, Device device not None):
        self.device = device
        if not device.props["events"]:
            raise BackendError(f"device {device.name} has no events")
        self._ptr = c.ggml_backend_event_new(device.ptr())
        if self._ptr == NULL:
            raise BackendError(f"device {device.name} cannot make an event: {last_log()}")

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            c.ggml_backend_event_free(self._ptr)
            self._ptr = NULL

    cdef c.ggml_backend_event_t ptr(self) except NULL:
        if self._ptr == NULL:
            raise ClosedError("Event is closed")
        return self._ptr

    def record(self, Backend backend not None):
        """Mark where the stream of `backend`, of the same device, is now.  Wraps: ggml_backend_event_record."""
        cdef c.ggml_backend_event_t ptr = self.ptr()
        if c.ggml_backend_dev_name(backend.device._ptr) != c.ggml_backend_dev_name(self.device._ptr):
            raise BackendError(f"record: {backend!r} is not of device {self.device.name}")
        c.ggml_backend_event_record(ptr, backend.ptr())

    def wait(self, Backend backend not None):
        """Let the stream of `backend` wait for the mark; Python goes on.  Wraps: ggml_backend_event_wait."""
        cdef c.ggml_backend_event_t ptr = self.ptr()
        if backend.device.backend_name != self.device.backend_name:
            raise BackendError(f"wait: {backend!r} is not of the kind of device {self.device.name}")
        c.ggml_backend_event_wait(backend.ptr(), ptr)

    def synchronize(self):
        """Wait for the mark.  Releases the GIL.  Wraps: ggml_backend_event_synchronize."""
        cdef c.ggml_backend_event_t ptr = self.ptr()
        self._in_use += 1
        with nogil:
            c.ggml_backend_event_synchronize(ptr)
        self._in_use -= 1


def ggml_version():
    """Return the version of ggml, as "0.25.3".  Wraps: ggml_version."""
    return (<bytes> c.ggml_version()).decode()
