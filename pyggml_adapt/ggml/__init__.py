"""ggml for Python: contexts, tensors, ops, graphs, backends, buffers, GGUF files and quantisation."""

from pyggml_adapt.ggml import ops
from pyggml_adapt.ggml.backend import Backend, Buffer, BufferType, Device, Event, default_n_threads, ggml_version
from pyggml_adapt.ggml.compute import compute
from pyggml_adapt.ggml.context import Context, Tensor
from pyggml_adapt.ggml.enums import (
    BufferUsage,
    DeviceType,
    GluOp,
    OpHint,
    OpPool,
    Prec,
    RopeType,
    ScaleFlag,
    ScaleMode,
    SchedPriority,
    SortOrder,
    Status,
    TriType,
    Type,
    UnaryOp,
)
from pyggml_adapt.ggml.gguf import GGUFReader, GGUFWriter, TensorInfo
from pyggml_adapt.ggml.graph import CGraph, GAllocr
from pyggml_adapt.ggml.opt import SGD, AdamW, OptContext, OptDataset, OptLossType, OptResult, fit
from pyggml_adapt.ggml.plan import GraphPlan
from pyggml_adapt.ggml.quants import dequantize, quantize
from pyggml_adapt.ggml.sched import Sched
from pyggml_adapt.ggml.slots import Slots, TensorTable
from pyggml_adapt.ggml.threadpool import Threadpool

__all__ = [
    "SGD",
    "AdamW",
    "Backend",
    "Buffer",
    "BufferType",
    "BufferUsage",
    "CGraph",
    "Context",
    "Device",
    "DeviceType",
    "Event",
    "GAllocr",
    "GGUFReader",
    "GGUFWriter",
    "GluOp",
    "GraphPlan",
    "OpHint",
    "OpPool",
    "OptContext",
    "OptDataset",
    "OptLossType",
    "OptResult",
    "Prec",
    "RopeType",
    "ScaleFlag",
    "ScaleMode",
    "Sched",
    "SchedPriority",
    "Slots",
    "SortOrder",
    "Status",
    "Tensor",
    "TensorInfo",
    "TensorTable",
    "Threadpool",
    "TriType",
    "Type",
    "UnaryOp",
    "compute",
    "default_n_threads",
    "dequantize",
    "fit",
    "ggml_version",
    "ops",
    "quantize",
]
