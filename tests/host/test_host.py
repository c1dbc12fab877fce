"""The host: tasks come and go, wrong ones are refused, nothing falls back."""

import os
import re

import numpy as np
import pytest
from tasks import task_models
from tiny_models import Tiny, random_ids, tensors_of, write_gguf

import pyggml_adapt as pga
from pyggml_adapt.errors import (
    AdaptorError,
    BackendError,
    ClosedError,
    FileAccessError,
    FileFormatError,
    ModelError,
    ParameterError,
)


@pytest.fixture(scope="module")
def models(tiny_gguf):
    return task_models(tiny_gguf)


@pytest.fixture(scope="module")
def parts(models, split_models):
    return split_models(models)


@pytest.fixture
def host(parts):
    with pga.Host(*parts, n_threads=1) as host:
        yield host


def raises(error, message, code=None):
    """Return pytest.raises for an error of ours with this message, a regular expression from its start."""
    assert issubclass(error, pga.Error)

    def check(exc):
        return code is None or exc.code == code

    return pytest.raises(error, match=f"^{message}", check=check)


def test_tasks(host, models):
    assert host.tasks == tuple(models)
    assert host.active == host.tasks[0]
    assert repr(host) == "<Host of base, code, sum, tone>"


def test_a_complete_model_is_the_task_base(models):
    with pga.Host(models["code"], n_threads=1) as host:
        assert (host.tasks, host.active, host.n_threads) == (("base",), "base", 1)
        with raises(AdaptorError, "task 'base' is ", "adaptor_in_use"):
            host.unload_adaptor("base")


def test_adaptors_must_be_named(parts):
    with raises(ParameterError, "adaptors must map task names to paths, not be a list$"):
        pga.Host(parts[0], [parts[1]["code"]])


def test_a_foundation_alone_has_no_task(parts):
    with pga.Host(parts[0], n_threads=1) as host:
        assert host.tasks == ()
        with raises(AdaptorError, f"no task is loaded: {parts[0]} is not complete by itself", "adaptor_not_found"):
            host.session()


@pytest.mark.parametrize("use", ["session", "activate", "unload_adaptor", "generate", "where", "tokenize"])
def test_unknown_task(host, use):
    calls = {
        "session": lambda: host.session("cod"), "activate": lambda: host.activate("cod"),
        "unload_adaptor": lambda: host.unload_adaptor("cod"), "generate": lambda: host.generate("a", task="cod"),
        "where": lambda: host.where("x", "cod"), "tokenize": lambda: host.tokenize("a", task="cod"),
    }  # fmt: skip
    with raises(AdaptorError, "unknown task 'cod'; loaded tasks: base, code, sum, tone$", "adaptor_not_found"):
        calls[use]()
    with pytest.raises(KeyError):
        calls[use]()
    with raises(AdaptorError, "unknown task None; loaded tasks", "adaptor_not_found"):
        host.activate(None)


def test_adaptors_come_and_go(parts):
    foundation, adaptors = parts
    with pga.Host(foundation, n_threads=1) as host:
        host.load_adaptor("code", adaptors["code"])
        with host.session("code", n_ctx=64) as session:
            want = session.eval(random_ids(10))
            host.load_adaptor("sum", adaptors["sum"])
            with raises(AdaptorError, r"task 'code' is in use by 1 session\(s\)$", "adaptor_in_use"):
                host.unload_adaptor("code")
            assert session.eval([5]).shape == want.shape  # still usable
        for _ in range(20):
            host.unload_adaptor("code")
            with raises(AdaptorError, "unknown task 'code'; loaded tasks: sum$", "adaptor_not_found"):
                host.session("code")
            host.load_adaptor("code", adaptors["code"])
            with host.session("code", n_ctx=64) as session:
                np.testing.assert_array_equal(session.eval(random_ids(10)), want)


def test_unloading_the_active_task(host):
    host.activate("sum")
    host.unload_adaptor("sum")
    assert host.active == "base"
    assert "sum" not in host.tasks


