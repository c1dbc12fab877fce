"""What this installation was built from and what it can run on."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pyggml_adapt import _build
from pyggml_adapt.ggml import Device, ggml_version


def build_info() -> dict[str, Any]:
    """Return the versions, compiler, backends compiled in, and devices present.

    devices: for each, its name, description, type, backend, memory_free and memory_total in bytes.
    features: of the CPU backend, what it was compiled to use.
    """
    devices = Device.all()
    return {
        "version": version("pyggml_adapt"),
        "ggml_version": ggml_version(),
        "llama_cpp_commit": _build.GGML_COMMIT,
        "compiler": _build.COMPILER,
        "build_type": _build.BUILD_TYPE,
        "backends": Device.backends(),
        "devices": [_describe(device) for device in devices],
        "features": Device.cpu().features,
    }


def _describe(device: Device) -> dict[str, Any]:
    free, total = device.memory
    return {
        "name": device.name,
        "description": device.description,
        "type": device.type.name,
        "backend": device.backend_name,
        "memory_free": free,
        "memory_total": total,
    }
