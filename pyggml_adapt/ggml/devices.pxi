# Devices and the kinds of memory that they have; backend.pyx, whose Backend computes on them, includes this.

cdef object text(const char * s):
    """Return a C string, None if there is none."""
    return None if s == NULL else (<bytes> s).decode("utf-8", "replace")


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
    def by_name(str name not None):
        """Return the device with this name, as "CPU" or "CUDA0", None if there is none.

        Wraps: ggml_backend_dev_by_name.
        """
        cdef Device device = Device.__new__(Device)
        device._ptr = c.ggml_backend_dev_by_name(name_bytes(name))
        return None if device._ptr == NULL else device

    @staticmethod
    def load(path):
        """Load the backends in a shared library, or in every one of a folder, for the rest of the process.

        What the library does when it is loaded, it does here: load none that is not trusted.
        Raises: FileAccessError if there is no such file, BackendError if it has no backend of this version of ggml.
        Wraps: ggml_backend_load, ggml_backend_load_all_from_path.
        """
        cdef bytes name = os.fsencode(path)
        try:
            os.stat(path)
        except (OSError, ValueError) as exc:
            raise FileAccessError.of(path, exc) from exc
        if os.path.isdir(path):
            c.ggml_backend_load_all_from_path(name)
            return
        if c.ggml_backend_load(os.fsencode(os.path.abspath(path))) == NULL:
            raise BackendError(f"{os.fspath(path)}: no backend of ggml: {last_log()}")

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
    def props(self):
        """Return what it is and can do, by ggml's names: name, description, memory_free, memory_total (bytes),
        device_id, and whether it has async (computes while Python goes on), host_buffer, buffer_from_host_ptr, events,
        mmap_support.

        Wraps: ggml_backend_dev_get_props.
        """
        cdef c.ggml_backend_dev_props props
        c.ggml_backend_dev_get_props(self.ptr(), &props)
        caps = props.caps
        return {
            "name": text(props.name), "description": text(props.description), "device_id": text(props.device_id),
            "memory_free": props.memory_free, "memory_total": props.memory_total, "async": bool(caps.async_),
            "host_buffer": bool(caps.host_buffer), "buffer_from_host_ptr": bool(caps.buffer_from_host_ptr),
            "events": bool(caps.events), "mmap_support": bool(caps.mmap_support),
        }

    def supports_op(self, Tensor op not None):
        """Return whether it can compute this node.  Wraps: ggml_backend_dev_supports_op."""
        reach([op.ctx])
        point_operands(op.ptr())
        return bool(c.ggml_backend_dev_supports_op(self.ptr(), op.ptr()))

    def supports_buft(self, BufferType buffer_type not None):
        """Return whether it can compute with data in such memory.  Wraps: ggml_backend_dev_supports_buft."""
        return bool(c.ggml_backend_dev_supports_buft(self.ptr(), buffer_type.ptr()))

    def offload_op(self, Tensor op not None):
        """Return whether the node is large enough to be worth the copying of weights that are elsewhere.

        Wraps: ggml_backend_dev_offload_op.
        """
        reach([op.ctx])
        point_operands(op.ptr())
        return bool(c.ggml_backend_dev_offload_op(self.ptr(), op.ptr()))

    @property
    def host_buffer_type(self):
        """Return memory of the CPU that it copies from and to quickly, None if it has no such.

        Wraps: ggml_backend_dev_host_buffer_type.
        """
        cdef BufferType buft = BufferType.__new__(BufferType)
        buft._ptr = c.ggml_backend_dev_host_buffer_type(self.ptr())
        return None if buft._ptr == NULL else buft

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

    @property
    def max_size(self):
        """Return the most bytes that one buffer can have.  Wraps: ggml_backend_buft_get_max_size."""
        return c.ggml_backend_buft_get_max_size(self.ptr())

    def alloc_size(self, Tensor tensor not None):
        """Return the bytes that the tensor needs in such memory.  Wraps: ggml_backend_buft_get_alloc_size."""
        return c.ggml_backend_buft_get_alloc_size(self.ptr(), tensor.ptr())

    @property
    def device(self):
        """Return the device whose memory it is, None if it is none's.  Wraps: ggml_backend_buft_get_device."""
        cdef Device device = Device.__new__(Device)
        device._ptr = c.ggml_backend_buft_get_device(self.ptr())
        return None if device._ptr == NULL else device

    def __repr__(self):
        return f"<BufferType {self.name}>"
