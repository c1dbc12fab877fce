"""Right calls of ops whose operands have to fit each other closely, which fuzz_cases.py would hardly ever hit upon.

Each function here is named as the op that it calls, and gives its arguments but for the Context; one thing in them may
be changed afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from pyggml_adapt.ggml import OpHint, OpPool, Prec, RopeType, Type

Argument = dict[str, Any]
FLOATS = ("F32", "F16")


class Draw:
    """Draws the numbers and leaves of one call.

    add: adds a leaf (type, ne, whether a parameter), and gives its number.  call: adds a call of an op before this one.
    """

    def __init__(
        self, source: random.Random, add: Callable[[str, list[int], bool], int], call: Callable[[str], Argument]
    ):
        self.one_of = source.choice
        self.up_to = lambda n: source.randint(1, n)
        self.call = call
        self._add = add

    def tensor(self, type: str, *ne: int, is_param: bool = False) -> Argument:
        """Return a new leaf as an argument."""
        return {"t": self._add(type, list(ne), is_param)}


def numbers(*values: float) -> list[Argument]:
    """Return numbers as arguments."""
    return [{"n": value} for value in values]


def several(*values: int) -> Argument:
    """Return a sequence of numbers as one argument."""
    return {"l": numbers(*values)}


class Window:
    """Sizes, strides, paddings and dilations of a convolution in `n` dimensions that has a result."""

    def __init__(self, draw: Draw, n: int):
        self.kernel = [draw.up_to(3) for _ in range(n)]
        self.strides = [draw.up_to(2) for _ in range(n)]
        self.pads = [draw.one_of((0, 0, 1)) for _ in range(n)]
        self.dilations = [draw.up_to(2) for _ in range(n)]
        self.data = [d * (k - 1) + draw.up_to(6) for k, d in zip(self.kernel, self.dilations, strict=True)]
        self.n_in, self.n_out, self.n_batch = (draw.up_to(3) for _ in range(3))

    @property
    def result(self) -> list[int]:
        """Return the sizes of the result."""
        each = zip(self.data, self.pads, self.dilations, self.kernel, self.strides, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in each]

    @property
    def numbers(self) -> list[Argument]:
        """Return strides, paddings and dilations."""
        return numbers(*self.strides, *self.pads, *self.dilations)


def columns(draw: Draw) -> tuple[Window, list[Argument]]:
    """Return the window of an im2col, and its numbers: in one dimension or two."""
    window = Window(draw, draw.up_to(2))
    if len(window.kernel) == 2:
        return window, [*window.numbers, {"n": 1}]
    (s,), (p,), (d,) = window.strides, window.pads, window.dilations
    return window, numbers(s, 1, p, 0, d, 1, 0)


def im2col(draw: Draw) -> list[Argument]:
    window, given = columns(draw)
    kernel = draw.tensor(draw.one_of(FLOATS), *window.kernel, window.n_in, window.n_out)
    data = draw.tensor("F32", *window.data, window.n_in, window.n_batch)
    return [kernel, data, *given, {"n": int(Type[draw.one_of(FLOATS)])}]


def im2col_back(draw: Draw) -> list[Argument]:
    window, given = columns(draw)
    n_rows = window.n_in
    for size in window.kernel:
        n_rows *= size
    gradient = draw.tensor("F32", n_rows, *window.result, window.n_batch)
    kernel = draw.tensor(draw.one_of(FLOATS), *window.kernel, window.n_in, window.n_out)
    ne = [*window.data, window.n_in, window.n_batch]
    return [gradient, kernel, several(*(ne + [1])[:4]), *given]


def im2col_3d(draw: Draw) -> list[Argument]:
    return [*conv_3d(draw), {"n": int(Type[draw.one_of(FLOATS)])}]


def conv_3d(draw: Draw) -> list[Argument]:
    window = Window(draw, 3)
    kernel = draw.tensor(draw.one_of(FLOATS), *window.kernel, window.n_in * window.n_out)
    data = draw.tensor("F32", *window.data, window.n_in * window.n_batch)
    return [kernel, data, {"n": window.n_in}, *window.numbers]


def conv_3d_direct(draw: Draw) -> list[Argument]:
    window = Window(draw, 3)
    kernel = draw.tensor(draw.one_of(FLOATS), *window.kernel, window.n_in * window.n_out)
    data = draw.tensor("F32", *window.data, window.n_in * window.n_batch)
    return [kernel, data, *window.numbers, *numbers(window.n_in, window.n_batch, window.n_out)]


def conv_1d(draw: Draw) -> list[Argument]:
    window = Window(draw, 1)
    kernel = draw.tensor(draw.one_of(FLOATS), *window.kernel, window.n_in, window.n_out)
    return [kernel, draw.tensor("F32", *window.data, window.n_in, window.n_batch), *window.numbers]


def conv_1d_ph(draw: Draw) -> list[Argument]:
    kernel, data, stride, _, dilation = conv_1d(draw)
    return [kernel, data, stride, dilation]


def conv_1d_dw(draw: Draw) -> list[Argument]:
    window = Window(draw, 1)
    kernel = draw.tensor(draw.one_of(FLOATS), *window.kernel, 1, window.n_in * window.n_out)
    return [kernel, draw.tensor("F32", *window.data, window.n_in), *window.numbers]


def conv_1d_dw_ph(draw: Draw) -> list[Argument]:
    kernel, data, stride, _, dilation = conv_1d_dw(draw)
    return [kernel, data, stride, dilation]


def conv_2d(draw: Draw) -> list[Argument]:
    window = Window(draw, 2)
    kernel = draw.tensor(draw.one_of(FLOATS), *window.kernel, window.n_in, window.n_out)
    return [kernel, draw.tensor("F32", *window.data, window.n_in, window.n_batch), *window.numbers]


def conv_2d_dw(draw: Draw) -> list[Argument]:
    window = Window(draw, 2)
    kernel = draw.tensor("F16", *window.kernel, 1, window.n_in)
    return [kernel, draw.tensor("F32", *window.data, window.n_in, window.n_batch), *window.numbers]


def conv_2d_sk_p0(draw: Draw) -> list[Argument]:
    kernel, blocks = ([draw.up_to(4), draw.up_to(4)] for _ in range(2))
    n_in = draw.up_to(3)
    data = [k * n for k, n in zip(kernel, blocks, strict=True)]
    return [draw.tensor("F16", *kernel, n_in, draw.up_to(3)), draw.tensor("F32", *data, n_in, draw.up_to(2))]


def conv_2d_s1_ph(draw: Draw) -> list[Argument]:
    kernel, data = [draw.one_of((1, 3)), draw.one_of((1, 3, 5))], [draw.up_to(8), draw.up_to(8)]
    n_in = draw.up_to(3)
    return [draw.tensor("F16", *kernel, n_in, draw.up_to(3)), draw.tensor("F32", *data, n_in, draw.up_to(2))]


def pool_1d(draw: Draw) -> list[Argument]:
    k0 = draw.up_to(3)
    data = draw.tensor(draw.one_of(FLOATS), k0 + draw.up_to(6), draw.up_to(3))
    return [data, *numbers(draw.one_of((OpPool.MAX, OpPool.AVG)), k0, draw.up_to(2), k0 - draw.up_to(k0))]


def pool_2d(draw: Draw) -> list[Argument]:
    return pool_2d_back(draw)[1:]


def pool_2d_back(draw: Draw) -> list[Argument]:
    kernel, strides = ([draw.up_to(3), draw.up_to(3)] for _ in range(2))
    pads = [draw.one_of((0.0, 0.0, 0.5, 1.0)) if k > 1 else 0.0 for k in kernel]
    data = [k + draw.up_to(6) for k in kernel]
    pooled = [int((n + 2 * p - k) / s) + 1 for n, p, k, s in zip(data, pads, kernel, strides, strict=True)]
    more = [draw.up_to(3), draw.up_to(2)]
    op = int(draw.one_of(list(OpPool)))
    return [
        draw.tensor("F32", *pooled, *more),
        draw.tensor("F32", *data, *more),
        *numbers(op, *kernel, *strides, *pads),
    ]


def opt_step_adamw(draw: Draw) -> list[Argument]:
    ne = [draw.up_to(8), draw.up_to(4)]
    return [
        draw.tensor("F32", *ne, is_param=True),
        *(draw.tensor("F32", *ne) for _ in range(3)),
        draw.tensor("F32", 7),
    ]


def opt_step_sgd(draw: Draw) -> list[Argument]:
    ne = [draw.up_to(8), draw.up_to(4)]
    return [draw.tensor("F32", *ne, is_param=True), draw.tensor("F32", *ne), draw.tensor("F32", 2)]


def rope_ext(draw: Draw) -> list[Argument]:
    mode = draw.one_of((RopeType.NORMAL, RopeType.NEOX))
    heads, n_dims, n_tokens, factors = rotated(draw, 8 * draw.up_to(2))
    return [heads, draw.tensor("I32", n_tokens), factors, *numbers(n_dims, int(mode)), *yarn(draw)]


def rope(draw: Draw) -> list[Argument]:
    heads, pos, _, n_dims, mode, *_ = rope_ext(draw)
    return [heads, pos, n_dims, mode]


def rope_multi(draw: Draw) -> list[Argument]:
    mode, n_embd_head = draw.one_of(list(RopeType)), 8 * draw.up_to(2)
    has_sections = mode not in (RopeType.NORMAL, RopeType.NEOX)
    heads, n_dims, n_tokens, factors = rotated(draw, n_embd_head, n_embd_head // 2 if mode == RopeType.VISION else 0)
    pos = draw.tensor("I32", n_tokens * (4 if has_sections else 1))
    sections = [draw.up_to(2), draw.one_of((1, 2)), draw.one_of((1, 2)), draw.one_of((1, 1, 2))]
    return [heads, pos, factors, {"n": n_dims}, several(*sections), {"n": int(mode)}, *yarn(draw)]


def rope_set_offset(draw: Draw) -> list[Argument]:
    return [draw.call(draw.one_of(("rope_ext", "rope_ext_inplace", "rope_ext_back"))), {"n": draw.one_of((0, 2, 4))}]


def flash_attn_ext(draw: Draw) -> list[Argument]:
    n_embd_head, n_tokens, n_kv, n_head_kv, n_seq = 8 * draw.up_to(4), *(draw.up_to(4) for _ in range(4))
    n_head = n_head_kv * draw.up_to(2)
    q = draw.tensor("F32", n_embd_head, n_tokens, n_head, n_seq)
    k, v = (draw.tensor(draw.one_of(FLOATS), n_embd_head, n_kv, n_head_kv, n_seq) for _ in range(2))
    mask = draw.tensor("F16", n_kv, n_tokens) if draw.one_of((False, True)) else {"none": 1}
    sinks = draw.tensor("F32", n_head) if draw.one_of((False, True)) else {"none": 1}
    return [q, k, v, mask, *numbers(0.5, 0.0, draw.one_of((0.0, 8.0))), sinks]


def flash_attn_ext_get_prec(draw: Draw) -> list[Argument]:
    return [draw.call("flash_attn_ext")]


def prec_set_acc(draw: Draw) -> list[Argument]:
    return [draw.call(draw.one_of(("mul_mat", "mul_mat_id", "flash_attn_ext"))), {"n": Prec.F32}]


def lightning_indexer(draw: Draw) -> list[Argument]:
    n_embd, n_head, n_tokens, n_kv, n_seq = (draw.up_to(4) for _ in range(5))
    return [
        draw.tensor("F32", n_embd, n_head, n_tokens, n_seq),
        draw.tensor(draw.one_of(FLOATS), n_embd, 1, n_kv, n_seq),
        draw.tensor("F32", n_head, n_tokens, 1, n_seq),
        draw.tensor("F16", n_kv, n_tokens, 1, draw.one_of((1, n_seq))),
    ]


def flash_attn_ext_set_n_kv_max(draw: Draw) -> list[Argument]:
    return [draw.call("flash_attn_ext"), {"n": draw.one_of((0, 1, 4))}]


def mul_mat(draw: Draw) -> list[Argument]:
    n = 2 ** draw.up_to(5)
    return [draw.tensor(draw.one_of(FLOATS), n, n), draw.tensor("F32", n, draw.up_to(4))]


def mul_mat_id(draw: Draw) -> list[Argument]:
    k, n_ids, n_tokens = 8 * draw.up_to(4), draw.up_to(3), draw.up_to(4)
    experts = draw.tensor(draw.one_of(FLOATS), k, draw.up_to(8), 4)
    return [experts, draw.tensor("F32", k, draw.one_of((1, n_ids)), n_tokens), draw.tensor("I32", n_ids, n_tokens)]


def mul_mat_set_hint(draw: Draw) -> list[Argument]:
    return [draw.call("mul_mat"), {"n": int(draw.one_of(list(OpHint)))}]


def prec_set_src(draw: Draw) -> list[Argument]:
    return [draw.call("mul_mat"), *numbers(int(draw.one_of(list(Prec))), 1)]


def pad_ext(draw: Draw) -> list[Argument]:
    ne = [1 + draw.up_to(4) for _ in range(4)]
    return [draw.tensor("F32", *ne), *numbers(*(draw.one_of((0, 0, 1, 2)) for _ in range(8)))]


def get_rel_pos(draw: Draw) -> list[Argument]:
    n = draw.up_to(6)
    return [draw.tensor("F16", draw.up_to(8), 2 * n - 1), *numbers(n, n)]


def rotated(draw: Draw, n_embd_head: int, n_dims: int = 0) -> tuple[Argument, int, int, Argument]:
    """Return heads to be rotated, how much of them, of how many tokens, and what divides the frequencies."""
    n_tokens = draw.up_to(4)
    n_dims = n_dims or draw.one_of((n_embd_head, n_embd_head // 2))
    factors = draw.tensor("F32", n_embd_head // 2) if draw.one_of((False, True)) else {"none": 1}
    return draw.tensor(draw.one_of(FLOATS), n_embd_head, draw.up_to(3), n_tokens), n_dims, n_tokens, factors


def yarn(draw: Draw) -> list[Argument]:
    """Return the numbers of rope_ext from n_ctx_orig on."""
    return numbers(draw.one_of((0, 64)), 10000.0, draw.one_of((1.0, 0.5)), draw.one_of((0.0, 1.0)), 1.0, 32.0, 1.0)


def recurrent(draw: Draw, size: int, n_before: int, n_behind: int = 0) -> list[Argument]:
    """Return so many operands [S, n_head, n_tokens], so many more that it takes, and the state of its sequences."""
    n_head, n_seqs = draw.up_to(2), draw.up_to(2)
    n_tokens = n_seqs * draw.up_to(3)
    before = [draw.tensor("F32", size, n_head, n_tokens) for _ in range(n_before)]
    behind = [draw.tensor("F32", size, n_head) for _ in range(n_behind)]
    state = draw.tensor("F32", size * size * n_head, n_seqs)
    return [*before, *behind, *([draw.tensor("F32", size, n_head, n_tokens)] * bool(behind)), state]


def rwkv_wkv6(draw: Draw) -> list[Argument]:
    return recurrent(draw, draw.one_of((4, 8, 64)), 3, 1)


def rwkv_wkv7(draw: Draw) -> list[Argument]:
    return recurrent(draw, 64, 6)


def gated_linear_attn(draw: Draw) -> list[Argument]:
    return [*recurrent(draw, draw.one_of((4, 8, 64)), 4), {"n": 0.5}]


def gated_delta_net(draw: Draw) -> list[Argument]:
    size, n_head, n_tokens, n_seqs = draw.one_of((4, 8)), 2, draw.up_to(3), 2
    q, k = (draw.tensor("F32", size, draw.up_to(2), n_tokens, draw.up_to(2)) for _ in range(2))
    v = draw.tensor("F32", size, n_head, n_tokens, n_seqs)
    g = draw.tensor("F32", draw.one_of((1, size)), n_head, n_tokens, n_seqs)
    beta, state = draw.tensor("F32", 1, n_head, n_tokens, n_seqs), draw.tensor("F32", size, size, n_head, n_seqs)
    return [q, k, v, g, beta, state, {"n": draw.up_to(3)}]


def ssm_scan(draw: Draw) -> list[Argument]:
    d_state, dim, n_group, n_tokens, n_seqs, n = draw.one_of((4, 16)), *(draw.up_to(3) for _ in range(5))
    n_head = n_group * draw.up_to(2)
    scalar = draw.one_of((False, True))
    if not scalar:
        dim = 1
    s, x = draw.tensor("F32", d_state, dim, n_head, n + 2), draw.tensor("F32", dim, n_head, n_tokens, n_seqs)
    dt = draw.tensor("F32", n_head, n_tokens, n_seqs)
    a = draw.tensor("F32", 1 if scalar else d_state, n_head)
    b, c = (draw.tensor("F32", d_state, n_group, n_tokens, n_seqs) for _ in range(2))
    return [s, x, dt, a, b, c, draw.tensor("I32", n_seqs), {"n": draw.up_to(3) if scalar else 1}]


def set(draw: Draw) -> list[Argument]:
    return written(draw, draw.one_of(("F32", "I32")), 3)


def set_1d(draw: Draw) -> list[Argument]:
    return written(draw, draw.one_of(("F32", "I32")), 0)


def set_2d(draw: Draw) -> list[Argument]:
    return written(draw, draw.one_of(("F32", "I32")), 1)


def acc(draw: Draw) -> list[Argument]:
    return written(draw, "F32", 3)


def written(draw: Draw, type: str, n_strides: int) -> list[Argument]:
    """Return a tensor, one to be written into it, that many strides, and an offset."""
    ne = [draw.up_to(6) for _ in range(3)]
    inner = [draw.up_to(n) if i <= n_strides else 1 for i, n in enumerate(ne)]
    nb = [4 * ne[0], 4 * ne[0] * ne[1], 4 * ne[0] * ne[1] * ne[2]]
    offset = 4 * draw.one_of(range(ne[0] - inner[0] + 1))
    return [draw.tensor(type, *ne), draw.tensor(type, *inner), *numbers(*nb[:n_strides], offset)]


def get_rows(draw: Draw) -> list[Argument]:
    return [draw.tensor(draw.one_of(FLOATS), draw.up_to(8), 5), draw.tensor("I32", draw.up_to(3))]


def set_rows(draw: Draw) -> list[Argument]:
    n, k = draw.up_to(8), draw.up_to(3)
    ids = draw.tensor(draw.one_of(("I32", "I64")), k)
    return [draw.tensor(draw.one_of(FLOATS), n, 4), draw.tensor(draw.one_of(FLOATS), n, k), ids]


def add_cast(draw: Draw) -> list[Argument]:
    ne = [64, draw.up_to(4)]
    a, b, result = draw.one_of((("F16", "F16", "F16"), ("BF16", "F32", "F32"), ("Q4_0", "F32", "Q8_0")))
    return [draw.tensor(a, *ne), draw.tensor(b, *ne), {"n": int(Type[result])}]


def roll(draw: Draw) -> list[Argument]:
    ne = [draw.up_to(5) for _ in range(4)]
    return [draw.tensor("F32", *ne), *numbers(*(draw.one_of(range(1 - n, n)) for n in ne))]


def add_id(draw: Draw) -> list[Argument]:
    n, n_ids, n_tokens = (draw.up_to(4) for _ in range(3))
    a, b = draw.tensor("F32", n, n_ids, n_tokens), draw.tensor("F32", n, draw.one_of((3, 4)))
    return [a, b, draw.tensor("I32", n_ids, n_tokens)]


def concat(draw: Draw) -> list[Argument]:
    ne, dim, type = [draw.up_to(4) for _ in range(4)], draw.up_to(4) - 1, draw.one_of((*FLOATS, "I32", "I64"))
    other = [draw.up_to(4) if i == dim else n for i, n in enumerate(ne)]
    return [draw.tensor(type, *ne), draw.tensor(type, *other), {"n": dim}]


def repeat_4d(draw: Draw) -> list[Argument]:
    ne = [draw.up_to(4) for _ in range(4)]
    return [draw.tensor(draw.one_of((*FLOATS, "I32")), *ne), *numbers(*(n * draw.up_to(3) for n in ne))]


def swiglu_clamp(draw: Draw) -> list[Argument]:
    ne, type = [draw.up_to(8), draw.up_to(4)], draw.one_of(FLOATS)
    return [draw.tensor(type, *ne), draw.tensor(type, *ne), {"n": draw.one_of((0.0, 1.0, 7.0))}]


def group_norm(draw: Draw) -> list[Argument]:
    n_channels = draw.up_to(6)
    data = draw.tensor("F32", draw.up_to(8), draw.up_to(3), n_channels, draw.up_to(2))
    return [data, *numbers(draw.one_of((1, n_channels)), 1e-5)]


def win_unpart(draw: Draw) -> list[Argument]:
    w, w0, h0 = draw.up_to(4), draw.up_to(8), draw.up_to(8)
    windows = -(-w0 // w) * -(-h0 // w)
    return [draw.tensor("F32", draw.up_to(4), w, w, windows), *numbers(w0, h0, w)]


CALLS: dict[str, Callable[[Draw], list[Argument]]] = {
    each.__name__: each
    for each in (
        im2col, im2col_back, im2col_3d, conv_1d, conv_1d_ph, conv_1d_dw, conv_1d_dw_ph, conv_2d, conv_2d_sk_p0,
        conv_2d_dw, conv_3d, conv_3d_direct, pool_2d, pool_2d_back, opt_step_adamw, opt_step_sgd, rope, rope_ext,
        rope_multi, rope_set_offset, flash_attn_ext, flash_attn_ext_set_n_kv_max, mul_mat, mul_mat_id,
        mul_mat_set_hint, prec_set_src, pad_ext, get_rel_pos, rwkv_wkv6, rwkv_wkv7, gated_linear_attn,
        gated_delta_net, ssm_scan, set, set_1d, set_2d, acc, get_rows, set_rows, add_cast, roll, win_unpart,
        conv_2d_s1_ph, pool_1d, flash_attn_ext_get_prec, prec_set_acc, lightning_indexer, add_id, concat, repeat_4d,
        swiglu_clamp, group_norm,
    )
} | {
    "conv_2d_direct": conv_2d, "conv_2d_dw_direct": conv_2d_dw, "rope_inplace": rope, "rope_ext_inplace": rope_ext,
    "rope_ext_back": rope_ext, "rope_multi_inplace": rope_multi, "rope_multi_back": rope_multi, "set_inplace": set,
    "set_1d_inplace": set_1d, "set_2d_inplace": set_2d, "acc_inplace": acc, "pad_ext_circular": pad_ext,
    "group_norm_inplace": group_norm,
}  # fmt: skip
