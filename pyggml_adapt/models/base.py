"""What every architecture is: a table of tensors, and a forward pass built with a GraphBuilder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import RopeType, Tensor
from pyggml_adapt.graph.builder import GraphBuilder, LayerWeights, Weights
from pyggml_adapt.models.hparams import HParams

Shape = tuple[int, int, int, int]


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

    def check_tensors(self, found: Mapping[str, Shape], where: str) -> None:
        """Raise ModelError naming the first tensor that is missing, mis-shaped or unknown among name -> ne `found`."""
        known = set()
        for name, ne, required in self.all_tensors():
            known.add(name)
            if name not in found:
                if required:
                    raise ModelError(f"{where}: tensor {name} is missing")
            elif found[name] != ne + (1,) * (4 - len(ne)):
                raise ModelError(f"{where}: tensor {name} has shape {list(found[name])}, not {list(ne)}")
        for name in found:
            if name not in known:
                raise ModelError(f"{where}: tensor {name} is not one that architecture {self.arch} has")

    def build(self, g: GraphBuilder, w: Weights) -> Tensor | None:
        """Return the logits F32 [n_vocab, n_outputs]; None, with only the cache written, if there are no outputs."""
        cur = g.inp_embd(w.token_embd)
        for il in range(self.hp.n_layer):
            cur = self.build_layer(g, w.layer(il), cur, il)
            if cur is None:
                return None
        cur = g.named(g.norm(cur, w.output_norm), "result_norm")
        head = w.output if w.output is not None else w.token_embd
        return g.named(g.mm(head, cur), "result_output")

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        """Return the output of layer il, [n_embd, n_tokens]; of the last layer, only the rows wanted, None if none."""
        raise NotImplementedError


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
