"""Weights of one graph: slots for a task's tensors, found by their GGUF names, and its low-rank pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pyggml_adapt.ggml import Context, Slots, Tensor, ops


class Pair(Protocol):
    """A low-rank pair on a weight W [k, m]: a [k, rank], b [rank, m]; W's product gets scale * b(a(x)) added.

    a, b: names among the factors.  On an embedding [k, m] columns are picked: a [rank, m], b [rank, k].  On experts
    all have n_expert as well.
    """

    @property
    def a(self) -> str: ...
    @property
    def b(self) -> str: ...
    @property
    def scale(self) -> float: ...


class Sources(Protocol):
    """Where a task's weights are, by GGUF name, and the low-rank pairs on them, in the order in which they count."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def factors(self) -> Mapping[str, Tensor]: ...
    @property
    def pairs(self) -> Mapping[str, Sequence[Pair]]: ...


class Weights:
    """The weights of one graph, by GGUF name: `w.token_embd` is token_embd.weight, `w.x_b` is x.bias, absent None.

    Each is a slot, made when it is first asked for.
    """

    def __init__(self, slots: Slots, sources: Sources, prefix: str = "", model: Weights | None = None):
        self._slots, self._sources, self._prefix = slots, sources, prefix
        self._made: dict[str, Tensor] = {} if model is None else model._made
        self._scaled: list[str] = [] if model is None else model._scaled
        self.model: Weights = self if model is None else model

    @property
    def names(self) -> tuple[str, ...]:
        """Return the full names of the tensors used so far, in the order of their slots."""
        return tuple(self._made)

    @property
    def scaled(self) -> tuple[str, ...]:
        """Return the names of the tensors b of the pairs that were scaled, in the order of their scale nodes."""
        return tuple(self._scaled)

    def layer(self, il: int) -> LayerWeights:
        """Return the weights whose names start blk.il."""
        return LayerWeights(self._slots, self._sources, f"blk.{il}.", self.model)

    def __getattr__(self, attribute: str) -> Any:
        is_bias = attribute.endswith("_b")
        name = f"{self._prefix}{attribute[:-2]}.bias" if is_bias else f"{self._prefix}{attribute}.weight"
        return self._slot(name, self._sources.tensors[name]) if name in self._sources.tensors else None

    def _slot(self, name: str, source: Tensor) -> Tensor:
        if name not in self._made:
            self._made[name] = self._slots.add(source)
            self._made[name].name = name  # a head that is tied to the embedding is another weight of its own
        return self._made[name]

    def add_pairs(self, ctx: Context, out: Tensor, w: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return `out` plus what the low-rank pairs on a weight add; product: of slots for a pair's a and b."""
        for pair in self._sources.pairs.get(w.name, ()):
            a, b = (self._slot(name, self._sources.factors[name]) for name in (pair.a, pair.b))
            delta = self._slots.add_scale(ops.scale(ctx, product(a, b), pair.scale))  # exchanged with the weights
            self._scaled.append(pair.b)
            out = ops.add(ctx, out, delta)
        return out


class LayerWeights(Weights):
    """The weights of one layer; `w.model` has those that belong to none."""
