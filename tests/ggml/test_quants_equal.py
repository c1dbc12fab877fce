"""quantize() and dequantize() beside other implementations: gguf-py's in NumPy, and llama.cpp's own tool."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from reference import lib
from tiny_models import Tiny, write_tiny

from pyggml_adapt.errors import DTypeError
from pyggml_adapt.ggml import GGUFReader, Type, dequantize, quantize

# that the tool makes; NVFP4 it does not
FTYPES = {  # llama.cpp's LLAMA_FTYPE_MOSTLY_*: of a pure model every matrix has the type
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
    "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 29,
    "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip
SLOW = {"IQ1_S", "IQ1_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"}  # ggml makes tables of them, for seconds
NEED_IMATRIX = {"IQ2_XXS", "IQ2_XS", "IQ1_S"}
LLAMA_NEEDS = {"IQ2_S", "IQ3_XXS", "IQ1_M"}  # where the tool asks for one that ggml can do without
CASES = [(name, with_imatrix) for name in FTYPES for with_imatrix in (False, True)
         if with_imatrix or name not in NEED_IMATRIX | LLAMA_NEEDS]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    tiny = Tiny(arch="qwen3moe", n_layer=1, n_embd=256, n_ff=256, metadata={"expert_feed_forward_length": 256})
    return write_tiny(tmp_path_factory.mktemp("equal") / "m.gguf", tiny)


def requantized(model: Path, ftype: int, imatrix: dict[str, np.ndarray] | None) -> Path:
    """Return the file that llama_model_quantize, which the tool llama-quantize calls, makes of a model."""
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = 1, ftype, True
    if imatrix is not None:
        entries = (lib.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, weights) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), weights.size
            entry.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    out = model.with_name("out.gguf")
    assert lib.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return out


@pytest.mark.parametrize(
    "name, with_imatrix",
    [
        pytest.param(
            name, with_imatrix, id=name + "-imatrix" * with_imatrix, marks=[pytest.mark.slow] if name in SLOW else []
        )
        for name, with_imatrix in CASES
    ],
)
def test_bytes_are_llama_quantizes(model, name, with_imatrix):
    rng = np.random.default_rng(4)
    with GGUFReader(model) as source:
        plain, infos = source.map(), dict(source.tensors)
    values = {n: np.frombuffer(plain, "f4", i.nbytes // 4, i.offset).reshape(-1, i.ne[0]) for n, i in infos.items()}
    imatrix = {n: rng.random((i.ne[2], i.ne[0]), dtype="f4") for n, i in infos.items()} if with_imatrix else None
    seen = []
    with GGUFReader(requantized(model, FTYPES[name], imatrix)) as made:
        data = made.map()
        for info in made.tensors.values():
            if info.type != Type.F32:
                seen.append(info.type.name)
                ours = quantize(values[info.name], info.type, imatrix[info.name] if imatrix else None)
                assert ours.tobytes() == data[info.offset : info.offset + info.nbytes], info.name
    assert seen.count(name) >= 3


@pytest.mark.parametrize("name", sorted(NEED_IMATRIX))
def test_an_imatrix_is_asked_for(name):
    with pytest.raises(DTypeError, match=f"quantize: {name} needs an imatrix"):
        quantize(np.ones(256), Type[name])


NOT_IN_NUMPY = {"Q1_0", "Q2_0", "Q8_1", "Q8_K", "F32", "F16", "F64", "I8", "I16", "I32", "I64"}


@pytest.mark.parametrize("name", [type.name for type in Type if type.name not in NOT_IN_NUMPY])
def test_numbers_are_gguf_pys(name):
    gguf_quants = pytest.importorskip("gguf.quants")
    type, theirs = Type[name], __import__("gguf").GGMLQuantizationType[name]
    rng = np.random.default_rng(5)
    data = rng.integers(0, 256, (64, type.row_size(256)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf_quants.dequantize(data, theirs)
    np.testing.assert_array_equal(dequantize(data, type, 256), expected)
    values = (rng.standard_normal((64, 256)) * 10.0 ** rng.integers(-3, 4, (64, 1))).astype("f")
    try:
        expected = gguf_quants.quantize(values, theirs)
    except NotImplementedError:
        return
    np.testing.assert_array_equal(quantize(values, type), expected.ravel())
