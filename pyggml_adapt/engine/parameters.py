"""Checks of what a user asks a host for."""

from __future__ import annotations

from numbers import Integral

from pyggml_adapt.errors import AdaptorError, BackendError, ParameterError
from pyggml_adapt.ggml import Device, DeviceType, Type

MAX_COUNT = 1 << 24  # of tokens in a context or a batch


def count(name: str, value: int, *, least: int = 1, most: int = MAX_COUNT) -> int:
    """Return a parameter that counts something.  Raises: ParameterError naming it."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ParameterError(f"{name} = {value!r} is not a whole number")
    if not least <= value <= most:
        raise ParameterError(f"{name} = {value} is not from {least} to {most}")
    return int(value)


def check_name(task: str) -> None:
    """Raise AdaptorError (adaptor_invalid) unless it can be a task's name."""
    if not isinstance(task, str) or not task:
        raise AdaptorError(f"a task needs a name, not {task!r}", code="adaptor_invalid")


def cache_type(name: str, value: str) -> Type:
    try:
        return Type[value.upper()]
    except (KeyError, AttributeError):
        raise ParameterError(f"{name} = {value!r} is not a type that ggml has") from None


def check_gpu(n_gpu_layers: int) -> None:
    """Raise BackendError if layers are asked to be on a GPU: nothing falls back silently."""
    if count("n_gpu_layers", n_gpu_layers, least=0) == 0:
        return
    gpus = [device.name for device in Device.all() if device.type in (DeviceType.GPU, DeviceType.IGPU)]
    if not gpus:
        raise BackendError(
            f"n_gpu_layers = {n_gpu_layers}: this build has no GPU backend, or no GPU is present; "
            f"see `pyggml-adapt info` and build with -DGGML_CUDA=on, -DGGML_METAL=on, ..."
        )
    raise BackendError(f"n_gpu_layers = {n_gpu_layers}: running on {', '.join(gpus)} is not implemented yet")
