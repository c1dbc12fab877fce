from typing import final

from pyggml_adapt.ggml.context import Owner

@final
class Callback(Owner): ...
