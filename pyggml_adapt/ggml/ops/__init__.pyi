from pyggml_adapt.ggml.ops.activations import *
from pyggml_adapt.ggml.ops.arithmetic import *
from pyggml_adapt.ggml.ops.attention import *
from pyggml_adapt.ggml.ops.layout import *
from pyggml_adapt.ggml.ops.matmul import *
