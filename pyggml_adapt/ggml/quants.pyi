from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml_adapt.ggml.enums import Type

def quantize(array: ArrayLike, type: Type | int, imatrix: ArrayLike | None = None) -> NDArray[np.uint8]: ...
def dequantize(data: Any, type: Type | int, ne0: int) -> NDArray[Any]: ...
def validate(data: Any, type: Type | int) -> bool: ...
