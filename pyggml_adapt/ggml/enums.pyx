"""ggml's enumerations, with values and names taken from the library itself."""

from enum import IntEnum

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libggml as c


def _type_members():
    for value in range(c.GGML_TYPE_COUNT):
        name = c.ggml_type_name(<c.ggml_type> value)
        if name != NULL and c.ggml_blck_size(<c.ggml_type> value) > 0:  # 0: a type that ggml has removed
            yield (<bytes> name).decode().upper(), value


class _TypeTraits:
    """Mixed into Type: the traits of a tensor type."""

    @property
    def blck_size(self):
        """Return the number of elements in one block.  Wraps: ggml_blck_size."""
        return c.ggml_blck_size(<c.ggml_type> <int> self.value)

    @property
    def type_size(self):
        """Return the number of bytes in one block.  Wraps: ggml_type_size."""
        return c.ggml_type_size(<c.ggml_type> <int> self.value)

    @property
    def is_quantized(self):
        """Return whether the type stores blocks of quantised values.  Wraps: ggml_is_quantized."""
        return bool(c.ggml_is_quantized(<c.ggml_type> <int> self.value))

    def row_size(self, int64_t ne0):
        """Return the bytes of a row of ne0 elements, which must be a multiple of blck_size.  Wraps: ggml_row_size."""
        if ne0 % self.blck_size:
            raise ValueError(f"a row of {ne0} elements is not a multiple of {self.name}'s block of {self.blck_size}")
        return c.ggml_row_size(<c.ggml_type> <int> self.value, ne0)


class _Type(_TypeTraits, IntEnum):
    pass


Type = _Type("Type", dict(_type_members()), module=__name__, qualname="Type")
Type.__doc__ = "The type of a tensor's elements: F32, F16, Q8_0, Q4_K, ...  Wraps: ggml_type."


class Status(IntEnum):
    """What a computation returned.  Wraps: ggml_status."""

    ALLOC_FAILED = c.GGML_STATUS_ALLOC_FAILED
    FAILED = c.GGML_STATUS_FAILED
    SUCCESS = c.GGML_STATUS_SUCCESS
    ABORTED = c.GGML_STATUS_ABORTED


class RopeType(IntEnum):
    """Which pairs of a head's elements rope rotates together.  Wraps: GGML_ROPE_TYPE_*."""

    NORMAL = c.GGML_ROPE_TYPE_NORMAL
    NEOX = c.GGML_ROPE_TYPE_NEOX
    MROPE = c.GGML_ROPE_TYPE_MROPE
    VISION = c.GGML_ROPE_TYPE_VISION
    IMROPE = c.GGML_ROPE_TYPE_IMROPE


class DeviceType(IntEnum):
    """What kind of device a backend runs on.  Wraps: ggml_backend_dev_type."""

    CPU = c.GGML_BACKEND_DEVICE_TYPE_CPU
    GPU = c.GGML_BACKEND_DEVICE_TYPE_GPU
    IGPU = c.GGML_BACKEND_DEVICE_TYPE_IGPU
    ACCEL = c.GGML_BACKEND_DEVICE_TYPE_ACCEL
    META = c.GGML_BACKEND_DEVICE_TYPE_META
