"""What every architecture is: a table of tensors, and a forward pass built with a GraphBuilder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from pyggml_adapt.errors import ModelError
from pyggml_adapt.ggml import RopeType, Tensor, Type
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.hparams import HParams, Keys, layered, readers
from pyggml_adapt.graph.weights import LayerWeights, Weights

_FLOATS = (Type.F32, Type.F16, Type.BF16)
_LAYER = re.compile(r"blk\.(\d+)\.")
_HEAD = ("output.", "output_norm.")
_NO_WEIGHTS = ("Q8_1", "Q8_K")  # of activations inside matmul


class TensorSpec(NamedTuple):
    """One tensor that an architecture may or must have; ne in ggml order, as many dimensions as matter.

    unless: the name of a tensor that takes its place: there is one of the two.
    """

    name: str
    ne: tuple[int, ...]
    required: bool = True
    unless: str = ""


class Model:
    """One architecture with its hyper-parameters; it holds no weights.

    Subclasses give `layer_tensors()` and `build_layer()`, and say below how they differ from llama.
    """

    arch: ClassVar[str]
    rope_type: ClassVar[RopeType] = RopeType.NORMAL
    partial_rotary: ClassVar[bool] = False  # whether less than a head may be rotated
    rms_norm: ClassVar[bool] = True  # False: norms are LayerNorms
    output_norm: ClassVar[tuple[str, ...]] = ("weight",)  # the tensors that the last norm has
    output: ClassVar[str] = "optional"  # or required, or tied
    rope_factors: ClassVar[tuple[str, ...]] = ()  # for the frequencies: freqs, longrope, by rope.scaling.type if both
    experts: ClassVar[str] = "none"  # or optional, or required
    layered: ClassVar[bool] = False  # whether layers may differ in size, or lack a part
    nextn: ClassVar[bool] = False  # whether there may be layers, kept only, that predict further tokens

    def __init__(self, hp: HParams):
        self.hp = hp
        self.check_hparams()

    @classmethod
    def read_hparams(cls, keys: Keys) -> dict[str, Any]:
        """Return the hyper-parameters that not every architecture has, or that differ from what is usual."""
        if not cls.nextn:
            keys.refuse("nextn_predict_layers")
        if cls.rms_norm:
            return {"f_norm_rms_eps": keys.number("attention.layer_norm_rms_epsilon", least=0.0)}
        return {"f_norm_eps": keys.number("attention.layer_norm_epsilon", least=0.0)}

    def check_hparams(self) -> None:
        """Raise ModelError for hyper-parameters that the architecture cannot have."""
        hp = self.hp
        if hp.n_embd_head_k % 2:
            raise ModelError(f"{hp.arch}.attention.key_length, or embedding_length / head_count, is odd")
        if hp.n_embd_head_k != hp.n_embd_head_v:
            raise ModelError(
                f"{hp.arch}.attention.value_length = {hp.n_embd_head_v} is not key_length {hp.n_embd_head_k}"
            )
        if hp.n_rot % 2 or (hp.n_rot != hp.n_embd_head_k and not self.partial_rotary):
            raise ModelError(
                f"{hp.arch}.rope.dimension_count = {hp.n_rot} is not the head size {hp.n_embd_head_k}, or odd"
            )
        if hp.n_rot > hp.n_embd_head_k:
            raise ModelError(f"{hp.arch}.rope.dimension_count = {hp.n_rot} is above the head size {hp.n_embd_head_k}")
        if hp.rope_scaling_type == "longrope" and "longrope" not in self.rope_factors:
            raise ModelError(f"{hp.arch}.rope.scaling.type = 'longrope' is not one that architecture {hp.arch} has")
        if hp.n_expert and self.experts == "none":
            raise ModelError(f"{hp.arch}.expert_count = {hp.n_expert}, but architecture {hp.arch} has no experts")
        if not hp.n_expert and self.experts == "required":
            raise ModelError(f"{hp.arch}.expert_count is absent or 0, but architecture {hp.arch} has experts")

    def tensors(self) -> Iterator[TensorSpec]:
        """Yield the tensors that belong to no layer."""
        hp = self.hp
        yield TensorSpec("token_embd.weight", (hp.n_embd, hp.n_vocab))
        for leaf in self.output_norm:
            yield TensorSpec(f"output_norm.{leaf}", (hp.n_embd,))
        if self.output != "tied":  # to token_embd, as those are where an optional one is absent
            yield TensorSpec("output.weight", (hp.n_embd, hp.n_vocab), self.output == "required")
        if "freqs" in self.rope_factors and hp.rope_scaling_type != "longrope":
            yield TensorSpec("rope_freqs.weight", (hp.n_rot // 2,), required=False)
        elif "longrope" in self.rope_factors:
            yield TensorSpec("rope_factors_long.weight", (hp.n_rot // 2,), required=False)
            yield TensorSpec("rope_factors_short.weight", (hp.n_rot // 2,), required=False)

    def layer_tensors(self, il: int) -> Iterator[TensorSpec]:
        """Yield the tensors of layer il, named without their blk.N. prefix."""
        raise NotImplementedError

    def all_tensors(self) -> Iterator[TensorSpec]:
        """Yield every tensor of the model."""
        yield from self.tensors()
        for il in range(self.hp.n_layer):
            for name, ne, required, unless in self.layer_tensors(il):
                yield TensorSpec(f"blk.{il}.{name}", ne, required, unless and f"blk.{il}.{unless}")
        for il in range(self.hp.n_layer, self.hp.n_layer + self.hp.n_layer_nextn):
            for name, ne, *_ in self.nextn_tensors(il):
                yield TensorSpec(f"blk.{il}.{name}", ne, required=False)

    def nextn_tensors(self, il: int) -> Iterator[TensorSpec]:
        """Yield the tensors of layer il, one of those that predict further tokens, named as by layer_tensors()."""
        hp = self.hp
        yield from self.layer_tensors(il)
        yield TensorSpec("nextn.eh_proj.weight", (2 * hp.n_embd, hp.n_embd))
        for name in ("enorm", "hnorm", "shared_head_norm"):
            yield TensorSpec(f"nextn.{name}.weight", (hp.n_embd,))

    def check_tensors(self, found: Mapping[str, Tensor]) -> None:
        """Raise ModelError naming the first tensor that is missing, mis-shaped, of a wrong type, or unknown."""
        known = set()
        for spec in self.all_tensors():
            known.add(spec.name)
            if spec.name in found:
                _check_tensor(spec, found[spec.name])
                if spec.unless in found:
                    raise ModelError(f"tensors {spec.name} and {spec.unless} exclude each other")
            elif spec.required and spec.unless not in found:
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
        if found is None or int(found[1]) >= self.hp.n_layer + self.hp.n_layer_nextn:
            return 0
        return min(int(found[1]), self.hp.n_layer)  # nothing depends on layers after the last that is computed

    def is_long(self, n_ctx: int) -> bool:
        """Return whether a context of n_ctx tokens, padded, takes LongRoPE's factors for long ones."""
        return "longrope" in self.rope_factors and n_ctx > self.hp.n_ctx_orig_yarn

    def build(self, g: GraphBuilder, w: Weights, first_layer: int = 0, *, with_head: bool = True) -> Tensor | None:
        """Return the logits F32 [n_vocab, n_outputs]; None, with only the cache written, if there are no outputs.

        first_layer: where the graph starts: from tokens if 0, else from that layer's input; from the head's if n_layer.
        with_head: False for the normed hidden states that the head makes logits of, F32 [n_embd, n_outputs].
        """
        cur = self.build_inp(g, w) if g.inputs.embd is None else g.inputs.embd
        for il in range(first_layer, self.hp.n_layer):
            g.layer_inp[il] = cur
            out = self.build_layer(g, w.layer(il), cur, il)
            if out is None:
                return None
            cur = out
        g.layer_inp[self.hp.n_layer] = cur
        cur = g.named(g.norm(cur, w.output_norm, bias=w.output_norm_b), "result_norm")
        return g.named(g.soft_capped(self.build_head(g, w, cur)), "result_output") if with_head else cur

    def build_inp(self, g: GraphBuilder, w: Weights) -> Tensor:
        """Return the input of layer 0, [n_embd, n_tokens]."""
        return g.inp_embd(w.token_embd)

    def build_head(self, g: GraphBuilder, w: Weights, cur: Tensor) -> Tensor:
        """Return the logits of normed hidden states, [n_vocab, n_outputs]."""
        return g.mm(w.output if w.output is not None else w.token_embd, cur)

    def build_layer(self, g: GraphBuilder, w: LayerWeights, cur: Tensor, il: int) -> Tensor | None:
        """Return the output of layer il, [n_embd, n_tokens]; of the last layer, only the rows wanted, None if none."""
        raise NotImplementedError


def _check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    """Raise ModelError unless ggml can compute with the tensor: it ends the process on a vector that is not F32."""
    if tensor.ne != spec.ne + (1,) * (4 - len(spec.ne)):
        raise ModelError(f"tensor {spec.name} has shape {list(tensor.ne)}, not {list(spec.ne)}")
    if (len(spec.ne) == 1 or "_norm." in spec.name or spec.name.endswith(".bias")) and tensor.type != Type.F32:
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
        readers[arch] = cls.read_hparams
        if cls.layered:
            layered.add(arch)
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
