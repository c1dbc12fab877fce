"""What a fork keeps: the hidden states between layers that a session sets aside for it, and which are worth it."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.errors import AllocError
from pyggml_adapt.models import HParams, Model
from pyggml_adapt.weights.task import TaskWeights


@dataclass(frozen=True, slots=True)
class ForkReport:
    """What a fork kept.

    n_tokens: of the session that was forked.  n_reused: those that were not computed from the bottom.
    differs: the first layer whose weights differ; n_layer if only the head's do, None if none do.
    first_layer: the layer that reused tokens were computed from, n_layer if none was.  It is below `differs` where the
    states at that layer were not kept.  saved: share of n_tokens x n_layer that was not computed.
    copied_nbytes: of the KV cache.
    """

    task: str
    n_tokens: int
    n_reused: int
    differs: int | None
    first_layer: int
    n_layer: int
    saved: float
    copied_nbytes: int


def first_difference(model: Model, weights: TaskWeights, other: Model, theirs: TaskWeights) -> int | None:
    """Return the first layer that two tasks compute differently: n_layer if only the head is, None if nothing is."""
    if type(model) is not type(other) or model.hp != other.hp:
        return 0
    names = weights.differing(theirs)
    return model.first_layer(names) if names else None


def choose(differences: Iterable[int | None], n_layer: int, most: int) -> tuple[int, ...]:
    """Return the layers at which states are kept for forks that differ from there on, at most `most`, and the head.

    If more are wanted, those are left out whose forks lose the fewest layers by starting at the next one below.
    """
    wanted = [layer for layer in differences if layer]
    kept = sorted({layer for layer in wanted if layer < n_layer})
    while len(kept) > most:
        below = dict(zip(kept, [0, *kept], strict=False))
        above = dict(zip(kept, [*kept[1:], n_layer], strict=True))
        loss = {layer: sum(layer <= each < above[layer] for each in wanted) * (layer - below[layer]) for layer in kept}
        kept.remove(min(kept, key=loss.__getitem__))
    return (*kept, n_layer) if n_layer in wanted else tuple(kept)


class Boundaries:
    """The inputs of some layers, for every token that a session evaluated in calls of several.

    Those of the head, if n_layer is among the layers, are one row: of the last token of the last call.
    """

    def __init__(self, layers: Iterable[int], hp: HParams, n_ctx: int):
        """Raises: AllocError."""
        self._n_layer = hp.n_layer
        self._states: dict[int, np.ndarray] = {}
        self._head = np.empty((1, hp.n_embd), dtype=np.float32) if hp.n_layer in layers else None
        self._head_end = -1  # the number of tokens up to the one whose row it is
        nbytes = n_ctx * hp.n_embd * 4
        try:
            for layer in layers:
                if layer < hp.n_layer:
                    memory = mmap.mmap(-1, nbytes)  # resident only where it is written
                    self._states[layer] = np.frombuffer(memory, dtype=np.float32).reshape(n_ctx, hp.n_embd)
        except (OSError, OverflowError) as error:
            raise AllocError(
                f"no memory for hidden states of {nbytes} bytes: use a smaller n_ctx than {n_ctx}"
            ) from error

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers whose inputs are kept, in ascending order."""
        return tuple(sorted(self._states)) if self._head is None else (*sorted(self._states), self._n_layer)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the states, as allocated."""
        return sum(states.nbytes for states in self._states.values()) + (0 if self._head is None else self._head.nbytes)

    def highest(self, differs: int) -> int:
        """Return the highest layer up to `differs` that a computation can start from, the head aside; 0 for none."""
        return max((layer for layer in self._states if layer <= differs), default=0)

    def has_head(self, n_tokens: int) -> bool:
        """Return whether the head's input is there for the last of the first n_tokens tokens."""
        return self._head is not None and self._head_end == n_tokens

    def read(self, layer: int, start: int, n_tokens: int) -> np.ndarray:
        """Return the input of a layer, F32 [n_tokens, n_embd]; of the head its one row."""
        if layer == self._n_layer and self._head is not None:
            return self._head
        return self._states[layer][start : start + n_tokens]

    def outputs(self, start: int, n_tokens: int, *, first_layer: int, with_head: bool) -> dict[int, np.ndarray]:
        """Return the arrays that the inputs of the layers above first_layer are to be written into."""
        wanted = {il: each[start : start + n_tokens] for il, each in self._states.items() if il > first_layer}
        if self._head is not None and first_layer < self._n_layer:
            self._head_end = start + n_tokens if with_head else -1
            if with_head:
                wanted[self._n_layer] = self._head
        return wanted

    def inherit(self, source: Boundaries, n_tokens: int, last_layer: int) -> None:
        """Copy the states of the first n_tokens tokens up to last_layer, and stop keeping those that `source` lacks."""
        for layer in [layer for layer in self._states if layer <= last_layer]:
            if layer in source._states:
                self._states[layer][:n_tokens] = source._states[layer][:n_tokens]
            else:
                del self._states[layer]
        if self._head is not None and source._head is not None and last_layer == self._n_layer:
            self._head[:] = source._head
            self._head_end = source._head_end
