from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ParameterError, ShapeError
from pyggml_adapt.ggml import Type, dequantize, quantize
from pyggml_adapt.ggml.quants import validate

X = np.random.default_rng(3).standard_normal((2, 512), dtype=np.float32)
NEED_IMATRIX = {Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS}
# Published bounds of sqrt(sum of squared errors) / n on the array below, n = 4096: llama.cpp's
# tests/test-quantize-fns.cpp.  It has none for the types that need an imatrix and for IQ1_M: theirs are twice what
# 2 bits have.
BOUNDS = {
    Type.Q1_0: 0.025, Type.TQ1_0: 0.01, Type.TQ2_0: 0.01, Type.Q2_0: 0.01, Type.Q2_K: 0.0075, Type.IQ2_S: 0.0075,
    Type.Q3_K: 0.004, Type.IQ3_S: 0.004, Type.IQ3_XXS: 0.005, Type.NVFP4: 0.003,
    Type.IQ1_S: 0.015, Type.IQ1_M: 0.015, Type.IQ2_XXS: 0.015, Type.IQ2_XS: 0.015,
    Type.F32: 1e-9, Type.F16: 1e-5, Type.BF16: 1e-4,  # half a unit in the last place of numbers up to 2.1
}  # fmt: skip
OTHERS = 0.002
WAVE = 0.1 + 2 * np.cos(np.arange(4096, dtype=np.float32)).reshape(8, 512)
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
    data = quantize(WAVE, type, imatrix)
    assert (data.dtype, data.shape) == (np.uint8, (8 * type.row_size(512),))
    back = dequantize(data, type, 512)
    assert (back.dtype, back.shape) == (np.float32, (8, 512))
    assert np.sqrt(((back - WAVE).astype("d") ** 2).sum()) / WAVE.size < BOUNDS.get(type, OTHERS)
    np.testing.assert_array_equal(quantize(WAVE[1:], type, imatrix), data[type.row_size(512) :])


PLAIN = {Type.F32: "f", Type.F64: "d", Type.I8: "b", Type.I16: "h", Type.I32: "i", Type.I64: "q"}


@pytest.mark.parametrize("type", PLAIN, ids=lambda type: type.name)
def test_numpys_own_types(type):
    values = np.array([[0, 1, -128], [127, 5, 6]], PLAIN[type])
    data = quantize(values, type)
    assert data.tobytes() == values.tobytes()
    back = dequantize(data, type, 3)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)
    np.testing.assert_array_equal(quantize(values.astype("d")[::-1], type).view(values.dtype), values[::-1].ravel())


@pytest.mark.parametrize(
    "values, type",
    [([0.5], Type.I32), ([128], Type.I8), ([np.nan], Type.I64), ([2.0**63], Type.I64), ([-1e300], Type.I16)],
)
def test_numbers_of_integer_types_are_not_rounded(values, type):
    with pytest.raises(ParameterError, match=f"quantize: the array has numbers that are none of {type.name}"):
        quantize(values, type)


def test_activations_are_read():
    q = np.arange(-16, 16, dtype=np.int8)
    np.testing.assert_array_equal(dequantize(np.float16([0.5, 9]).tobytes() + q.tobytes(), Type.Q8_1, 32), [q * 0.5])
    q = np.arange(-128, 128, dtype=np.int8)
    block = np.float32(0.25).tobytes() + q.tobytes() + bytes(32)
    np.testing.assert_array_equal(dequantize(block * 2, Type.Q8_K, 256), [q * 0.25] * 2)


def test_nothing_is_converted_to_nothing():
    for type in (Type.F32, Type.F16, Type.Q4_K, Type.I8):
        data = quantize(np.empty((0, 256)), type)
        assert (data.dtype, data.shape) == (np.uint8, (0,))
        assert dequantize(data, type, 256).shape == (0, 256)


