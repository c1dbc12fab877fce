from typing import final

from pyggml_adapt.ggml.backend import Backend
from pyggml_adapt.ggml.context import Owner
from pyggml_adapt.ggml.graph import CGraph

@final
class GraphPlan(Owner):
    def __new__(cls, backend: Backend, graph: CGraph) -> GraphPlan: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def graph(self) -> CGraph: ...
    def compute(self) -> None: ...
