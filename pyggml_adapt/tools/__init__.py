"""Tools that work on files: split models into a foundation and adaptors, merge, verify, link and inspect them."""

from pyggml_adapt.tools.bake import BakedTensor, BakeReport, bake
from pyggml_adapt.tools.inspect import FileInfo, inspect
from pyggml_adapt.tools.link import link
from pyggml_adapt.tools.lowrank import LowRankReport, SizeReport
from pyggml_adapt.tools.merge import MergeReport, merge
from pyggml_adapt.tools.plan import FileReport, SplitReport, TensorReport
from pyggml_adapt.tools.split import split
from pyggml_adapt.tools.verify import VerifyReport, verify

__all__ = [
    "BakeReport",
    "BakedTensor",
    "FileInfo",
    "FileReport",
    "LowRankReport",
    "MergeReport",
    "SizeReport",
    "SplitReport",
    "TensorReport",
    "VerifyReport",
    "bake",
    "inspect",
    "link",
    "merge",
    "split",
    "verify",
]
