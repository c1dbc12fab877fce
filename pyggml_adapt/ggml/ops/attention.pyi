from pyggml_adapt.ggml.context import Context, Tensor
from pyggml_adapt.ggml.enums import Prec

def soft_max(ctx: Context, a: Tensor) -> Tensor: ...
def soft_max_inplace(ctx: Context, a: Tensor) -> Tensor: ...
def soft_max_ext(
    ctx: Context,
    a: Tensor,
    mask: Tensor | None,
    scale: float = 1.0,
    max_bias: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor: ...
def soft_max_ext_inplace(
    ctx: Context,
    a: Tensor,
    mask: Tensor | None,
    scale: float = 1.0,
    max_bias: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor: ...
def soft_max_ext_back(ctx: Context, a: Tensor, b: Tensor, scale: float = 1.0, max_bias: float = 0.0) -> Tensor: ...
def soft_max_ext_back_inplace(
    ctx: Context, a: Tensor, b: Tensor, scale: float = 1.0, max_bias: float = 0.0
) -> Tensor: ...
def flash_attn_ext(
    ctx: Context,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    max_bias: float = 0.0,
    logit_softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor: ...
def flash_attn_ext_get_prec(a: Tensor) -> Prec: ...
def flash_attn_ext_set_n_kv_max(a: Tensor, n_kv_max: int) -> Tensor: ...
def lightning_indexer(ctx: Context, q: Tensor, k: Tensor, weights: Tensor, mask: Tensor) -> Tensor: ...
