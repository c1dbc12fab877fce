"""TaskWeights: where each tensor of one task is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

from pyggml_adapt.errors import AdaptorError
from pyggml_adapt.ggml import Tensor, TensorTable
from pyggml_adapt.weights.adaptor import PEFT, Adaptor
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.identity import mismatch
from pyggml_adapt.weights.lowrank import EMBEDDING, HEAD, scale_of


class Component(NamedTuple):
    """An adaptor of a task, and the factor that its low-rank pairs count with."""

    adaptor: Adaptor
    factor: float


class LowRankPart(NamedTuple):
    """A low-rank pair on a tensor: its file, its rank, and what its product is multiplied by."""

    path: str
    rank: int
    scale: float


class Location(NamedTuple):
    """Where the bytes of one tensor of a task live."""

    source: str  # "foundation" or "adaptor"
    type: str  # ggml's name of the type, as "Q8_0"
    nbytes: int
    path: str


class ScaledPair(NamedTuple):
    """A low-rank pair on a weight: names among the task's factors, and what the product is multiplied by."""

    a: str
    b: str
    scale: float


class TaskWeights:
    """All tensors of one task, by name: the foundation's, those of its adaptors in their place, and low-rank pairs.

    components: in memory already; at most the first is of a whole model, the others are low-rank.
    Raises: AdaptorError (adaptor_invalid) if they exclude each other, (adaptor_base_mismatch) if a pair does not fit.
    """

    def __init__(self, task: str, foundation: Foundation, components: Sequence[Component] = ()):
        self.task, self.foundation, self.components = task, foundation, tuple(components)
        self.adaptors = tuple(component.adaptor for component in self.components)
        self._owner: dict[str, Adaptor] = {}  # of the tensors that are not the foundation's
        self.tensors: dict[str, Tensor] = dict(foundation.tensors)
        for adaptor, factor in self.components:
            self._place(adaptor, factor)
        self.factors: dict[str, Tensor] = {}  # of all pairs
        self.pairs: dict[str, list[ScaledPair]] = {}  # by the weight they are on, in the order of the components
        for component in self.components:
            self._add_pairs(component)
        self.layout = self._layout()  # equal layouts share graphs
        self._tables: dict[tuple[tuple[str, ...], ...], TensorTable] = {}

    def _place(self, adaptor: Adaptor, factor: float) -> None:
        """Let an adaptor's whole tensors take the place of those below."""
        if adaptor.names is not None:
            if adaptor is not self.adaptors[0]:
                raise self._conflict(f"adaptor {adaptor.name!r} is of a whole model, so it must be the first, and one")
            self.tensors = {name: self.tensors[name] for name in adaptor.names if name not in adaptor.whole}
        if (adaptor.kind == PEFT and EMBEDDING in adaptor.whole) or HEAD in adaptor.alphas:
            self._untie()
        for name in adaptor.whole:
            if factor != 1.0:
                raise self._conflict(f"adaptor {adaptor.name!r} replaces tensor {name!r} as a whole: no factor but 1")
            if name in self._owner:
                raise self._conflict(
                    f"adaptors {self._owner[name].name!r} and {adaptor.name!r} both replace tensor {name!r}"
                )
            self._owner[name] = adaptor
            self.tensors[name] = adaptor.tensor(name)
        if adaptor.names is not None:
            self.tensors = {name: self.tensors[name] for name in adaptor.names}  # the order of its model

    def _untie(self) -> None:
        """Let a head that is the embedding stay what it is when that changes, or change alone: PEFT's meaning."""
        if EMBEDDING in self.tensors:
            self.tensors.setdefault(HEAD, self.tensors[EMBEDDING])

    def _conflict(self, detail: str) -> AdaptorError:
        return AdaptorError(f"task {self.task!r}: {detail}", code="adaptor_invalid")

    def _add_pairs(self, component: Component) -> None:
        adaptor = component.adaptor
        for target in adaptor.alphas:
            a, b, alpha = adaptor.pair(target)
            self._check_pair(adaptor, target, a, b)
            pairs = self.pairs.setdefault(target, [])
            names = f"{target}.lora_a.{len(pairs)}", f"{target}.lora_b.{len(pairs)}"
            self.factors |= zip(names, (a, b), strict=True)
            scale = scale_of(alpha, b.ne[0], component.factor)
            if not math.isfinite(scale):
                product = f"{component.factor:g} x {alpha:g} / {b.ne[0]}"
                raise self._conflict(f"adaptor {adaptor.name!r} scales its pair on {target!r} by {product}, beyond F32")
            pairs.append(ScaledPair(*names, scale))

    def _check_pair(self, adaptor: Adaptor, target: str, a: Tensor, b: Tensor) -> None:
        """Raise AdaptorError (adaptor_base_mismatch) unless there is such a matrix."""
        who = f"{adaptor.path}: the adaptor"
        if target not in self.tensors:
            raise mismatch(who, self.foundation.path, f"it has a low-rank pair on {target!r}, which is not there")
        ne = self.tensors[target].ne
        if target == EMBEDDING:
            fits = (a.ne[1], b.ne[1], 1) == (ne[1], ne[0], a.ne[2])
        else:
            is_matrix = ne[1] > 1 and "_norm." not in target and not target.endswith(".bias")
            fits = is_matrix and (a.ne[0], b.ne[1], a.ne[2]) == ne[:3]
        if not fits:
            shapes = f"{list(a.ne[:3])} and {list(b.ne[:3])}"
            raise mismatch(who, self.foundation.path, f"its pair on {target!r}, {shapes}, does not fit {list(ne[:3])}")

    def _layout(self) -> bytes:
        tensors = [(name, int(t.type), t.ne) for name, t in sorted(self.tensors.items())]
        factors = [(name, int(t.type), t.ne) for name, t in sorted(self.factors.items())]
        return hashlib.sha256(repr((tensors, factors)).encode()).digest()

    @property
    def own_nbytes(self) -> int:
        """Return the bytes of the adaptors' tensors."""
        return sum(adaptor.nbytes for adaptor in self.adaptors)

    @property
    def path(self) -> str:
        """Return the file that the task's metadata come from."""
        return self.adaptors[0].path if self.adaptors else self.foundation.path

    @property
    def metadata(self) -> dict[str, object]:
        """Return the task's metadata, without large arrays."""
        return self._stacked(lambda file: file.metadata)

    def full_metadata(self) -> dict[str, object]:
        """Return the task's metadata, read again from the files with the large arrays."""
        return self._stacked(lambda file: file.full_metadata())

    def _stacked(self, read: Callable[[Foundation | Adaptor], Mapping[str, object]]) -> dict[str, object]:
        """Return the whole model's metadata, with those keys in their place that low-rank adaptors carry."""
        metadata: dict[str, object] = {}
        is_whole = bool(self.adaptors) and not self.adaptors[0].is_low_rank
        files: list[Foundation | Adaptor] = [] if is_whole else [self.foundation]
        for file in [*files, *self.adaptors]:
            metadata |= read(file)
        return metadata

    def check_unchanged(self) -> None:
        """Raise AdaptorError (adaptor_changed, foundation_changed) if a mapped file was written to."""
        self.foundation.check_unchanged()
        for adaptor in self.adaptors:
            adaptor.check_unchanged()

    def table(self, names: tuple[str, ...], scaled: tuple[str, ...]) -> TensorTable:
        """Return what to bind a graph's slots and scale nodes to.

        names: of weights and factors.  scaled: the names b of the pairs whose products are scaled.
        """
        key = (names, scaled)
        if key not in self._tables:
            scales = {pair.b: pair.scale for pairs in self.pairs.values() for pair in pairs}
            tensors = [self.factors.get(name) or self.tensors[name] for name in names]
            self._tables[key] = TensorTable(tensors, [scales[name] for name in scaled])
        return self._tables[key]

    def where(self, name: str) -> Location:
        """Return where a tensor's bytes live.

        Raises: AdaptorError (tensor_not_found).
        """
        if name not in self.tensors:
            raise AdaptorError(f"task {self.task!r} has no tensor {name!r}", code="tensor_not_found")
        tensor, owner = self.tensors[name], self._owner.get(name)
        if owner is not None:
            return Location("adaptor", tensor.type.name, tensor.nbytes, owner.path)
        return Location("foundation", tensor.type.name, tensor.nbytes, self.foundation.path)

    def low_rank_on(self, name: str) -> tuple[LowRankPart, ...]:
        """Return the low-rank pairs on a tensor, in the order in which they count.

        Raises: AdaptorError (tensor_not_found).
        """
        self.where(name)
        parts = [c.adaptor for c in self.components if name in c.adaptor.alphas]
        return tuple(
            LowRankPart(adaptor.path, self.factors[pair.b].ne[0], pair.scale)
            for adaptor, pair in zip(parts, self.pairs.get(name, ()), strict=True)
        )

    def differing(self, other: TaskWeights) -> set[str]:
        """Return the names of the tensors that are not the same in both tasks, or not in both.

        Adaptors' tensors are compared by their digests where these are known, else by their files' content.
        """
        ours, theirs = self._origins(), other._origins()
        return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}

    def _origins(self) -> dict[str, Hashable]:
        """Return, for each tensor, what says whether another task's is the same."""
        origins: dict[str, Hashable] = {}
        for name, tensor in self.tensors.items():
            owner = self._owner.get(name)
            if owner is None:
                source: Hashable = "foundation"
            else:
                source = (tensor.type, owner.digests.get(name) or (owner.content_id, name))
            added = [(c.adaptor.content_id, c.factor) for c in self.components if name in c.adaptor.alphas]
            origins[name] = (source, *added)
        return origins
