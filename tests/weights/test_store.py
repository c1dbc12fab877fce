"""The weight store: which task finds which tensor where, and which adaptors are in memory."""

import pytest
from tasks import task_models

from pyggml_adapt.errors import AdaptorError, ClosedError
from pyggml_adapt.weights.adaptor import open_adaptor
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.store import WeightStore, parse_recipe


def open_one(store, task, path):
    return open_adaptor(task, path, store.foundation, target_of=lambda module: None)


def add(store, task, path):
    store.add(open_one(store, task, path))
    store.define(task, ((task, 1.0),))


def weights_of(store, task):
    weights = store.acquire(task)
    store.release(weights)
    return weights


@pytest.fixture(scope="module", params=["complement", "overlay"])
def parts(request, tiny_gguf, split_models):
    return split_models(task_models(tiny_gguf), request.param)


@pytest.fixture
def left():
    """Return the list of the adaptors that left memory."""
    return []


@pytest.fixture
def store(parts, left):
    foundation, adaptors = parts
    store = WeightStore(Foundation(foundation), max_nbytes=None, on_leave=lambda adaptor: left.append(adaptor.name))
    for task, path in adaptors.items():
        add(store, task, path)
    yield store
    store.close()


def test_each_tensor_once(store):
    code = weights_of(store, "code")
    (adaptor,) = code.adaptors
    own = {name for name in code.tensors if code.where(name).source == "adaptor"}
    assert {f"blk.{il}.attn_{x}.weight" for il in (1, 2) for x in ("q", "k", "v", "output")} <= own
    for name, tensor in code.tensors.items():
        assert tensor is (adaptor.tensor(name) if name in own else store.foundation.tensors[name])
    assert code.own_nbytes == adaptor.nbytes > 0


def test_a_task_has_its_own_models_tensors_only(store):
    code, summary = weights_of(store, "code").tensors, weights_of(store, "sum").tensors
    assert "output.weight" in code and "blk.0.attn_q.bias" not in code
    assert "output.weight" not in summary and "blk.0.attn_q.bias" in summary


def test_equal_layouts_share_graphs(store, parts):
    add(store, "copy", parts[1]["code"])
    assert weights_of(store, "copy").layout == weights_of(store, "code").layout
    assert len({weights_of(store, task).layout for task in ("code", "sum", "tone")}) == 3  # biases; another type


def test_tables_are_kept(store):
    names = ("output_norm.weight", "token_embd.weight")
    table = weights_of(store, "code").table(names, ())
    assert weights_of(store, "code").table(names, ()) is table and len(table) == 2


def test_what_differs_is_known_byte_by_byte(store, parts):
    add(store, "copy", parts[1]["code"])
    code, copy, tone = (weights_of(store, task) for task in ("code", "copy", "tone"))
    assert code.differing(copy) == copy.differing(code) == set()
    attention = {f"blk.{il}.attn_{x}.weight" for il in (1, 2) for x in ("q", "k", "v", "output")}
    layer = {name for name in code.tensors if name.startswith("blk.1.")}
    assert code.differing(tone) == attention | layer | {"token_embd.weight"}


def test_removal(store, left):
    store.remove("sum")
    assert "sum" not in store.tasks and left == ["sum"]
    with pytest.raises(AdaptorError, match=r"^unknown task 'sum'; loaded tasks: .*code, tone$") as error:
        store.acquire("sum")
    assert error.value.code == "adaptor_not_found"


def test_loaded_already(store):
    with pytest.raises(AdaptorError, match=r"^task 'code' is loaded already$") as error:
        store.check_new("code")
    assert error.value.code == "adaptor_exists"


def test_no_tasks(parts):
    store = WeightStore(Foundation(parts[0]), max_nbytes=None, on_leave=lambda adaptor: None)
    with pytest.raises(AdaptorError, match=r"^unknown task 'x'; loaded tasks: none$"):
        store.acquire("x")
    store.close()


def test_unknown_tensor(store):
    with pytest.raises(AdaptorError, match=r"^task 'tone' has no tensor 'x'$") as error:
        weights_of(store, "tone").where("x")
    assert error.value.code == "tensor_not_found"


def test_the_one_used_longest_ago_leaves_first(store, left):
    store.max_nbytes = store.resident_nbytes
    for task in ("sum", "tone", "code"):
        weights_of(store, task)
    tensor = weights_of(store, "sum").tensors["output_norm.weight"]
    store.max_nbytes = sum(store.adaptors[task].nbytes for task in ("sum", "code"))
    store.remove("code")
    store.max_nbytes -= 1  # of the two left, one has to go
    held = store.acquire("sum")
    add_back = store.adaptors["sum"].path
    assert left == ["code"] and add_back == held.path
    store.max_nbytes = held.own_nbytes
    with pytest.raises(AdaptorError, match=r"max_adaptor_bytes = \d+ only 0 are free or idle") as error:
        store.remove("tone")
        add(store, "copy", add_back)
    assert error.value.code == "adaptor_byte_limit_exceeded"
    store.release(held)
    add(store, "copy", add_back)
    assert left[-1] == "sum" and not store.adaptors["sum"].is_resident
    with pytest.raises(ClosedError, match="closed"):
        tensor.to_numpy()


def test_an_adaptor_that_left_comes_back_the_same(store, parts):
    before = weights_of(store, "tone").tensors["token_embd.weight"].to_numpy().copy()
    store.max_nbytes = max(adaptor.nbytes for adaptor in store.adaptors.values())
    store._make_room(store.adaptors["code"])  # everything else leaves
    weights = weights_of(store, "tone")
    assert (weights.tensors["token_embd.weight"].to_numpy() == before).all()
    assert store.resident_nbytes <= store.max_nbytes


def test_who_uses_a_replaced_adaptor_keeps_it(store, parts, left):
    held = store.acquire("code")
    store.discard(store.replace(open_one(store, "code", parts[1]["code"])))
    assert weights_of(store, "code") is not held
    assert left == [] and held.tensors["output_norm.weight"].to_numpy() is not None
    store.release(held)
    assert left == ["code"] and not held.adaptors[0].is_resident
    assert store.adaptors["code"].is_resident


@pytest.mark.parametrize(
    ("parts_", "recipe"),
    [
        (["a"], (("a", 1.0),)),
        (["a:0.5", "b:-2"], (("a", 0.5), ("b", -2.0))),
        (["a:1e3"], (("a", 1000.0),)),
        (["x:1"], (("x:1", 1.0),)),  # a name that is known as it stands
        (["x:1:2"], (("x:1", 2.0),)),
    ],
)
def test_recipes(parts_, recipe):
    assert parse_recipe(parts_, {"x:1": None}) == recipe


@pytest.mark.parametrize(
    ("parts_", "message"),
    [
        (["a:x"], "'a:x': 'x' is not a factor from -1e6 to 1e6"),
        (["a:nan"], "'a:nan': 'nan' is not a factor from -1e6 to 1e6"),
        (["a:inf"], "'a:inf': 'inf' is not a factor from -1e6 to 1e6"),
        (["a:"], "'a:': '' is not a factor from -1e6 to 1e6"),
        (["a", "a:0.5"], "'a:0.5': adaptor 'a' is named twice"),
    ],
)
def test_bad_recipes(parts_, message):
    with pytest.raises(AdaptorError) as error:
        parse_recipe(parts_, {})
    assert (str(error.value), error.value.code) == (message, "adaptor_invalid")
