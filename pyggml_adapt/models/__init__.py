"""One file per architecture; importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from pyggml_adapt.graph.hparams import HParams
from pyggml_adapt.models.base import Model, TensorSpec, architectures, model_class, model_of

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["HParams", "Model", "TensorSpec", "architectures", "model_class", "model_of"]
