from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ParameterError, ShapeError
from pyggml_adapt.ggml import Type, dequantize, quantize
from pyggml_adapt.ggml.quants import validate

X = np.random.default_rng(3).standard_normal((2, 512), dtype=np.float32)
NEED_IMATRIX = {Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS}
# normalised mean squared error on normal numbers: about 1.5 times the worst type's
BOUNDS = {"F32": 0, "F16": 1e-7, "BF16": 4e-6, 8: 4e-5, 6: 5e-4, 5: 3e-3, 4: 2e-2, 3: 5e-2, 2: 0.8, 1: 0.8}
SLOW = {Type.IQ1_S, Type.IQ1_M, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS}  # ggml makes tables of them, for seconds
QUANTISED = [type for type in Type if type.is_quantized and type not in (Type.Q8_1, Type.Q8_K)]


@pytest.mark.parametrize(
    "type",
    [
        pytest.param(type, id=type.name, marks=[pytest.mark.slow] if type in SLOW else [])
        for type in (Type.F32, Type.F16, Type.BF16, *QUANTISED)
    ],
)
def test_round_trip(type):
    imatrix = np.ones(512, "f") if type in NEED_IMATRIX else None
    data = quantize(X, type, imatrix)
    assert (data.dtype, data.shape) == (np.uint8, (2 * type.row_size(512),))
    back = dequantize(data, type, 512)
    assert (back.dtype, back.shape) == (np.float32, (2, 512))
    bits = next(int(char) for char in type.name if char.isdigit())  # Q4_K has 4
    assert ((back - X) ** 2).mean() / (X**2).mean() <= BOUNDS[bits if type.is_quantized else type.name]
    np.testing.assert_array_equal(quantize(X[1:], type, imatrix), data[type.row_size(512) :])


def test_halves_are_numpys():
    np.testing.assert_array_equal(quantize(X, Type.F16).view("e"), X.astype("e").ravel())
    np.testing.assert_array_equal(dequantize(X.astype("e"), Type.F16, 512), X.astype("e").astype("f"))
    np.testing.assert_array_equal(dequantize(X.tobytes(), Type.F32, 512), X)


# MXFP4 by the OCP's Microscaling Formats 1.0: 32 elements E2M1 with one scale E8M0; ggml keeps the first half of a
# block in the low four bits.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], "f")
E2M1 = np.concatenate([E2M1, -E2M1])


def mxfp4_decoded(data):
    """Return the numbers [n_blocks, 32] of bytes [n_blocks, 17]."""
    codes = np.concatenate([data[:, 1:] & 15, data[:, 1:] >> 4], axis=1)
    return E2M1[codes] * np.ldexp(np.float32(1), data[:, :1].astype("i") - 127)


def mxfp4_encoded(blocks):
    """Return the bytes [n_blocks, 17] of numbers [n_blocks, 32]: the largest one's binade decides on the scale."""
    exponent = np.floor(np.log2(np.abs(blocks).max(axis=1, keepdims=True))).astype("i") - 2
    codes = np.abs(E2M1 - np.ldexp(blocks, -exponent)[..., None]).argmin(axis=-1)
    return np.concatenate([exponent + 127, codes[:, :16] | codes[:, 16:] << 4], axis=1).astype(np.uint8)


def test_mxfp4_is_the_standards():
    assert (Type.MXFP4.blck_size, Type.MXFP4.type_size, Type.MXFP4.row_size(64)) == (32, 17, 34)
    data = np.random.default_rng(1).integers(0, 256, (253, 17), dtype=np.uint8)
    data[:, 0] = range(253)  # 255 is NaN, and below it six times the scale is more than F32 holds
    np.testing.assert_array_equal(dequantize(data, Type.MXFP4, 32), mxfp4_decoded(data))
    blocks = X.reshape(-1, 32) * 10.0 ** np.arange(-23, 9, dtype="f")[:, None]
    blocks[3, 5] = 0
    stored = quantize(blocks, Type.MXFP4)
    np.testing.assert_array_equal(stored.reshape(-1, 17), mxfp4_encoded(blocks))
    assert validate(stored, Type.MXFP4)
    assert (dequantize(quantize(np.zeros(32), Type.MXFP4), Type.MXFP4, 32) == 0).all()
    # what was stored is kept by another conversion: no code and no scale can change
    np.testing.assert_array_equal(quantize(mxfp4_decoded(mxfp4_encoded(blocks)), Type.MXFP4), stored)


