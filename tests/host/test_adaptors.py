"""Foundation and adaptor against the whole model, and tasks against each other."""

import threading

import numpy as np
import pytest
from parity import differences
from real_models import real_models
from reference import Reference
from tasks import task_models
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine import runner

STEPS = 84  # x 3 tasks x 2 threads = 504 evaluations, each after a swap: 1,008 swaps in test_tasks_do_not_leak


@pytest.fixture(scope="module")
def models(tiny_gguf):
    return task_models(tiny_gguf)


@pytest.fixture(scope="module", params=["complement", "overlay"])
def parts(request, models, split_models):
    return split_models(models, request.param)


def greedy(session, ids, n):
    """Return n greedily chosen tokens."""
    tokens = []
    for _ in range(n):
        ids = [int(session.eval(ids).argmax())]
        tokens += ids
    return tokens


@pytest.mark.parametrize("flash_attn", [True, False])
def test_equal_to_whole_models(models, parts, flash_attn):
    options = {"n_threads": 1, "n_ubatch": 48, "flash_attn": flash_attn}
    ids = random_ids(300)
    with pga.Host(*parts, **options) as host:
        assert set(host.tasks) == set(models)
        for task in (*models, *models):
            with pga.Host(models[task], **options) as whole, Reference(models[task], **options) as reference:
                with host.session(task, n_ctx=512) as ours, whole.session(n_ctx=512) as wanted:
                    assert differences(wanted, ours, ids) == []
                with host.session(task, n_ctx=512) as ours:
                    assert differences(reference, ours, ids) == []


@pytest.mark.parametrize("task", ["base", "sum"])
def test_an_unmodified_llama_cpp_loads_the_pair(models, split_models, task):
    foundation, adaptors = split_models(models)
    ids = random_ids(120)
    with pga.Host(foundation, adaptors, n_threads=1) as host, host.session(task, n_ctx=512) as session:
        with Reference([adaptors[task], foundation], n_threads=1) as reference:
            assert differences(reference, session, ids) == []


def test_without_mmap(models, parts):
    ids = random_ids(120)
    with pga.Host(*parts, n_threads=1, use_mmap=False) as host, pga.Host(models["sum"], n_threads=1) as whole:
        with host.session("sum", n_ctx=512) as ours, whole.session(n_ctx=512) as wanted:
            assert differences(wanted, ours, ids) == []


def test_tasks_differ(parts):
    with pga.Host(*parts, n_threads=1) as host:
        logits = []
        for task in host.tasks:
            with host.session(task, n_ctx=256) as session:
                logits.append(session.eval(random_ids(20)))
    for i, one in enumerate(logits):
        assert not any(np.array_equal(one, other) for other in logits[:i])


def test_tasks_do_not_leak(models, parts):
    """Sessions of three tasks on each of two threads, one token at a time in turn: each as if it were alone."""
    tasks = ("code", "sum", "tone")
    prompts = {
        (thread, task): random_ids(5 + i + 7 * thread, seed=10 * thread + i)
        for thread in range(2)
        for i, task in enumerate(tasks)
    }
    alone, together = {}, {}
    for task in tasks:
        with pga.Host(models[task], n_threads=1) as host:
            for thread in range(2):
                with host.session(n_ctx=512) as session:
                    alone[thread, task] = greedy(session, prompts[thread, task], STEPS)

    def run(thread):
        sessions = {task: host.session(task, n_ctx=512) for task in tasks}
        ids = {task: prompts[thread, task] for task in tasks}
        for _ in range(STEPS):
            for task in tasks:
                host.activate(task)  # one swap; the evaluation, whatever the other thread activated, is the second
                ids[task] = [int(sessions[task].eval(ids[task]).argmax())]
                together.setdefault((thread, task), []).extend(ids[task])

    with pga.Host(*parts, n_threads=1) as host:
        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert together == alone


def test_a_thousand_swaps_build_no_graph(tiny_gguf, split_models, monkeypatch):
    """Tasks of equal types and shapes share graphs: built for the first one, kept while the others take turns."""
    built = []

    class Counted(runner.Program):
        def __init__(self, *args, **options):
            built.append(options["n_kv"])
            super().__init__(*args, **options)

    monkeypatch.setattr(runner, "Program", Counted)
    models = {"base": tiny_gguf(), **{f"t{i}": tiny_gguf(changed={"attn": i}) for i in (1, 2)}}
    with pga.Host(*split_models(models), n_threads=1) as host:
        sessions = [host.session(task, n_ctx=512) for task in host.tasks]
        for session in sessions:
            session.eval(random_ids(2))
        before = len(built)
        for step in range(1000):
            sessions[step % 3].eval([3 + step % 100])
    assert before == 1
    assert built[before:] == [(256,), (512,)]  # a token alone, and the same once 256 cells are full


def test_activate_is_cheap_and_decides_what_runs(parts):
    with pga.Host(*parts, n_threads=1) as host:
        with host.session("code", n_ctx=256) as session:
            session.eval(random_ids(3))
            swaps = [host.activate(task) for task in ("code", "base") * 100]
        assert np.median([swap.ms for swap in swaps]) < 2.0  # a reload would take longer; `make bench` measures it
        (adaptor,) = (each for each in host.adaptors if each.name == "code")
        assert swaps[0].task == "code" and swaps[0].loaded_nbytes == adaptor.nbytes > 0
        host.activate("sum")
        assert host.active == "sum"
        with host.session(n_ctx=8) as session:
            assert session.task == "sum"


def test_where(models, parts):
    foundation, adaptors = parts
    with pga.Host(foundation, adaptors, n_threads=1) as host:
        assert host.where("blk.1.attn_q.weight", "code") == ("adaptor", "Q8_0", 64 * 2 * 34, str(adaptors["code"]))
        with pga.Host(models["tone"], n_threads=1) as whole:
            assert whole.where("blk.1.attn_v.weight") == ("foundation", "F16", 64 * 32 * 2, str(models["tone"]))
        assert host.where("blk.0.attn_k.weight", "tone") == ("foundation", "Q8_0", 32 * 2 * 34, str(foundation))
        with pytest.raises(pga.AdaptorError, match=r"^task 'sum' has no tensor 'output.weight'$") as error:
            host.where("output.weight", "sum")
        assert error.value.code == "tensor_not_found"


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("family", ["tiny", "stories260K", "stories4M"])
def test_real_models(split_models, family, kind):
    models = {path.stem.split("-")[1]: path for path in real_models(f"{family}-*-{kind}.gguf")}
    if len(models) < 2:
        pytest.skip("no such models here")
    ids = [1, *(3 + (i * 41) % 200 for i in range(119))]
    with pga.Host(*split_models(models), n_threads=1) as host:
        for task, path in models.items():
            with Reference(path, n_threads=1) as reference, host.session(task, n_ctx=512) as session:
                assert differences(reference, session, ids) == []
