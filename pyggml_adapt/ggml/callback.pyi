from typing_extensions import disjoint_base

from pyggml_adapt.ggml.context import Owner

@disjoint_base
class Callback(Owner): ...
