from __future__ import annotations

import pytest

from pyggml_adapt.ggml import BufferUsage, DeviceType, RopeType, SchedPriority, Status, Type


def test_types_have_ggmls_values():
    """GGUF files carry these numbers."""
    assert (Type.F32, Type.F16, Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.I32, Type.BF16) == (0, 1, 2, 8, 12, 26, 30)
    assert Type(30) is Type.BF16
    assert Type["Q4_K"] is Type.Q4_K
    assert 4 not in set(Type)  # removed by ggml


@pytest.mark.parametrize("value", [-1, 4, 31, 999])
def test_unknown_type(value):
    with pytest.raises(ValueError, match=rf"^{value} is not a valid Type$"):
        Type(value)


def test_type_traits():
    assert (Type.F32.blck_size, Type.F32.type_size, Type.F32.is_quantized) == (1, 4, False)
    assert (Type.Q8_0.blck_size, Type.Q8_0.type_size, Type.Q8_0.is_quantized) == (32, 34, True)
    assert Type.Q4_K.row_size(512) == 2 * 144
    assert all(type.blck_size >= 1 and type.type_size >= 1 for type in Type)


def test_row_size_of_half_a_block():
    with pytest.raises(ValueError, match=r"^a row of 33 elements is not a multiple of Q8_0's block of 32$"):
        Type.Q8_0.row_size(33)


def test_other_enums():
    assert Status.SUCCESS == 0
    assert (RopeType.NORMAL, RopeType.NEOX) == (0, 2)
    assert DeviceType.CPU == 0
    assert (SchedPriority.NORMAL, SchedPriority.LOW) == (0, -1)
    assert BufferUsage.WEIGHTS == 1


@pytest.mark.parametrize("ne0", [-32, 1 << 43, 1 << 62])
def test_row_size_of_no_row(ne0):
    with pytest.raises(ValueError, match=rf"^a row of {ne0} elements is not one of 0 to {1 << 42}$"):
        Type.Q8_0.row_size(ne0)
