"""The parts of opt.pyx that need no C: the optimisers' parameters, and a line of progress."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from pyggml_adapt.errors import ParameterError

if TYPE_CHECKING:
    from pyggml_adapt.ggml.opt import OptContext, OptDataset, OptResult


def _check(owner: object, name: str, lowest: float, highest: float) -> None:
    value = getattr(owner, name)
    if not isinstance(value, Real) or not lowest <= float(value) <= highest:
        raise ParameterError(f"{type(owner).__name__}: {name} must be {lowest:g} to {highest:.8g}, not {value!r}")


_SMALLEST, _LARGEST = 1e-37, 3e38  # of what F32 holds
_BELOW_ONE = 1 - 2**-24  # of what F32 holds: steps divide by 1 - beta


@dataclass(frozen=True, slots=True)
class AdamW:
    """Parameters of the optimiser AdamW.  alpha: the learning rate.  wd: weight decay."""

    alpha: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    wd: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "alpha", _SMALLEST, _LARGEST)
        _check(self, "beta1", 0, _BELOW_ONE)
        _check(self, "beta2", 0, _BELOW_ONE)
        _check(self, "eps", 0, _LARGEST)
        _check(self, "wd", 0, 1)


@dataclass(frozen=True, slots=True)
class SGD:
    """Parameters of stochastic gradient descent.  alpha: learning rate.  wd: weight decay."""

    alpha: float = 1e-3
    wd: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "alpha", _SMALLEST, _LARGEST)
        _check(self, "wd", 0, 1)


def progress(
    train: bool, opt: OptContext, dataset: OptDataset, result: OptResult, ibatch: int, ibatch_max: int, seconds: float
) -> None:
    """Show how far an epoch is, as one line on stderr; a callback for OptContext.epoch and fit."""
    loss, accuracy = result.loss[0], result.accuracy[0]
    right = "" if math.isnan(accuracy) else f", {accuracy:6.1%} right"
    end = "\n" if ibatch == ibatch_max else ""
    what = "training" if train else "validation"
    line = f"\r{what} {ibatch}/{ibatch_max}: loss {loss:.5f}{right}, {seconds:.1f} s{end}"
    print(line, end="", file=sys.stderr, flush=True)
