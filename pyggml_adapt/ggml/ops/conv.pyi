from collections.abc import Sequence

from pyggml_adapt.ggml.context import Context, Tensor
from pyggml_adapt.ggml.enums import Type

def im2col(
    ctx: Context,
    a: Tensor,
    b: Tensor,
    s0: int,
    s1: int,
    p0: int,
    p1: int,
    d0: int,
    d1: int,
    is_2D: bool,
    dst_type: Type | int,
) -> Tensor: ...
def im2col_back(
    ctx: Context,
    a: Tensor,
    b: Tensor,
    ne: Sequence[int],
    s0: int,
    s1: int,
    p0: int,
    p1: int,
    d0: int,
    d1: int,
    is_2D: bool,
) -> Tensor: ...
def im2col_3d(
    ctx: Context,
    a: Tensor,
    b: Tensor,
    IC: int,
    s0: int,
    s1: int,
    s2: int,
    p0: int,
    p1: int,
    p2: int,
    d0: int,
    d1: int,
    d2: int,
    dst_type: Type | int,
) -> Tensor: ...
def col2im_1d(ctx: Context, a: Tensor, s0: int, oc: int, p0: int) -> Tensor: ...
def conv_1d(ctx: Context, a: Tensor, b: Tensor, s0: int, p0: int, d0: int) -> Tensor: ...
def conv_1d_ph(ctx: Context, a: Tensor, b: Tensor, s: int, d: int) -> Tensor: ...
def conv_1d_dw(ctx: Context, a: Tensor, b: Tensor, s0: int, p0: int, d0: int) -> Tensor: ...
def conv_1d_dw_ph(ctx: Context, a: Tensor, b: Tensor, s0: int, d0: int) -> Tensor: ...
def conv_2d(ctx: Context, a: Tensor, b: Tensor, s0: int, s1: int, p0: int, p1: int, d0: int, d1: int) -> Tensor: ...
def conv_2d_sk_p0(ctx: Context, a: Tensor, b: Tensor) -> Tensor: ...
def conv_2d_s1_ph(ctx: Context, a: Tensor, b: Tensor) -> Tensor: ...
def conv_2d_dw(ctx: Context, a: Tensor, b: Tensor, s0: int, s1: int, p0: int, p1: int, d0: int, d1: int) -> Tensor: ...
def conv_3d(
    ctx: Context,
    a: Tensor,
    b: Tensor,
    IC: int,
    s0: int,
    s1: int,
    s2: int,
    p0: int,
    p1: int,
    p2: int,
    d0: int,
    d1: int,
    d2: int,
) -> Tensor: ...