def test_any_strides_and_addresses():
    expected = quantize(WAVE, Type.Q4_K)
    np.testing.assert_array_equal(quantize(np.asfortranarray(WAVE), Type.Q4_K), expected)
    np.testing.assert_array_equal(quantize(WAVE.astype("d").repeat(2, axis=1)[:, ::2], Type.Q4_K), expected)
    for offset in range(1, 4):
        at = np.frombuffer(bytes(offset) + expected.tobytes(), np.uint8)[offset:]
        np.testing.assert_array_equal(dequantize(at, Type.Q4_K, 512), dequantize(expected, Type.Q4_K, 512))


def test_long_arrays_are_converted_in_pieces():
    values = np.random.default_rng(2).standard_normal((2**16 + 3, 256), dtype=np.float32)  # 2 calls of at most 2**24
    data = quantize(values, Type.Q8_0)
    np.testing.assert_array_equal(data[-3 * 272 :], quantize(values[-3:], Type.Q8_0))
    np.testing.assert_array_equal(data[272 * 2**16 - 272 :][: 272 * 2], quantize(values[2**16 - 1 :][:2], Type.Q8_0))


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
    blocks = X.reshape(-1, 32) * 10.0 ** np.arange(-24, 8, dtype="f")[:, None]
    blocks[3, 5] = 0
    stored = quantize(blocks, Type.MXFP4)
    np.testing.assert_array_equal(stored.reshape(-1, 17), mxfp4_encoded(blocks))
    assert validate(stored, Type.MXFP4)
    for number in (0, 1e-45, 1.5e-38, 2.3e-38):  # of which ggml takes a scale that is none
        assert (dequantize(quantize(np.full(32, number), Type.MXFP4), Type.MXFP4, 32) == 0).all()
    # what was stored is kept by another conversion: no code and no scale can change
    np.testing.assert_array_equal(quantize(mxfp4_decoded(mxfp4_encoded(blocks)), Type.MXFP4), stored)


def test_an_imatrix_is_used():
    weights = np.random.default_rng(0).random(512) ** 4
    plain, weighted = (dequantize(quantize(X, Type.Q4_K, each), Type.Q4_K, 512) for each in (np.ones(512), weights))
    assert not np.array_equal(plain, weighted)


def test_parts_of_the_rows_have_an_imatrix_each():
    weights = np.random.default_rng(0).random((2, 512)) ** 4
    data = quantize(WAVE.reshape(2, 4, 512), Type.Q4_K, weights)
    parts = [quantize(WAVE[at], Type.Q4_K, each) for at, each in zip((slice(4), slice(4, 8)), weights, strict=True)]
    np.testing.assert_array_equal(data, np.concatenate(parts))


def test_threads_make_tables_at_once(python):
    """ggml makes the tables of a type when it is first asked for; here by four threads in a fresh process."""
    python("""
        from concurrent.futures import ThreadPoolExecutor
        x = np.cos(np.arange(512, dtype="f"))
        types = [Type.IQ3_XXS, Type.IQ3_S, Type.IQ2_XXS, Type.Q4_K] * 3
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda type: quantize(x, type, np.ones(512)).tobytes(), types))
        assert found[:4] * 3 == found
    """)