def test_an_imatrix_is_used():
    weights = np.random.default_rng(0).random(512) ** 4
    plain, weighted = (dequantize(quantize(X, Type.Q4_K, each), Type.Q4_K, 512) for each in (np.ones(512), weights))
    assert not np.array_equal(plain, weighted)


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((np.empty((0, 32)), Type.Q8_0), ShapeError, "quantize: an array of shape (0, 32) has no rows"),
        ((1.0, Type.Q8_0), ShapeError, "quantize: rows of 1 elements are not a multiple of Q8_0's block size"),
        ((X[:, :33], Type.Q8_0), ShapeError, "quantize: rows of 33 elements are not a multiple of Q8_0's block size"),
        ((X, Type.I32), DTypeError, "quantize: ggml does not convert to I32"),
        ((X, Type.Q8_1), DTypeError, "quantize: ggml does not convert to Q8_1"),
        ((X, Type.Q8_K), DTypeError, "quantize: ggml does not convert to Q8_K"),
        ((X, Type.IQ2_XXS), DTypeError, "quantize: IQ2_XXS needs an imatrix"),
        (
            (X * np.float32("nan"), Type.Q4_K),
            ParameterError,
            "quantize: the array has numbers that are not from -1e+10 to 1e+10",
        ),
        (
            (X * np.float32(1e20), Type.Q4_K),
            ParameterError,
            "quantize: the array has numbers that are not from -1e+10 to 1e+10",
        ),
        (
            (X, Type.Q4_K, np.full(512, -1)),
            ParameterError,
            "quantize: the imatrix has numbers that are not from 0 to 1e+10",
        ),
        ((X, Type.Q4_K, np.ones(511)), ShapeError, "quantize: an imatrix of 511 columns for rows of 512"),
    ],
)
def test_quantize_preconditions(args, error, message):
    with pytest.raises(error) as caught:
        quantize(*args)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((b"", Type.F32, 4), ShapeError, "dequantize: 0 bytes are not whole rows of 16 bytes"),
        ((bytes(17), Type.F32, 4), ShapeError, "dequantize: 17 bytes are not whole rows of 16 bytes"),
        (
            (bytes(34), Type.Q8_0, 31),
            ShapeError,
            "dequantize: rows of 31 elements are not a multiple of Q8_0's block size",
        ),
        (
            (bytes(34), Type.Q8_0, 0),
            ShapeError,
            "dequantize: rows of 0 elements are not a multiple of Q8_0's block size",
        ),
        ((bytes(36), Type.Q8_1, 32), DTypeError, "dequantize: ggml does not convert from Q8_1"),
        ((bytes(4), Type.I32, 1), DTypeError, "dequantize: ggml does not convert from I32"),
    ],
)
def test_dequantize_preconditions(args, error, message):
    with pytest.raises(error) as caught:
        dequantize(*args)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "names",
    [
        [type.name for type in QUANTISED if type not in SLOW],
        pytest.param([type.name for type in SLOW], marks=pytest.mark.slow),
    ],
    ids=["quick", "slow"],
)
def test_any_values(python, names):
    """In a process of its own: no array may end it."""
    python(f"types = [Type[name] for name in {names}]\n" + ANY_VALUES)


ANY_VALUES = """
rng = np.random.default_rng(0)
normal = rng.standard_normal(256).astype("f")
for t in types:
    for special in (0, 1e-45, -1e-38, 1e10, -1e10, 3e38, np.inf, np.nan):
        rows = [np.full(256, special, "f"), np.where(rng.random(256) < 0.1, np.float32(special), normal)]
        for row in rows:
            for weight in (0, 1, 1e10, np.nan, -1):
                try:
                    dequantize(quantize(row, t, np.full(256, weight, "f")), t, 256)
                except ParameterError:
                    pass
    dequantize(rng.integers(0, 256, 64 * t.row_size(256), dtype=np.uint8), t, 256)
"""


@pytest.mark.parametrize("type", [type for type in Type if type != Type.Q8_1], ids=lambda type: type.name)
def test_numbers_that_are_not_finite_are_found(type, capfd):
    assert validate(bytes(4 * type.type_size), type) is True
    if type.name in ("I8", "I16", "I32", "I64", "NVFP4"):  # every byte is a number there
        assert validate(b"\xff" * type.type_size, type) is True
    else:
        assert validate(bytes(3 * type.type_size) + b"\xff" * type.type_size, type) is False
        assert capfd.readouterr().err.startswith("ggml_validate_row_data: ")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype, type", [("f4", Type.F32), ("f2", Type.F16), ("f8", Type.F64)])
def test_each_place_is_looked_at(dtype, type, number):
    for i in range(40):
        values = np.ones(40, dtype)
        values[i] = number
        assert validate(values, type) is False


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((b"", Type.F32), ShapeError, "validate: 0 bytes are not whole blocks of 4 bytes"),
        ((bytes(33), Type.Q8_0), ShapeError, "validate: 33 bytes are not whole blocks of 34 bytes"),
        ((bytes(36), Type.Q8_1), DTypeError, "validate: ggml does not look into Q8_1"),
    ],
)
def test_validate_preconditions(args, error, message):
    with pytest.raises(error) as caught:
        validate(*args)
    assert str(caught.value) == message
