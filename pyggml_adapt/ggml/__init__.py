"""ggml for Python: contexts, tensors, ops, graphs, backends, buffers, GGUF files and quantisation."""

from pyggml_adapt.ggml import ops
from pyggml_adapt.ggml.backend import Backend, Buffer, BufferType, Device, default_n_threads, ggml_version
from pyggml_adapt.ggml.context import Context, Tensor
from pyggml_adapt.ggml.enums import (
    DeviceType,
    GluOp,
    OpPool,
    Prec,
    RopeType,
    ScaleFlag,
    ScaleMode,
    SortOrder,
    Status,
    TriType,
    Type,
    UnaryOp,
)
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
    "GluOp",
    "OpPool",
    "Prec",
    "RopeType",
    "ScaleFlag",
    "ScaleMode",
    "Sched",
    "Slots",
    "SortOrder",
    "Status",
    "Tensor",
    "TensorInfo",
    "TensorTable",
    "TriType",
    "Type",
    "UnaryOp",
    "default_n_threads",
    "dequantize",
    "ggml_version",
    "ops",
    "quantize",
]
