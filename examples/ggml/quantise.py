"""Quantise an array to every type of ggml's: how many bits a weight takes, and how wrong it becomes.

usage: python quantise.py [ARRAY.npy]     rows must be a multiple of 256 elements
"""

from __future__ import annotations

import sys
import time

import numpy as np

from pyggml_adapt.errors import DTypeError
from pyggml_adapt.ggml import Type, dequantize, quantize


def weights() -> np.ndarray:
    """Return numbers like those of a trained matrix: normal, and a few columns of outliers."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((64, 512), dtype=np.float32) * 0.02
    array[:, rng.integers(0, 512, 4)] *= 8
    return array


def main() -> None:
    array = np.atleast_2d(np.load(sys.argv[1])) if len(sys.argv) > 1 else weights()
    imatrix = np.square(array.reshape(-1, array.shape[-1])).mean(axis=0)
    spread = np.sqrt(np.square(array).mean())
    rows = []
    for type in Type:
        if not type.is_quantized and type not in (Type.F16, Type.BF16):
            continue
        try:
            quantize(array[..., :1, :], type, imatrix)  # ggml makes tables for some types when they are first used
        except DTypeError:  # a type that matrix products have for the other operand
            continue
        start = time.perf_counter()
        data = quantize(array, type, imatrix)
        seconds = time.perf_counter() - start
        error = np.sqrt(np.square(dequantize(data, type, array.shape[-1]).reshape(array.shape) - array).mean())
        rows.append((8 * data.size / array.size, type.name, error / spread, seconds))
    print(f"{'type':8} {'bits per weight':>15} {'error':>9} {'ms':>8}")
    for bits, name, error, seconds in sorted(rows):
        print(f"{name:8} {bits:15.4f} {error:9.3%} {1000 * seconds:8.1f}")


if __name__ == "__main__":
    main()
