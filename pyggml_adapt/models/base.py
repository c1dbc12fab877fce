"""What every architecture is: a table of tensors, and a forward pass built with a GraphBuilder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import RopeType, Tensor, Type
from pyggml_adapt.graph.builder import GraphBuilder, LayerWeights, Weights
from pyggml_adapt.models.hparams import HParams

_FLOATS = (Type.F32, Type.F16, Type.BF16)
_NO_WEIGHTS = ("Q8_1", "Q8_K")  # of activations inside matmul


class TensorSpec(NamedTuple):
    """One tensor that an architecture may or must have; ne in ggml order, as many dimensions as matter."""

    name: str
    ne: tuple[int, ...]
    required: bool = True


class Model:
    """One architecture with its hyper-parameters; it holds no weights.

    Subclasses give `tensors()`, `layer_tensors()` and `build_layer()`.
    """

    arch: str
    rope_type: RopeType = RopeType.NORMAL

    def __init__(self, hp: HParams):
        self.hp = hp
        self.check_hparams()

    def check_hparams(self) -> None:
        """Raise ModelError for hyper-parameters that the architecture cannot have."""

    def tensors(self) -> Iterator[TensorSpec]:
        """Yield the tensors that belong to no layer."""
        hp = self.hp
        yield TensorSpec("token_embd.weight", (hp.n_embd, hp.n_vocab))
        yield TensorSpec("output_norm.weight", (hp.n_embd,))
        yield TensorSpec("output.weight", (hp.n_embd, hp.n_vocab), required=False)  # absent: tied to token_embd

    def layer_tensors(self) -> Iterator[TensorSpec]:
        """Yield the tensors of one layer, named without their blk.N. prefix."""
        raise NotImplementedError

    def all_tensors(self) -> Iterator[TensorSpec]:
        """Yield every tensor of the model."""
        yield from self.tensors()
        layer = list(self.layer_tensors())
        for il in range(self.hp.n_layer):
            for name, ne, required in layer:
                yield TensorSpec(f"blk.{il}.{name}", ne, required)

    def check_tensors(self, found: Mapping[str, Tensor]) -> None:
        """Raise ModelError naming the first tensor that is missing, mis-shaped, of a wrong type, or unknown."""
        known = set()
        for spec in self.all_tensors():
            known.add(spec.name)
            if spec.name in found:
                _check_tensor(spec, found[spec.name])
            elif spec.required:
                raise ModelError(f"tensor {spec.name} is missing")
        for name in found:
            if name not in known:
                raise ModelError(f"tensor {name} is not one that architecture {self.arch} has")

    def build(self, g: GraphBuilder, w: Weights) -> Tensor | None:
        """Return the logits F32 [n_vocab, n_outputs]; None, with only the cache written, if there are no outputs."""
        cur = g.inp_embd(w.token_embd)
        for il in range(self.hp.n_layer):
            out = self.build_layer(g, w.layer(il), cur, il)
            if out is None:
                return None
            cur = out
        cur = g.named(g.norm(cur, w.output_norm), "result_norm")
        head = w.output if w.output is not None else w.token_embd
        return g.named(g.mm(head, cur), "result_output")

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        """Return the output of layer il, [n_embd, n_tokens]; of the last layer, only the rows wanted, None if none."""
        raise NotImplementedError


def _check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    """Raise ModelError unless ggml can compute with the tensor: it ends the process on a vector that is not F32."""
    if tensor.ne != spec.ne + (1,) * (4 - len(spec.ne)):
        raise ModelError(f"tensor {spec.name} has shape {list(tensor.ne)}, not {list(spec.ne)}")
    if len(spec.ne) == 1 and tensor.type != Type.F32:
        raise ModelError(f"tensor {spec.name} has type {tensor.type.name}, not F32")
    if tensor.type.name in _NO_WEIGHTS or not (tensor.type.is_quantized or tensor.type in _FLOATS):
        raise ModelError(f"tensor {spec.name} has type {tensor.type.name}, which weights cannot have")


M = TypeVar("M", bound=type[Model])
_registry: dict[str, type[Model]] = {}


def register(arch: str) -> Callable[[M], M]:
    """Return a class decorator that makes a Model known under its GGUF architecture name."""

    def add(cls: M) -> M:
        cls.arch = arch
        _registry[arch] = cls
        return cls

    return add


def architectures() -> tuple[str, ...]:
    """Return the names of the supported architectures."""
    return tuple(sorted(_registry))


def model_class(arch: str) -> type[Model]:
    """Return the class for an architecture.

    Raises: ModelError naming it and those that are supported.
    """
    if arch not in _registry:
        raise ModelError(f"architecture {arch!r} is not supported; supported: {', '.join(architectures())}")
    return _registry[arch]
