"""Devices, the memory that they own, and the backends that compute on them."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport Owner, Tensor

import os

from pyggml_adapt.errors import AllocError, BackendError, ClosedError, ShapeError
from pyggml_adapt.ggml.enums import DeviceType
from pyggml_adapt.ggml.status import last_log

MAX_THREADS = c.GGML_MAX_N_THREADS
cdef size_t MAX_NBYTES = <size_t> 1 << 60  # of a buffer: ggml adds an alignment without looking for overflow


cdef class Device:
    """Borrow a device that ggml's registry lists; devices live as long as the process."""

    def __init__(self):
        raise TypeError("devices come from Device.all() and Device.cpu()")

    cdef c.ggml_backend_dev_t ptr(self) except NULL:
        if self._ptr == NULL:  # made by Device.__new__
            raise ClosedError("this Device is none of ggml's")
        return self._ptr

    @staticmethod
    def all():
        """Return the devices of every backend that is compiled in and present.  Wraps: ggml_backend_dev_get."""
        cdef Device device
        found = []
        for i in range(c.ggml_backend_dev_count()):
            device = Device.__new__(Device)
            device._ptr = c.ggml_backend_dev_get(i)
            found.append(device)
        return found

    @staticmethod
    def backends():
        """Return the names of the backends that are compiled in.  Wraps: ggml_backend_reg_get."""
        return [(<bytes> c.ggml_backend_reg_name(c.ggml_backend_reg_get(i))).decode()
                for i in range(c.ggml_backend_reg_count())]

    @staticmethod
    def cpu():
        """Return the CPU device.

        Raises: BackendError if ggml was built without its CPU backend.
        """
        for device in Device.all():
            if device.type == DeviceType.CPU:
                return device
        raise BackendError("this build of ggml has no CPU backend")

    @property
    def name(self):
        """Return the short name, as "CPU" or "CUDA0".  Wraps: ggml_backend_dev_name."""
        return (<bytes> c.ggml_backend_dev_name(self.ptr())).decode()

    @property
    def description(self):
        """Return the name of the hardware.  Wraps: ggml_backend_dev_description."""
        return (<bytes> c.ggml_backend_dev_description(self.ptr())).decode("utf-8", "replace")

    @property
    def type(self):
        """Return what kind of device it is.  Wraps: ggml_backend_dev_type."""
        return DeviceType(<int> c.ggml_backend_dev_get_type(self.ptr()))

    @property
    def backend_name(self):
        """Return the name of the backend that drives it, as "CPU" or "CUDA".  Wraps: ggml_backend_reg_name."""
        return (<bytes> c.ggml_backend_reg_name(c.ggml_backend_dev_backend_reg(self.ptr()))).decode()

    @property
    def memory(self):
        """Return (free, total) bytes of device memory.  Wraps: ggml_backend_dev_memory."""
        cdef size_t free = 0, total = 0
        c.ggml_backend_dev_memory(self.ptr(), &free, &total)
        return free, total

    @property
    def features(self):
        """Return what the backend was compiled to use, as {"AVX2": "1", ...}.  Wraps: ggml_backend_get_features."""
        cdef c.ggml_backend_reg_t reg = c.ggml_backend_dev_backend_reg(self.ptr())
        cdef c.ggml_backend_get_features_t get = <c.ggml_backend_get_features_t> c.ggml_backend_reg_get_proc_address(
            reg, "ggml_backend_get_features")
        found = {}
        if get == NULL:
            return found
        cdef c.ggml_backend_feature * feature = get(reg)
        while feature.name != NULL:
            found[(<bytes> feature.name).decode()] = (<bytes> feature.value).decode()
            feature += 1
        return found

    @property
    def buffer_type(self):
        """Return the device's own kind of memory.  Wraps: ggml_backend_dev_buffer_type."""
        cdef BufferType buft = BufferType.__new__(BufferType)
        buft._ptr = c.ggml_backend_dev_buffer_type(self.ptr())
        return buft

    def __repr__(self):
        return f"<Device {self.name} {self.description!r}>"