@pytest.mark.parametrize(
    "args, error, message",
    [
        (
            (np.empty((32, 0)), Type.Q8_0),
            ShapeError,
            "quantize: rows of 0 elements are not a multiple of Q8_0's block size",
        ),
        ((["a"], Type.F16), DTypeError, "quantize: an array of <U1 has no real numbers"),
        ((X + 1j, Type.F16), DTypeError, "quantize: an array of complex64 has no real numbers"),
        ((1.0, Type.Q8_0), ShapeError, "quantize: rows of 1 elements are not a multiple of Q8_0's block size"),
        ((X[:, :33], Type.Q8_0), ShapeError, "quantize: rows of 33 elements are not a multiple of Q8_0's block size"),
        ((X, Type.Q8_1), DTypeError, "quantize: ggml does not convert to Q8_1"),
        ((X, Type.Q8_K), DTypeError, "quantize: ggml does not convert to Q8_K"),
        ((X, Type.IQ2_XXS), DTypeError, "quantize: IQ2_XXS needs an imatrix"),
        (
            (X * np.float32("nan"), Type.Q4_K),
            ParameterError,
            "quantize: the array has numbers that are not from -1e+08 to 1e+08",
        ),
        (
            (X * np.float32(1e20), Type.Q4_K),
            ParameterError,
            "quantize: the array has numbers that are not from -1e+08 to 1e+08",
        ),
        (
            (X, Type.Q4_K, np.full(512, -1)),
            ParameterError,
            "quantize: the imatrix has numbers that are not from 0 to 1e+10",
        ),
        (
            (np.full(256, 1e300), Type.Q4_K),
            ParameterError,
            "quantize: the array has numbers that are not from -1e+08 to 1e+08",
        ),
        (
            (X, Type.Q4_K, np.full(512, 1e300)),
            ParameterError,
            "quantize: the imatrix has numbers that are not from 0 to 1e+10",
        ),
        (
            (np.where(np.arange(96)[:, None] == 64, np.float32(1e7), np.ones(32, "f")), Type.Q8_0),
            ParameterError,
            "quantize: row 64 of the array has numbers that Q8_0 cannot hold",
        ),
        ((X, Type.Q4_K, np.ones(511)), ShapeError, "quantize: an imatrix of shape (511,) for rows of 512"),
        ((X, Type.Q4_K, 1.0), ShapeError, "quantize: an imatrix of shape () for rows of 512"),
        ((X, Type.Q4_K, np.ones((1, 1, 512))), ShapeError, "quantize: an imatrix of shape (1, 1, 512) for rows of 512"),
        ((X, Type.Q4_K, np.ones((3, 512))), ShapeError, "quantize: an imatrix of 3 parts for 2 rows"),
        ((X, Type.Q4_K, np.ones((0, 512))), ShapeError, "quantize: an imatrix of 0 parts for 2 rows"),
        ((X, Type.Q4_K, ["a"] * 512), DTypeError, "quantize: an imatrix of <U1 has no real numbers"),
    ],
)
def test_quantize_preconditions(args, error, message):
    with pytest.raises(error) as caught:
        quantize(*args)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "args, error, message",
    [
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
        (
            (b"1234", Type.F32, 1 << 62),
            ShapeError,
            f"dequantize: rows of {1 << 62} elements are longer than any tensor's",
        ),
        (
            (b"", Type.Q4_K, 1 << 60),
            ShapeError,
            f"dequantize: rows of {1 << 60} elements are longer than any tensor's",
        ),
        (
            (b"1234", Type.F32, 1 << 70),
            ShapeError,
            f"dequantize: rows of {1 << 70} elements are not a multiple of F32's block size",
        ),
        (
            (b"1234", Type.F32, -(1 << 62)),
            ShapeError,
            f"dequantize: rows of {-(1 << 62)} elements are not a multiple of F32's block size",
        ),
        ((b"1234", Type.F32, 1.0), TypeError, "'float' object cannot be interpreted as an integer"),
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
    for special in (0, 1e-45, -1e-38, 1e5, 1e8, -1e8, 3e38, np.inf, np.nan):
        rows = [np.full(256, special, "f"), np.where(rng.random(256) < 0.1, np.float32(special), normal),
                rng.choice([0, special, -special, 1], 256).astype("f")]
        for row in rows:
            for weight in (0, 1, 1e10, np.nan, -1):
                for importance in (np.full(256, weight, "f"), rng.choice([0, weight, 1], 256).astype("f")):
                    try:
                        found = dequantize(quantize(row, t, importance), t, 256)
                    except ParameterError:
                        continue
                    assert np.isfinite(found).all(), (t, special, weight)
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