def test_unloaded_files_are_unmapped(parts):
    foundation, adaptors = parts
    with pga.Host(foundation, adaptors, n_threads=1) as host:
        with host.session("code", n_ctx=64) as session:
            session.eval(random_ids(10))
        host.unload_adaptor("code")
        with open("/proc/self/maps") as maps:
            assert adaptors["code"].name not in maps.read()
    with open("/proc/self/maps") as maps:
        assert foundation.name not in maps.read()


def test_loading_twice(host, parts):
    with raises(AdaptorError, "task 'code' is loaded already$", "adaptor_exists"):
        host.load_adaptor("code", parts[1]["code"])


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_that_cannot_be(host, parts, name):
    with raises(AdaptorError, f"a task needs a name, not {name!r}$", "adaptor_invalid"):
        host.load_adaptor(name, parts[1]["code"])


def test_wrong_foundation(host, tiny_gguf, split_models):
    others = {"base": tiny_gguf(), "code": tiny_gguf(changed={"attn": 1})}
    _, adaptors = split_models(others)
    with raises(
        AdaptorError,
        ".*: the adaptor 'code' does not belong to .*: it has no tensor 'token_embd.weight'$",
        "adaptor_base_mismatch",
    ):
        host.load_adaptor("other", adaptors["code"])
    assert "other" not in host.tasks


def test_a_whole_model_is_no_adaptor(host, models):
    with raises(AdaptorError, f"{models['code']}: not an adaptor ", "adaptor_invalid"):
        host.load_adaptor("other", models["code"])


def test_an_adaptor_is_no_foundation(parts):
    adaptor = parts[1]["code"]
    message = f"{adaptor}: not a foundation or a complete model, but of the kind 'adaptor'$"
    with raises(AdaptorError, message, "adaptor_invalid"):
        pga.Host(adaptor)


def test_files_that_cannot_be_read(host, tmp_path):
    missing, text = tmp_path / "no.gguf", tmp_path / "text.gguf"
    text.write_text("This is not a GGUF file.\n" * 100)
    for call in (lambda path: pga.Host(path), lambda path: host.load_adaptor("x", path)):
        with raises(FileAccessError, f"{missing}: no such file or directory$"):
            call(missing)
        with raises(FileAccessError, re.escape(str(tmp_path))):
            call(tmp_path)
        with raises(FileFormatError, f"{text}.*: "):
            call(text)
    assert host.tasks == ("base", "code", "sum", "tone")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"n_gpu_layers": 1}, BackendError, "n_gpu_layers = 1: this build has no GPU backend, or no GPU is present; see "),
    ({"n_gpu_layers": -1}, ParameterError, "n_gpu_layers = -1 is not from 0 to "),
    ({"n_threads": 0}, ParameterError, "n_threads = 0 is not from 1 to 512$"),
    ({"n_threads": -1}, ParameterError, "n_threads = -1 is not from 1 to 512$"),
    ({"n_threads": 10**6}, ParameterError, "n_threads = 1000000 is not from 1 to 512$"),
    ({"n_ubatch": 0}, ParameterError, "n_ubatch = 0 is not from 1 to 16777216$"),
    ({"n_batch": -5}, ParameterError, "n_batch = -5 is not from 1 to 16777216$"),
    ({"type_k": "Q9"}, ParameterError, "type_k = 'Q9' is not a type that ggml has$"),
    ({"type_v": None}, ParameterError, "type_v = None is not a type that ggml has$"),
])  # fmt: skip
def test_options_that_cannot_be(models, options, error, message):
    with raises(error, message):
        pga.Host(models["base"], **options)


@pytest.mark.parametrize("n_ctx", [0, -1, (1 << 24) + 1, 1 << 70])
def test_contexts_that_cannot_be(host, n_ctx):
    with raises(ParameterError, f"n_ctx = {n_ctx} is not from 1 to 16777216$"):
        host.session("code", n_ctx=n_ctx)
    assert host.memory().kv == 0


@pytest.mark.parametrize("option", ["n_ubatch", "n_batch", "n_ctx", "n_threads", "n_gpu_layers"])
@pytest.mark.parametrize("value", [1.5, "8"])
def test_counts_must_be_whole_numbers(models, option, value):
    with raises(ParameterError, f"{option} = {value!r} is not a whole number"):
        if option == "n_ctx":
            with pga.Host(models["base"], n_threads=1) as host:
                host.session(n_ctx=value)
        else:
            pga.Host(models["base"], **{option: value})


