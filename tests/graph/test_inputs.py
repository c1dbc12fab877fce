"""Inputs: what is written into a graph before each computation."""

from types import SimpleNamespace

import numpy as np
import pytest

from pyggml_adapt.ggml import Context, Type
from pyggml_adapt.ggml.backend import Buffer, Device
from pyggml_adapt.graph.hparams import Window
from pyggml_adapt.graph.inputs import Inputs, hadamard, hadamard_sizes


class Batch:
    tokens = np.array([5, 6], np.int32)
    pos = np.array([8, 9], np.int32)
    cells = (np.array([3, 1], np.int64),)
    out_ids = np.array([1], np.int32)
    embd = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)

    def mask(self, part, n_kv):
        mask = np.zeros((2, n_kv), bool)
        mask[0, 3] = mask[1, 1] = mask[1, 3] = True
        return mask


class OneStep:
    def __init__(self, token, pos, seen=None):
        self.token, self.pos, self.cells = token, pos, (pos, pos)
        self._seen = seen

    def seen(self, part, n_kv):
        return self._seen


def hparams(**more):
    """Return what the inputs need to know of a model: V of three elements in each layer."""
    usual = {
        "n_embd_v_gqa": 3,
        "f_attn_temp_scale": 0.0,
        "f_max_alibi_bias": 0.0,
        "window": None,
        "is_swa": lambda il: bool(il),
    }
    return SimpleNamespace(**usual | more)


def tensors_of(inputs):
    """Return all tensors, by name."""
    attn = {name: getattr(inputs.parts[0], name) for name in ("k_idxs", "v_idxs", "kq_mask", "k_rot", "v_rot")}
    own = {name: getattr(inputs, name) for name in ("tokens", "embd", "pos", "attn_scale", "out_ids")}
    swa = {f"{name}_swa": getattr(part, name) for part in inputs.parts[1:] for name in ("k_idxs", "v_idxs", "kq_mask")}
    return {name: tensor for name, tensor in {**own, **attn, **swa}.items() if tensor is not None}


def filled(flash_attn, *, unused=(), **options):
    """Return the filled inputs of a small batch, and their tensors by name."""
    ctx = Context(Context.size_for(32))
    inputs = Inputs(ctx, hparams(), n_tokens=2, n_outputs=1, n_kv=(4,), n_cells=(4,), flash_attn=flash_attn, **options)
    tensors = tensors_of(inputs)
    buffer = Buffer.allocate(Device.cpu().buffer_type, 1 << 20)
    for i, tensor in enumerate(tensor for name, tensor in tensors.items() if name not in unused):
        buffer.place(tensor, i << 16)
    inputs.prepare()
    inputs.fill(Batch())
    return inputs, SimpleNamespace(**tensors)


def test_flash_attention():
    _, inputs = filled(True)
    assert inputs.tokens.to_numpy().tolist() == [5, 6]
    assert inputs.pos.to_numpy().tolist() == [8, 9]
    assert inputs.k_idxs.to_numpy().tolist() == inputs.v_idxs.to_numpy().tolist() == [3, 1]
    assert inputs.out_ids.to_numpy().tolist() == [1]
    assert inputs.kq_mask.type == Type.F16
    inf = -np.inf
    assert inputs.kq_mask.to_numpy().tolist() == [[inf, inf, inf, 0.0], [inf, 0.0, inf, 0.0]]


def test_v_is_transposed_without_flash_attention():
    _, inputs = filled(False)
    assert inputs.kq_mask.type == Type.F32
    assert inputs.v_idxs.to_numpy().tolist() == [3, 7, 11, 1, 5, 9]  # cell + element * n_cells


def test_no_outputs():
    ctx = Context(Context.size_for(32))
    inputs = Inputs(ctx, hparams(), n_tokens=2, n_outputs=0, n_kv=(4,), n_cells=(4,), flash_attn=True)
    assert inputs.out_ids is None


def test_a_mask_that_no_node_uses_is_not_written():
    _, tensors = filled(True, unused=("kq_mask",))
    assert not tensors.kq_mask.is_allocated


def test_hidden_states_take_the_place_of_tokens():
    _, inputs = filled(True, unused=("tokens",), n_embd=4)
    assert (inputs.embd.name, inputs.embd.type, inputs.embd.ne) == ("inp_embd", Type.F32, (4, 2, 1, 1))
    np.testing.assert_array_equal(inputs.embd.to_numpy(), Batch.embd)
    assert not inputs.tokens.is_allocated and inputs.pos.to_numpy().tolist() == [8, 9]


def test_a_graph_of_the_head_alone_has_only_hidden_states():
    unused = ("tokens", "pos", "k_idxs", "v_idxs", "out_ids", "k_rot", "v_rot", "kq_mask")
    _, inputs = filled(False, unused=unused, n_embd=4, k_rot=64, v_rot=64)
    np.testing.assert_array_equal(inputs.embd.to_numpy(), Batch.embd)


