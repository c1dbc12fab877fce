"""ggml's enumerations, with values and names taken from the library itself."""

from enum import IntEnum

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c

cdef int64_t MAX_ROW = <int64_t> 1 << 42  # elements: as many as a tensor can have, see context.pxd


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
        """Return the bytes of a row of ne0 elements, which must be a multiple of blck_size.

        Raises: ValueError if it is not, or if no tensor can have such rows.  Wraps: ggml_row_size.
        """
        if not 0 <= ne0 <= MAX_ROW:
            raise ValueError(f"a row of {ne0} elements is not one of 0 to {MAX_ROW}")
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


class UnaryOp(IntEnum):
    """Which function ops.unary applies to each element.  Wraps: ggml_unary_op."""

    ABS = c.GGML_UNARY_OP_ABS
    SGN = c.GGML_UNARY_OP_SGN
    NEG = c.GGML_UNARY_OP_NEG
    STEP = c.GGML_UNARY_OP_STEP
    TANH = c.GGML_UNARY_OP_TANH
    ELU = c.GGML_UNARY_OP_ELU
    RELU = c.GGML_UNARY_OP_RELU
    SIGMOID = c.GGML_UNARY_OP_SIGMOID
    GELU = c.GGML_UNARY_OP_GELU
    GELU_QUICK = c.GGML_UNARY_OP_GELU_QUICK
    SILU = c.GGML_UNARY_OP_SILU
    HARDSWISH = c.GGML_UNARY_OP_HARDSWISH
    HARDSIGMOID = c.GGML_UNARY_OP_HARDSIGMOID
    EXP = c.GGML_UNARY_OP_EXP
    EXPM1 = c.GGML_UNARY_OP_EXPM1
    SOFTPLUS = c.GGML_UNARY_OP_SOFTPLUS
    GELU_ERF = c.GGML_UNARY_OP_GELU_ERF
    XIELU = c.GGML_UNARY_OP_XIELU
    FLOOR = c.GGML_UNARY_OP_FLOOR
    CEIL = c.GGML_UNARY_OP_CEIL
    ROUND = c.GGML_UNARY_OP_ROUND
    TRUNC = c.GGML_UNARY_OP_TRUNC


class GluOp(IntEnum):
    """Which gated activation ops.glu computes.  Wraps: ggml_glu_op."""

    REGLU = c.GGML_GLU_OP_REGLU
    GEGLU = c.GGML_GLU_OP_GEGLU
    SWIGLU = c.GGML_GLU_OP_SWIGLU
    SWIGLU_OAI = c.GGML_GLU_OP_SWIGLU_OAI
    GEGLU_ERF = c.GGML_GLU_OP_GEGLU_ERF
    GEGLU_QUICK = c.GGML_GLU_OP_GEGLU_QUICK
    SWIGLU_CLAMP = c.GGML_GLU_OP_SWIGLU_CLAMP


class OpPool(IntEnum):
    """How pooling makes one element of several.  Wraps: ggml_op_pool."""

    MAX = c.GGML_OP_POOL_MAX
    AVG = c.GGML_OP_POOL_AVG


class ScaleMode(IntEnum):
    """How upscaling finds the elements between.  Wraps: ggml_scale_mode."""

    NEAREST = c.GGML_SCALE_MODE_NEAREST
    BILINEAR = c.GGML_SCALE_MODE_BILINEAR
    BICUBIC = c.GGML_SCALE_MODE_BICUBIC


class ScaleFlag(IntEnum):
    """What ops.interpolate takes beside a ScaleMode, added to it.  Wraps: ggml_scale_flag."""

    ALIGN_CORNERS = c.GGML_SCALE_FLAG_ALIGN_CORNERS
    ANTIALIAS = c.GGML_SCALE_FLAG_ANTIALIAS


class TriType(IntEnum):
    """Which triangle of a matrix ops.tri keeps.  Wraps: ggml_tri_type."""

    UPPER_DIAG = c.GGML_TRI_TYPE_UPPER_DIAG
    UPPER = c.GGML_TRI_TYPE_UPPER
    LOWER_DIAG = c.GGML_TRI_TYPE_LOWER_DIAG
    LOWER = c.GGML_TRI_TYPE_LOWER


class SortOrder(IntEnum):
    """Which elements come first when sorted.  Wraps: ggml_sort_order."""

    ASC = c.GGML_SORT_ORDER_ASC
    DESC = c.GGML_SORT_ORDER_DESC


class SchedPriority(IntEnum):
    """How urgent the threads of a Threadpool are.  Wraps: ggml_sched_priority."""

    LOW = c.GGML_SCHED_PRIO_LOW
    NORMAL = c.GGML_SCHED_PRIO_NORMAL
    MEDIUM = c.GGML_SCHED_PRIO_MEDIUM
    HIGH = c.GGML_SCHED_PRIO_HIGH
    REALTIME = c.GGML_SCHED_PRIO_REALTIME


class BufferUsage(IntEnum):
    """What a Buffer holds: a Sched computes where the weights are.  Wraps: ggml_backend_buffer_usage."""

    ANY = c.GGML_BACKEND_BUFFER_USAGE_ANY
    WEIGHTS = c.GGML_BACKEND_BUFFER_USAGE_WEIGHTS
    COMPUTE = c.GGML_BACKEND_BUFFER_USAGE_COMPUTE


class Prec(IntEnum):
    """How precisely a matrix product is accumulated, at least.  Wraps: ggml_prec."""

    UNDEFINED = c.GGML_PREC_UNDEFINED
    F32 = c.GGML_PREC_F32
    BF16 = c.GGML_PREC_BF16
    F16 = c.GGML_PREC_F16
    Q8 = c.GGML_PREC_Q8
    Q4 = c.GGML_PREC_Q4


class OpHint(IntEnum):
    """What ops.mul_mat_set_hint says of a matrix product.  Wraps: ggml_op_hint."""

    NONE = c.GGML_HINT_NONE
    SRC0_IS_HADAMARD = c.GGML_HINT_SRC0_IS_HADAMARD
