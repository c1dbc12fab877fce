"""WeightStore: the adaptors that are known, which of them are in memory, and the tasks that are made of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from pyggml_adapt.errors import AdaptorError
from pyggml_adapt.weights.adaptor import Adaptor
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.task import Component, TaskWeights

BASE = "base"
Recipe = tuple[tuple[str, float], ...]  # adaptors' names and the factors of their low-rank pairs


class WeightStore:
    """One foundation, its adaptors and its tasks; not safe to use from several threads at once.

    max_nbytes: of the adaptors in memory, None for no limit; idle ones leave, those used longest ago first.
    on_leave: is called before an adaptor leaves memory.
    """

    def __init__(self, foundation: Foundation, *, max_nbytes: int | None, on_leave: Callable[[Adaptor], None]):
        self.foundation, self.max_nbytes = foundation, max_nbytes
        self.n_loads = 0  # how often an adaptor was brought into memory
        self._on_leave = on_leave
        self._adaptors: dict[str, Adaptor] = {}
        self._recipes: dict[str, Recipe] = {}
        self._weights: dict[str, TaskWeights] = {}  # of tasks whose adaptors are all in memory
        self._resident: OrderedDict[Adaptor, None] = OrderedDict()  # the one used longest ago first

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks' names, in the order in which they were defined."""
        return tuple(self._recipes)

    @property
    def adaptors(self) -> Mapping[str, Adaptor]:
        """Return the adaptors by name."""
        return MappingProxyType(self._adaptors)

    @property
    def resident_nbytes(self) -> int:
        """Return the bytes of the adaptors in memory, those that were replaced but are still in use included."""
        return sum(adaptor.nbytes for adaptor in self._resident)

    def recipe(self, task: str) -> Recipe:
        """Return what a task is made of.

        Raises: AdaptorError (adaptor_not_found) naming the tasks that there are.
        """
        if task in self._recipes:
            return self._recipes[task]
        if task in self._adaptors:
            raise AdaptorError(
                f"adaptor {task!r} is low-rank and the foundation is not a whole model, so it is no task by itself: "
                f"define_task() puts it on top of another",
                code="adaptor_not_found",
            )
        raise AdaptorError(
            f"unknown task {task!r}; loaded tasks: {', '.join(self._recipes) or 'none'}", code="adaptor_not_found"
        )

    def adaptor(self, name: str) -> Adaptor:
        """Return an adaptor.  Raises: AdaptorError (adaptor_not_found) naming those that there are."""
        if name not in self._adaptors:
            known = ", ".join(self._adaptors) or "none"
            raise AdaptorError(f"unknown adaptor {name!r}; loaded adaptors: {known}", code="adaptor_not_found")
        return self._adaptors[name]

    def check_new(self, name: str) -> None:
        """Raise AdaptorError (adaptor_exists) if a task or an adaptor has the name."""
        if name in self._recipes or name in self._adaptors:
            raise AdaptorError(f"task {name!r} is loaded already", code="adaptor_exists")

    def add(self, adaptor: Adaptor) -> None:
        """Add an adaptor, and bring it in."""
        self.check_new(adaptor.name)
        self.bring_in(adaptor)
        self._adaptors[adaptor.name] = adaptor

    def define(self, task: str, recipe: Recipe) -> None:
        """Define a task by the adaptors it is made of."""
        self._recipes[task] = recipe

    def undefine(self, task: str) -> None:
        """Forget a task; its adaptors stay."""
        del self._recipes[task]
        self._weights.pop(task, None)

    def users(self, name: str) -> list[str]:
        """Return the tasks, other than the one of the same name, that an adaptor is part of."""
        return [task for task, recipe in self._recipes.items() if task != name and name in dict(recipe)]

    def remove(self, name: str) -> None:
        """Forget an adaptor that is not in use, with the task of its name, and give its memory back."""
        adaptor = self._adaptors.pop(name)
        self._recipes.pop(name, None)
        self._leave(adaptor)

    def replace(self, adaptor: Adaptor) -> Adaptor:
        """Let an adaptor take the place of the one of its name, and return that; who uses it keeps it."""
        old = self._adaptors[adaptor.name]
        adaptor.is_pinned, old.is_pinned = old.is_pinned, False
        self._adaptors[adaptor.name] = adaptor
        self._drop_weights(old)
        return old

    def discard(self, adaptor: Adaptor) -> None:
        """Give the memory of an adaptor that was replaced back, now or when it is released."""
        if not adaptor.n_users:
            self._leave(adaptor)

    def weights_of(self, task: str, recipe: Recipe) -> TaskWeights:
        """Return a task's weights with its adaptors in memory, but free to leave again.

        Raises: AdaptorError (adaptor_byte_limit_exceeded, adaptor_changed, ...), FileAccessError.
        """
        held: list[Adaptor] = []
        try:
            for name, _ in recipe:
                adaptor = self.adaptor(name)
                self.bring_in(adaptor)
                adaptor.n_users += 1  # so that the next one does not push it out
                held.append(adaptor)
            return TaskWeights(task, self.foundation, [Component(self._adaptors[name], f) for name, f in recipe])
        finally:
            for adaptor in held:
                adaptor.n_users -= 1

    def acquire(self, task: str) -> TaskWeights:
        """Return a task's weights, in memory until they are released.

        Raises: as recipe() and weights_of().
        """
        recipe = self.recipe(task)
        weights = self._weights.get(task)
        if weights is None:
            weights = self._weights[task] = self.weights_of(task, recipe)
        for adaptor in weights.adaptors:
            adaptor.n_users += 1
            self._resident.move_to_end(adaptor)
        return weights

    def release(self, weights: TaskWeights) -> None:
        """Undo acquire(); the adaptors may leave from then on, and do if they were replaced."""
        for adaptor in weights.adaptors:
            adaptor.n_users -= 1
            if self._adaptors.get(adaptor.name) is not adaptor:
                self.discard(adaptor)

    def bring_in(self, adaptor: Adaptor) -> None:
        """Bring an adaptor into memory, unless it is there.

        Raises: AdaptorError (adaptor_byte_limit_exceeded, adaptor_changed), FileAccessError.
        """
        if not adaptor.is_resident:
            self._make_room(adaptor)
            adaptor.bring_in()
            self.n_loads += 1
        self._resident[adaptor] = None
        self._resident.move_to_end(adaptor)

    def _make_room(self, adaptor: Adaptor) -> None:
        """Let idle adaptors leave until this one fits.

        Raises: AdaptorError (adaptor_byte_limit_exceeded); then none has left.
        """
        if self.max_nbytes is None:
            return
        idle = [each for each in self._resident if not each.n_users and not each.is_pinned]
        held = self.resident_nbytes - sum(each.nbytes for each in idle)
        if held + adaptor.nbytes > self.max_nbytes:
            raise AdaptorError(
                f"adaptor {adaptor.name!r} needs {adaptor.nbytes} bytes, but of max_adaptor_bytes = {self.max_nbytes} "
                f"only {max(self.max_nbytes - held, 0)} are free or idle: {held} are in use or pinned",
                code="adaptor_byte_limit_exceeded",
            )
        for each in idle:
            if self.resident_nbytes + adaptor.nbytes <= self.max_nbytes:
                break
            self._leave(each)

    def _leave(self, adaptor: Adaptor) -> None:
        """Give an adaptor's memory back."""
        self._drop_weights(adaptor)
        self._resident.pop(adaptor, None)
        if adaptor.is_resident:
            self._on_leave(adaptor)
            adaptor.let_go()

    def _drop_weights(self, adaptor: Adaptor) -> None:
        for task in [task for task, weights in self._weights.items() if adaptor in weights.adaptors]:
            del self._weights[task]

    def close(self) -> None:
        """Unmap everything."""
        for adaptor in list(self._resident):
            adaptor.let_go()
        self._resident.clear()
        self._adaptors.clear()
        self._recipes.clear()
        self._weights.clear()
        self.foundation.close()


def parse_recipe(parts: Sequence[str], known: Mapping[str, Adaptor]) -> Recipe:
    """Return the recipe that parts as "name" or "name:factor" describe.

    Raises: AdaptorError (adaptor_invalid) for a factor that is no finite number, or a name given twice.
    """
    recipe: list[tuple[str, float]] = []
    for part in parts:
        name, factor = part, 1.0
        if part not in known and ":" in part:
            name, _, number = part.rpartition(":")
            factor = _factor(part, number)
        if name in dict(recipe):
            raise AdaptorError(f"{part!r}: adaptor {name!r} is named twice", code="adaptor_invalid")
        recipe.append((name, factor))
    return tuple(recipe)


def _factor(part: str, number: str) -> float:
    try:
        factor = float(number)
    except ValueError:
        factor = float("nan")
    if not abs(factor) <= 1e6:  # NaN too
        raise AdaptorError(f"{part!r}: {number!r} is not a factor from -1e6 to 1e6", code="adaptor_invalid")
    return factor
