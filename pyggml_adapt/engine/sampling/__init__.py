"""Sampling: from logits to a token id, with llama.cpp's candidates and probabilities.

Source: llama.cpp src/llama-sampler.cpp, common/sampling.cpp (the order of the default chain)
"""

from pyggml_adapt.engine.sampling.dry import Breakers, find_breakers
from pyggml_adapt.engine.sampling.params import SamplerParams
from pyggml_adapt.engine.sampling.sampler import Constraint, Sampler

__all__ = ["Breakers", "Constraint", "Sampler", "SamplerParams", "find_breakers"]
