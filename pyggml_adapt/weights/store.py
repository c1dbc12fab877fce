"""WeightStore: which task finds which tensor where."""

from __future__ import annotations

from typing import NamedTuple

from pyggml_adapt.errors import AdaptorError
from pyggml_adapt.ggml import Tensor, TensorTable
from pyggml_adapt.weights.adaptor import Adaptor
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.mapping import MappedFile

BASE = "base"


class Location(NamedTuple):
    """Where the bytes of one tensor of a task live."""

    source: str  # "foundation" or "adaptor"
    type: str  # ggml's name of the type, as "Q8_0"
    nbytes: int
    path: str


_layouts: dict[tuple, int] = {}


class TaskWeights:
    """All tensors of one task, by name; those of its adaptor hide the foundation's."""

    def __init__(self, task: str, foundation: Foundation, adaptor: Adaptor | None):
        self.task, self.foundation, self.adaptor = task, foundation, adaptor
        self.tensors: dict[str, Tensor] = dict(foundation.tensors)
        self.file: MappedFile = foundation  # whose metadata is the task's
        if adaptor is not None:
            self.tensors = {
                name: adaptor.tensors.get(name) or foundation.tensors[name] for name in adaptor.identity.tensors
            }
            self.file = adaptor
        layout = tuple((name, t.type, t.ne) for name, t in sorted(self.tensors.items()))
        self.layout = _layouts.setdefault(layout, len(_layouts))  # equal layouts share graphs
        self._tables: dict[tuple[str, ...], TensorTable] = {}

    @property
    def own_nbytes(self) -> int:
        """Return the bytes of the adaptor's tensors, 0 without one."""
        return 0 if self.adaptor is None else self.adaptor.nbytes

    def table(self, names: tuple[str, ...]) -> TensorTable:
        """Return the data of the tensors `names`, in their order, to bind a graph's slots to."""
        if names not in self._tables:
            self._tables[names] = TensorTable([self.tensors[name] for name in names])
        return self._tables[names]

    def where(self, name: str) -> Location:
        """Return where a tensor's bytes live.

        Raises: AdaptorError (tensor_not_found).
        """
        if name not in self.tensors:
            raise AdaptorError(f"task {self.task!r} has no tensor {name!r}", code="tensor_not_found")
        tensor = self.tensors[name]
        if self.adaptor is not None and name in self.adaptor.tensors:
            return Location("adaptor", tensor.type.name, tensor.nbytes, self.adaptor.path)
        return Location("foundation", tensor.type.name, tensor.nbytes, self.foundation.path)


class WeightStore:
    """One foundation and the adaptors that are loaded beside it, by task."""

    def __init__(self, foundation: Foundation):
        self.foundation = foundation
        self._tasks: dict[str, TaskWeights] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks' names, in the order in which they were added."""
        return tuple(self._tasks)

    def __getitem__(self, task: str) -> TaskWeights:
        """Return a task's weights.

        Raises: AdaptorError (adaptor_not_found) naming the tasks that there are.
        """
        if task not in self._tasks:
            raise AdaptorError(
                f"unknown task {task!r}; loaded tasks: {', '.join(self._tasks) or 'none'}", code="adaptor_not_found"
            )
        return self._tasks[task]

    def add(self, weights: TaskWeights) -> None:
        """Add a task.

        Raises: AdaptorError (adaptor_exists).
        """
        self.check_new(weights.task)
        self._tasks[weights.task] = weights

    def check_new(self, task: str) -> None:
        """Raise AdaptorError (adaptor_exists) if the task is loaded already."""
        if task in self._tasks:
            raise AdaptorError(f"task {task!r} is loaded already", code="adaptor_exists")

    def remove(self, task: str) -> None:
        """Forget a task and unmap its adaptor.

        Raises: AdaptorError (adaptor_not_found; adaptor_in_use for the foundation's own task).
        """
        weights = self[task]
        if weights.adaptor is None:
            raise AdaptorError(f"task {task!r} is the foundation itself: close the host instead", code="adaptor_in_use")
        del self._tasks[task]
        weights.adaptor.close()

    def close(self) -> None:
        """Unmap everything."""
        for weights in self._tasks.values():
            if weights.adaptor is not None:
                weights.adaptor.close()
        self._tasks.clear()
        self.foundation.close()
