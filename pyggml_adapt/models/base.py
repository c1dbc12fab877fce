"""What every architecture is: a table of tensors, and a forward pass built with a GraphBuilder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import RopeType, Tensor, Type
from pyggml_adapt.graph.builder import GraphBuilder, LayerWeights, Weights
from pyggml_adapt.models.hparams import HParams

_FLOATS = (Type.F32, Type.F16, Type.BF16)
_LAYER = re.compile(r"blk\.(\d+)\.")
_HEAD = ("output.", "output_norm.")
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

    def first_layer(self, names: Iterable[str]) -> int:
        """Return the lowest layer whose results depend on one of these tensors; n_layer if only the head's do.

        0 for a tensor that belongs to no layer: as far as is known everything depends on it.
        """
        return min((self._layer_of(name) for name in names), default=self.hp.n_layer)

    def _layer_of(self, name: str) -> int:
        if name.startswith(_HEAD):
            return self.hp.n_layer
        found = _LAYER.match(name)
        return int(found[1]) if found and int(found[1]) < self.hp.n_layer else 0

    def build(self, g: GraphBuilder, w: Weights, first_layer: int = 0) -> Tensor | None:
        """Return the logits F32 [n_vocab, n_outputs]; None, with only the cache written, if there are no outputs.

        first_layer: where the graph starts: from tokens if 0, else from that layer's input; from the head's if n_layer.
        """
        cur = g.inp_embd(w.token_embd) if g.inputs.embd is None else g.inputs.embd
        for il in range(first_layer, self.hp.n_layer):
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


def model_of(metadata: Mapping[str, object], tensors: Mapping[str, Tensor], path: str) -> Model:
    """Return the model that metadata describe, its tensors checked.

    Raises: ModelError naming the file at `path` and the key or tensor that is wrong.
    """
    arch = metadata.get("general.architecture")
    embd = tensors.get("token_embd.weight")
    try:
        cls = model_class(arch if isinstance(arch, str) else "")
        model = cls(HParams.from_gguf(metadata, 1 if embd is None else embd.ne[1]))
        model.check_tensors(tensors)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return model