def test_default_context_is_the_models(host):
    with host.session("code") as session:
        assert session.n_ctx == Tiny().n_ctx_train


def broken(tmp_path, tiny, *, metadata=None, tensors=None):
    """Return the path of a model with other metadata, or other tensors, than it should have."""
    data = tensors_of(tiny)
    for name, change in (tensors or {}).items():
        if change is None:
            del data[name]
        else:
            data[name] = change
    return write_gguf(tmp_path / "broken.gguf", {**tiny.all_metadata(), **(metadata or {})}, data)


SMALL = Tiny(n_embd=64, n_head=2, n_head_kv=1, n_ff=64, n_layer=1)


@pytest.mark.parametrize(("tensors", "message"), [
    ({"blk.0.attn_q.weight": None}, "tensor blk.0.attn_q.weight is missing$"),
    ({"token_embd.weight": None}, "tensor token_embd.weight is missing$"),
    ({"output_norm.weight": (0, (32,), bytes(128))}, r"tensor output_norm.weight has shape \[32, .*\], not \[64\]$"),
    ({"blk.0.attn_k.weight": (0, (64, 33), bytes(64 * 33 * 4))},
     r"tensor blk.0.attn_k.weight has shape \[64, 33, 1, 1\], not \[64, 32\]$"),
    ({"blk.1.attn_q.weight": (0, (64, 64), bytes(64 * 64 * 4))},
     "tensor blk.1.attn_q.weight is not one that architecture llama has$"),
    ({"mystery": (0, (4,), bytes(16))}, "tensor mystery is not one that architecture llama has$"),
])  # fmt: skip
def test_models_with_wrong_tensors(tmp_path, tensors, message):
    path = broken(tmp_path, SMALL, tensors=tensors)
    with raises(ModelError, f"{path}: {message}"):
        pga.Host(path)


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight", "token_embd.weight"])
def test_types_that_cannot_be_computed_with(tmp_path, name):
    """I8 is a type that GGUF files may have; ggml would abort on such a weight."""
    ne = tensors_of(SMALL)[name][1]
    path = broken(tmp_path, SMALL, tensors={name: (24, ne, bytes(int(np.prod(ne))))})
    with raises(pga.Error, ""), pga.Host(path, n_threads=1) as host, host.session(n_ctx=8) as session:
        session.eval([1])


def test_unknown_architecture(tmp_path):
    path = broken(tmp_path, SMALL, metadata={"general.architecture": "mamba9"})
    with raises(ModelError, r".*architecture 'mamba9' is not supported; supported: .*llama"):
        pga.Host(path)


def test_bad_hparams_name_the_file_or_key(tmp_path):
    path = broken(tmp_path, SMALL, metadata={"llama.attention.head_count": 0})
    with raises(ModelError, ".*llama.attention.head_count = 0 is not from 1 to "):
        pga.Host(path)


def test_nothing_leaks_from_failed_loads(tmp_path, host):
    path = broken(tmp_path, SMALL, tensors={"token_embd.weight": None})
    n_files = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with raises(ModelError, ""):
            pga.Host(path, n_threads=1)
        with raises(AdaptorError, ""):
            host.load_adaptor("x", path)
    assert len(os.listdir("/proc/self/fd")) <= n_files
    with open("/proc/self/maps") as maps:
        assert path.name not in maps.read()


def test_use_after_close(models):
    host = pga.Host(models["base"], n_threads=1)
    session = host.session(n_ctx=64)
    session.eval([1])
    host.close()
    host.close()
    assert repr(host) == "<Host, closed>"
    with raises(ClosedError, "this session with task 'base' is closed$"):
        session.eval([1])
    for use in (
        lambda: host.session(),
        lambda: host.activate("base"),
        lambda: host.memory(),
        lambda: host.tokenize("a"),
        lambda: host.load_adaptor("x", models["code"]),
        lambda: host.where("output_norm.weight"),
        lambda: host.generate("a"),
        lambda: host.unload_adaptor("base"),
    ):
        with raises(ClosedError, "this Host is closed$"):
            use()
