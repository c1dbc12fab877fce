from typing_extensions import disjoint_base

from pyggml_adapt.ggml.backend import Backend
from pyggml_adapt.ggml.context import Owner
from pyggml_adapt.ggml.graph import CGraph

@disjoint_base
class GraphPlan(Owner):
    def __new__(cls, backend: Backend, graph: CGraph) -> GraphPlan: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def graph(self) -> CGraph: ...
    def compute(self) -> None: ...