cdef class BufferType:
    """Borrow a kind of memory."""

    def __init__(self):
        raise TypeError("buffer types come from Device.buffer_type")

    cdef c.ggml_backend_buffer_type_t ptr(self) except NULL:
        if self._ptr == NULL:  # made by BufferType.__new__
            raise ClosedError("this BufferType is none of ggml's")
        return self._ptr

    @property
    def name(self):
        """Return its name.  Wraps: ggml_backend_buft_name."""
        return (<bytes> c.ggml_backend_buft_name(self.ptr())).decode()

    @property
    def alignment(self):
        """Return the bytes that a tensor's start is a multiple of.  Wraps: ggml_backend_buft_get_alignment."""
        return c.ggml_backend_buft_get_alignment(self.ptr())

    @property
    def is_host(self):
        """Return whether the CPU can address it.  Wraps: ggml_backend_buft_is_host."""
        return bool(c.ggml_backend_buft_is_host(self.ptr()))

    def __repr__(self):
        return f"<BufferType {self.name}>"


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
        Raises: ShapeError if its address is not a multiple of the CPU's alignment.
        """
        cdef Buffer self = Buffer.__new__(Buffer)
        cdef size_t alignment = Device.cpu().buffer_type.alignment
        PyObject_GetBuffer(mapping, &self._mapping, PyBUF_SIMPLE)
        self._mapped = True
        if <size_t> self._mapping.buf % alignment:
            raise ShapeError(f"from_mapping: the address is not a multiple of {alignment} bytes")
        self._ptr = c.ggml_backend_cpu_buffer_from_ptr(self._mapping.buf, self._mapping.len)
        if self._ptr == NULL:
            raise AllocError("ggml_backend_cpu_buffer_from_ptr failed")
        c.ggml_backend_buffer_set_usage(self._ptr, c.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        return self

    @property
    def nbytes(self):
        """Return the size in bytes.  Wraps: ggml_backend_buffer_get_size."""
        return c.ggml_backend_buffer_get_size(self.ptr())

    def place(self, Tensor tensor not None, size_t offset):
        """Let the tensor's data be the bytes from `offset` on; its Context then keeps this buffer alive.

        Raises: ShapeError if it does not fit, is a view, or has data already.
        Wraps: ggml_backend_tensor_alloc.
        """
        cdef c.ggml_backend_buffer_t ptr = self.ptr()
        cdef c.ggml_tensor * t = tensor.ptr()
        if t.data != NULL or t.buffer != NULL or t.view_src != NULL:
            raise ShapeError(f"place: tensor {tensor.name!r} has data already, or is a view")
        cdef size_t need = c.ggml_backend_buffer_get_alloc_size(ptr, t)
        cdef size_t size = c.ggml_backend_buffer_get_size(ptr)
        if offset > size or need > size - offset:
            raise ShapeError(f"place: tensor {tensor.name!r} needs {need} bytes at {offset} of a buffer of {size}")
        cdef char * base = <char *> c.ggml_backend_buffer_get_base(ptr)
        if c.ggml_backend_tensor_alloc(ptr, t, base + offset) != c.GGML_STATUS_SUCCESS:
            raise AllocError(f"place: {last_log()}")
        tensor.ctx.depend_on(self)

    def __repr__(self):
        return "<Buffer, closed>" if self._ptr == NULL else f"<Buffer of {self.nbytes} bytes>"


cdef c.bool _aborted(void * flag) noexcept nogil:
    return (<int *> flag)[0] != 0


ctypedef c.ggml_threadpool * (*pool_new_t)(c.ggml_threadpool_params *) noexcept nogil
ctypedef void (*pool_free_t)(c.ggml_threadpool *) noexcept nogil
ctypedef void (*pool_set_t)(c.ggml_backend_t, c.ggml_threadpool *) noexcept nogil


cdef void * find(c.ggml_backend_dev_t device, const char * name) noexcept:
    return c.ggml_backend_reg_get_proc_address(c.ggml_backend_dev_backend_reg(device), name)


cdef class Backend(Owner):
    """Own a stream of computations on a device; a CPU backend owns a threadpool that lives as long as it does.

    device: the CPU's if None.  n_threads: threads of a CPU backend, by default as many as this process may run on.
    Raises: BackendError if the device cannot be initialised or n_threads is not 1 to 512.
    Wraps: ggml_backend_dev_init, ggml_backend_set_n_threads, ggml_threadpool_new, ggml_backend_free.
    """

    def __cinit__(self, Device device=None, n_threads=None):
        self.device = Device.cpu() if device is None else device
        self.n_threads = default_n_threads() if n_threads is None else n_threads
        if not 1 <= self.n_threads <= c.GGML_MAX_N_THREADS:
            raise BackendError(f"n_threads must be 1 to {c.GGML_MAX_N_THREADS}, not {self.n_threads}")
        self._ptr = c.ggml_backend_dev_init(self.device.ptr(), NULL)
        if self._ptr == NULL:
            raise BackendError(f"device {self.device.name} cannot be initialised: {last_log()}")
        cdef c.ggml_backend_set_n_threads_t set_threads = <c.ggml_backend_set_n_threads_t> find(
            self.device._ptr, "ggml_backend_set_n_threads")
        if set_threads != NULL:
            set_threads(self._ptr, self.n_threads)
        cdef c.ggml_backend_set_abort_callback_t set_abort = <c.ggml_backend_set_abort_callback_t> find(
            self.device._ptr, "ggml_backend_set_abort_callback")
        if set_abort != NULL:
            set_abort(self._ptr, _aborted, &self._abort)
        self._start_pool()

    cdef int _start_pool(self) except -1:
        cdef pool_new_t pool_new = <pool_new_t> find(self.device._ptr, "ggml_threadpool_new")
        cdef pool_set_t pool_set = <pool_set_t> find(self.device._ptr, "ggml_backend_cpu_set_threadpool")
        self._pool_free = <pool_free_t> find(self.device._ptr, "ggml_threadpool_free")
        if pool_new == NULL or pool_set == NULL or self._pool_free == NULL:
            return 0  # not a CPU backend
        cdef c.ggml_threadpool_params params = c.ggml_threadpool_params_default(self.n_threads)
        self._pool = pool_new(&params)
        if self._pool == NULL:
            raise BackendError(f"cannot start a threadpool of {self.n_threads} threads")
        pool_set(self._ptr, self._pool)
        return 0

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            c.ggml_backend_free(self._ptr)
            self._ptr = NULL
        if self._pool != NULL:
            with nogil:
                self._pool_free(self._pool)
            self._pool = NULL

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
        return self._abort != 0

    @abort_flag.setter
    def abort_flag(self, bint value):
        self._abort = value

    def __repr__(self):
        return "<Backend, closed>" if self._ptr == NULL else f"<Backend {self.name}, {self.n_threads} threads>"


def ggml_version():
    """Return the version of ggml, as "0.25.3".  Wraps: ggml_version."""
    return (<bytes> c.ggml_version()).decode()


def default_n_threads():
    """Return the number of processors that this process may run on."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
               c.GGML_MAX_N_THREADS)
