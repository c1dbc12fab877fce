"""Many fine-tuned models from one shared foundation, over ggml."""

from pyggml_adapt import errors, ggml
from pyggml_adapt.engine.sampling import SamplerParams
from pyggml_adapt.errors import AdaptorError, Error
from pyggml_adapt.evals.perplexity import Perplexity, perplexity
from pyggml_adapt.host.host import Host, Swap
from pyggml_adapt.host.session import Session
from pyggml_adapt.info import build_info
from pyggml_adapt.tools import bake, inspect, link, merge, split, verify

__version__ = "0.1.0"

__all__ = [
    "AdaptorError",
    "Error",
    "Host",
    "Perplexity",
    "SamplerParams",
    "Session",
    "Swap",
    "bake",
    "build_info",
    "errors",
    "ggml",
    "inspect",
    "link",
    "merge",
    "perplexity",
    "split",
    "verify",
]
