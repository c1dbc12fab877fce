"""The weight store: which task finds which tensor where."""

import pytest
from tasks import task_models

from pyggml_adapt.errors import AdaptorError
from pyggml_adapt.weights.adaptor import Adaptor
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.store import TaskWeights, WeightStore


@pytest.fixture(scope="module", params=["complement", "overlay"])
def parts(request, tiny_gguf, split_models):
    return split_models(task_models(tiny_gguf), request.param)


@pytest.fixture
def store(parts):
    foundation, adaptors = parts
    store = WeightStore(Foundation(foundation))
    for task, path in adaptors.items():
        store.add(TaskWeights(task, store.foundation, Adaptor(task, path, store.foundation)))
    yield store
    store.close()


def test_each_tensor_once(store):
    code = store["code"]
    own = {name for name in code.tensors if code.where(name).source == "adaptor"}
    assert {f"blk.{il}.attn_{x}.weight" for il in (1, 2) for x in ("q", "k", "v", "output")} <= own
    for name, tensor in code.tensors.items():
        holder = code.adaptor if name in own else store.foundation
        assert tensor is holder.tensors[name]
    assert code.own_nbytes == code.adaptor.nbytes > 0


def test_a_task_has_its_own_models_tensors_only(store):
    assert "output.weight" in store["code"].tensors and "blk.0.attn_q.bias" not in store["code"].tensors
    assert "output.weight" not in store["sum"].tensors and "blk.0.attn_q.bias" in store["sum"].tensors


def test_equal_layouts_share_graphs(store, parts):
    same = TaskWeights("copy", store.foundation, Adaptor("copy", parts[1]["code"], store.foundation))
    assert same.layout == store["code"].layout
    assert len({store[task].layout for task in ("code", "sum", "tone")}) == 3  # biases; another type
    same.adaptor.close()


def test_tables_are_kept(store):
    names = ("output_norm.weight", "token_embd.weight")
    table = store["code"].table(names)
    assert store["code"].table(names) is table and len(table) == 2


def test_removal(store):
    store.remove("sum")
    assert "sum" not in store.tasks
    for use in (lambda: store["sum"], lambda: store.remove("sum")):
        with pytest.raises(AdaptorError, match=r"^unknown task 'sum'; loaded tasks: .*code, tone$") as error:
            use()
        assert error.value.code == "adaptor_not_found"


def test_loaded_already(store):
    with pytest.raises(AdaptorError, match=r"^task 'code' is loaded already$") as error:
        store.check_new("code")
    assert error.value.code == "adaptor_exists"


def test_no_tasks(parts):
    store = WeightStore(Foundation(parts[0]))
    with pytest.raises(AdaptorError, match=r"^unknown task 'x'; loaded tasks: none$"):
        store["x"]
    store.close()


def test_unknown_tensor(store):
    with pytest.raises(AdaptorError, match=r"^task 'tone' has no tensor 'x'$") as error:
        store["tone"].where("x")
    assert error.value.code == "tensor_not_found"
