"""ggml for Python: contexts, tensors, ops, graphs, backends, buffers, GGUF files and quantisation."""

from pyggml_adapt.ggml import ops
from pyggml_adapt.ggml.backend import Backend, Buffer, BufferType, Device, default_n_threads, ggml_version
from pyggml_adapt.ggml.context import Context, Tensor
from pyggml_adapt.ggml.enums import DeviceType, RopeType, Status, Type
from pyggml_adapt.ggml.gguf import GGUFReader, GGUFWriter, TensorInfo
from pyggml_adapt.ggml.graph import CGraph, GAllocr, Sched, Slots, TensorTable
from pyggml_adapt.ggml.quants import dequantize, quantize

__all__ = [
    "Backend",
    "Buffer",
    "BufferType",
    "CGraph",
    "Context",
    "Device",
    "DeviceType",
    "GAllocr",
    "GGUFReader",
    "GGUFWriter",
    "RopeType",
    "Sched",
    "Slots",
    "Status",
    "Tensor",
    "TensorInfo",
    "TensorTable",
    "Type",
    "default_n_threads",
    "dequantize",
    "ggml_version",
    "ops",
    "quantize",
]