class OneToken:
    def __init__(self, token, pos, n_swa):
        self.tokens, self.pos, self.n_swa = np.array([token], np.int32), np.array([pos], np.int32), n_swa
        self.cells, self.out_ids = [np.array([pos], np.int64)] * 2, np.zeros(1, np.int32)

    def mask(self, part, n_kv):
        cells = np.arange(n_kv)[None]
        return (cells <= self.pos[0]) & (cells > self.pos[0] - (self.n_swa if part else n_kv))


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("n_swa", [0, 1, 3, 8, 100])
@pytest.mark.parametrize("pos", [0, 3, 7])
def test_a_step_is_a_batch_of_one_token_in_order(flash_attn, pos, n_swa):
    ctx, parts = Context(Context.size_for(32)), 2 if n_swa else 1
    hp = hparams(window=Window(n_swa), f_attn_temp_scale=0.1, f_attn_temp_offset=1.0, n_attn_temp_floor_scale=4)
    sizes = {"n_kv": (8, 8)[:parts], "n_cells": (16, 12)[:parts]}
    inputs = Inputs(ctx, hp, n_tokens=1, n_outputs=1, flash_attn=flash_attn, **sizes)
    tensors = list(tensors_of(inputs).values())
    assert len(tensors) == 7 + 3 * (parts - 1)
    buffer = Buffer.allocate(Device.cpu().buffer_type, 1 << 16, clear=True)
    for i, tensor in enumerate(tensors):
        buffer.place(tensor, i << 12)
    inputs.prepare()
    inputs.fill(OneToken(123456, pos, n_swa))
    want = [tensor.to_numpy() for tensor in tensors]
    for tensor in tensors:
        tensor.set_data(b"\x55" * tensor.nbytes)
    inputs.fill_step(OneStep(123456, pos))
    for tensor, array in zip(tensors, want, strict=True):
        np.testing.assert_array_equal(tensor.to_numpy(), array, err_msg=tensor.name)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_a_step_in_other_cells(flash_attn):
    ctx, seen = Context(Context.size_for(32)), np.array([True, False, False, True, True, False, False, True])
    inputs = Inputs(ctx, hparams(), n_tokens=1, n_outputs=1, n_kv=(8,), n_cells=(16,), flash_attn=flash_attn)
    buffer = Buffer.allocate(Device.cpu().buffer_type, 1 << 16, clear=True)
    for i, tensor in enumerate(tensors_of(inputs).values()):
        buffer.place(tensor, i << 12)
    inputs.prepare()
    for _ in range(2):
        inputs.fill_step(OneStep(9, 3, seen))
        assert (inputs.parts[0].kq_mask.to_numpy() == 0).tolist() == seen.tolist()
        assert inputs.parts[0].k_idxs.to_numpy().tolist() == [3]


def test_scale_of_attention_by_position():
    """1 + 0.1 ln(1 + floor((pos + 1) / 4))"""
    ctx = Context(Context.size_for(32))
    hp = hparams(f_attn_temp_scale=0.1, f_attn_temp_offset=1.0, n_attn_temp_floor_scale=4)
    inputs = Inputs(ctx, hp, n_tokens=2, n_outputs=0, n_kv=(4,), n_cells=(4,), flash_attn=True)
    buffer = Buffer.allocate(Device.cpu().buffer_type, 1 << 16)
    for i, tensor in enumerate(tensors_of(inputs).values()):
        buffer.place(tensor, i << 12)
    inputs.fill(Batch())  # positions 8 and 9
    assert (inputs.attn_scale.name, inputs.attn_scale.ne) == ("inp_attn_scale", (1, 1, 2, 1))
    want = [1 + 0.1 * np.log(3), 1 + 0.1 * np.log(3)]
    np.testing.assert_allclose(inputs.attn_scale.to_numpy().ravel(), want, rtol=1e-7)


def test_names():
    _, inputs = filled(True, k_rot=64, v_rot=64)
    names = [getattr(inputs, name).name for name in ("tokens", "pos", "k_idxs", "v_idxs", "kq_mask", "k_rot", "v_rot")]
    assert names == [
        "inp_tokens",
        "inp_pos",
        "attn_inp_k_idxs",
        "attn_inp_v_idxs",
        "attn_inp_kq_mask",
        "attn_inp_k_rot",
        "attn_inp_v_rot",
    ]


def test_constants():
    _, inputs = filled(True, k_rot=128, v_rot=64)
    np.testing.assert_array_equal(inputs.k_rot.to_numpy(), hadamard(128))
    np.testing.assert_array_equal(inputs.v_rot.to_numpy(), hadamard(64))


@pytest.mark.parametrize("n", [1, 2, 64, 256])
def test_hadamard(n):
    matrix = hadamard(n)
    assert (matrix.dtype, matrix.shape) == (np.float32, (n, n))
    np.testing.assert_allclose(matrix @ matrix, np.eye(n), atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.parametrize(("type_k", "type_v", "n_k", "n_v", "sizes"), [
    ("F16", "F16", 128, 128, (0, 0)),
    ("Q8_0", "F16", 128, 128, (128, 0)),
    ("F16", "Q4_0", 128, 128, (0, 64)),
    ("Q8_0", "Q8_0", 64, 64, (64, 64)),
    ("Q8_0", "Q8_0", 32, 32, (0, 0)),
    ("Q8_0", "Q8_0", 192, 96, (64, 0)),
    ("Q4_0", "BF16", 256, 256, (256, 0)),
])  # fmt: skip
def test_sizes_of_rotations(type_k, type_v, n_k, n_v, sizes):
    assert hadamard_sizes(Type[type_k], Type[type_v], n_k, n_v) == sizes
