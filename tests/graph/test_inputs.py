"""Inputs: what is written into a graph before each computation."""

import numpy as np
import pytest

from pyggml_adapt.ggml import Context, Type
from pyggml_adapt.ggml.backend import Buffer, Device
from pyggml_adapt.graph.inputs import Inputs, hadamard, hadamard_sizes


class Batch:
    tokens = np.array([5, 6], np.int32)
    pos = np.array([8, 9], np.int32)
    cells = np.array([3, 1], np.int64)
    out_ids = np.array([1], np.int32)
    embd = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)

    def mask(self, n_kv):
        mask = np.zeros((2, n_kv), bool)
        mask[0, 3] = mask[1, 1] = mask[1, 3] = True
        return mask


def filled(flash_attn, *, unused=(), **options):
    ctx = Context(Context.size_for(32))
    inputs = Inputs(ctx, n_tokens=2, n_outputs=1, n_kv=4, n_cells=4, n_embd_v_gqa=3, flash_attn=flash_attn, **options)
    names = ("tokens", "embd", "pos", "k_idxs", "v_idxs", "out_ids", "k_rot", "v_rot", "kq_mask")
    tensors = [getattr(inputs, name) for name in names if name not in unused and getattr(inputs, name) is not None]
    buffer = Buffer.allocate(Device.cpu().buffer_type, 1 << 20)
    for i, tensor in enumerate(tensors):
        buffer.place(tensor, i << 16)
    inputs.fill_constants()
    inputs.fill(Batch())
    return inputs


def test_flash_attention():
    inputs = filled(True)
    assert inputs.tokens.to_numpy().tolist() == [5, 6]
    assert inputs.pos.to_numpy().tolist() == [8, 9]
    assert inputs.k_idxs.to_numpy().tolist() == inputs.v_idxs.to_numpy().tolist() == [3, 1]
    assert inputs.out_ids.to_numpy().tolist() == [1]
    assert inputs.kq_mask.type == Type.F16
    inf = -np.inf
    assert inputs.kq_mask.to_numpy().tolist() == [[inf, inf, inf, 0.0], [inf, 0.0, inf, 0.0]]


def test_v_is_transposed_without_flash_attention():
    inputs = filled(False)
    assert inputs.kq_mask.type == Type.F32
    assert inputs.v_idxs.to_numpy().tolist() == [3, 7, 11, 1, 5, 9]  # cell + element * n_cells


def test_no_outputs():
    ctx = Context(Context.size_for(32))
    inputs = Inputs(ctx, n_tokens=2, n_outputs=0, n_kv=4, n_cells=4, n_embd_v_gqa=3, flash_attn=True)
    assert inputs.out_ids is None


def test_a_mask_that_no_node_uses_is_not_written():
    assert not filled(True, unused=("kq_mask",)).kq_mask.is_allocated


def test_hidden_states_take_the_place_of_tokens():
    inputs = filled(True, unused=("tokens",), n_embd=4)
    assert (inputs.embd.name, inputs.embd.type, inputs.embd.ne) == ("inp_embd", Type.F32, (4, 2, 1, 1))
    np.testing.assert_array_equal(inputs.embd.to_numpy(), Batch.embd)
    assert not inputs.tokens.is_allocated and inputs.pos.to_numpy().tolist() == [8, 9]


def test_a_graph_of_the_head_alone_has_only_hidden_states():
    unused = ("tokens", "pos", "k_idxs", "v_idxs", "out_ids", "k_rot", "v_rot", "kq_mask")
    inputs = filled(False, unused=unused, n_embd=4, k_rot=64, v_rot=64)
    np.testing.assert_array_equal(inputs.embd.to_numpy(), Batch.embd)


class OneToken:
    def __init__(self, token, pos):
        self.tokens, self.pos = np.array([token], np.int32), np.array([pos], np.int32)
        self.cells, self.out_ids = np.array([pos], np.int64), np.zeros(1, np.int32)

    def mask(self, n_kv):
        return np.arange(n_kv)[None] <= self.pos[0]


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("pos", [0, 3, 7])
def test_a_step_is_a_batch_of_one_token_in_order(flash_attn, pos):
    ctx = Context(Context.size_for(32))
    inputs = Inputs(ctx, n_tokens=1, n_outputs=1, n_kv=8, n_cells=16, n_embd_v_gqa=3, flash_attn=flash_attn)
    tensors = [inputs.tokens, inputs.pos, inputs.k_idxs, inputs.v_idxs, inputs.out_ids, inputs.kq_mask]
    buffer = Buffer.allocate(Device.cpu().buffer_type, 1 << 16, clear=True)
    for i, tensor in enumerate(tensors):
        buffer.place(tensor, i << 12)
    inputs.fill(OneToken(123456, pos))
    want = [tensor.to_numpy() for tensor in tensors]
    for tensor in tensors:
        tensor.set_data(b"\x55" * tensor.nbytes)
    inputs.fill_step(123456, pos)
    for tensor, array in zip(tensors, want, strict=True):
        np.testing.assert_array_equal(tensor.to_numpy(), array, err_msg=tensor.name)


def test_names():
    inputs = filled(True, k_rot=64, v_rot=64)
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
    inputs = filled(True, k_rot=128, v_rot=64)
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
