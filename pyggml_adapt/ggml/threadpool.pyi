from collections.abc import Iterable
from typing import Final, final

from pyggml_adapt.ggml.context import Owner
from pyggml_adapt.ggml.enums import SchedPriority

MAX_THREADS: Final[int]

@final
class Threadpool(Owner):
    def __new__(
        cls,
        n_threads: int | None = None,
        *,
        cpumask: Iterable[int] | None = None,
        prio: SchedPriority | int = ...,
        poll: int = 50,
        strict_cpu: bool = False,
        paused: bool = False,
    ) -> Threadpool: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def cpumask(self) -> frozenset[int] | None: ...
    @property
    def prio(self) -> SchedPriority: ...
    @property
    def poll(self) -> int: ...
    @property
    def strict_cpu(self) -> bool: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...

def check_priority(prio: SchedPriority) -> None: ...
def default_n_threads() -> int: ...
