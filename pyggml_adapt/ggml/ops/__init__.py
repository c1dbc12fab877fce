"""One function per ggml op: each returns a new Tensor in `ctx`, to be computed by a graph.

ggml ends the process when an op's precondition fails; each is checked here first and raised as ShapeError or
DTypeError.  Operands may live in other contexts; these then stay alive with `ctx`.
"""

from pyggml_adapt.ggml.ops.activations import *
from pyggml_adapt.ggml.ops.arithmetic import *
from pyggml_adapt.ggml.ops.attention import *
from pyggml_adapt.ggml.ops.conv import *
from pyggml_adapt.ggml.ops.conv_direct import *
from pyggml_adapt.ggml.ops.custom import *
from pyggml_adapt.ggml.ops.layout import *
from pyggml_adapt.ggml.ops.losses import *
from pyggml_adapt.ggml.ops.masks import *
from pyggml_adapt.ggml.ops.matmul import *
from pyggml_adapt.ggml.ops.norms import *
from pyggml_adapt.ggml.ops.pool import *
from pyggml_adapt.ggml.ops.recurrent import *
from pyggml_adapt.ggml.ops.reductions import *
from pyggml_adapt.ggml.ops.resize import *
from pyggml_adapt.ggml.ops.rope import *
from pyggml_adapt.ggml.ops.rows import *
from pyggml_adapt.ggml.ops.windows import *
