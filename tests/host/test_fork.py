"""Forks: a session's tokens under another task, bit for bit a fresh session's, with less work."""

import itertools
import threading
import time

import numpy as np
import pytest
from loras import write_lora
from tiny_models import Tiny, random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine import runner
from pyggml_adapt.engine.fork import choose
from pyggml_adapt.engine.sampling import SamplerParams
from pyggml_adapt.errors import (
    AdaptorError,
    AllocError,
    BusyError,
    ClosedError,
    ContextFullError,
    ParameterError,
    TokenError,
)

GREEDY = SamplerParams(temperature=0.0)
N_LAYER = 4
COMMON = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 2, "n_layer": N_LAYER, "type": "Q8_0"}
UNTIED = r"^output\.weight|_exps"
TASKS = {
    "base": {},
    "same": {},
    "half": {"changed": {r"blk\.[23]\.attn_": 1}},
    "middle": {"changed": {r"blk\.2\.ffn": 2}},
    "last": {"optional": rf"{UNTIED}|blk\.3\..*\.bias"},
    "down": {"changed": {"ffn_down": 3}},
    "head": {"changed": {r"^output\.": 4}},
    "norm": {"changed": {"^output_norm": 5}},
    "tied": {"optional": "_exps"},
    "embd": {"changed": {"token_embd": 6}},
}
FIRST = {  # the first layer that differs from base; between two others it is the lower one
    "half": 2, "middle": 2, "last": 3, "down": 0, "head": 4, "norm": 4, "tied": 4, "embd": 0,
}  # fmt: skip
ANNOUNCED = ("half", "last", "down", "head")


def first_difference(a, b):
    """Return the layer that a fork from task a to task b must start from, None for a copy."""
    if {a, b} <= {"base", "same"}:
        return None
    return min(FIRST.get(task, N_LAYER) for task in (a, b))


@pytest.fixture(scope="module")
def hosts(tiny_gguf, split_models):
    """Return a function that opens a host of some of the tasks, of models and with options as given."""
    made = {}

    def host(tasks=tuple(TASKS), model=(), **options):
        key = repr((tasks, model, options))
        if key not in made:
            models = {task: tiny_gguf(**{**COMMON, **dict(model), **TASKS[task]}) for task in tasks}
            made[key] = pga.Host(*split_models(models), **{"n_threads": 1, "n_ubatch": 32, **options})
        return made[key]

    yield host
    for each in made.values():
        each.close()


@pytest.fixture
def host(hosts):
    return hosts()


def kv_of(session):
    """Return the bytes of K and V of the evaluated tokens, layer by layer."""
    n = session._n_evaluated
    rows = session._cache._rows(session._model.hp.n_layer)
    return [each[:n].copy() if each.ndim == 2 else each[:, :n].copy() for each in rows]


def assert_same(forked, fresh, n_decoded=5):
    """Assert that two sessions have the same tokens, KV and logits, and go on alike."""
    assert forked.tokens == fresh.tokens
    for ours, wanted in zip(kv_of(forked), kv_of(fresh), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(forked.logits, fresh.logits)
    assert fresh.logits.std() > 0.01
    for token in random_ids(n_decoded + 1, seed=77)[1:]:
        np.testing.assert_array_equal(forked.eval([token]), fresh.eval([token]))
    more = random_ids(9, seed=78)
    np.testing.assert_array_equal(forked.eval(more), fresh.eval(more))


def check(host, calls, source, target, *, n_ctx=512, forks=ANNOUNCED):
    """Assert that a fork equals a fresh session after the same calls; return the fork's report."""
    with host.session(source, n_ctx=n_ctx, forks=forks) as session, host.session(target, n_ctx=n_ctx) as fresh:
        for ids in calls:
            session.eval(ids)
            fresh.eval(ids)
        with session.fork(target) as forked:
            assert forked.task == target
            assert_same(forked, fresh)
            assert session.tokens == list(itertools.chain(*calls))  # the source is as it was
            return forked.fork_report


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TASKS, TASKS)))
def test_all_pairs(host, source, target):
    ids = random_ids(70)
    report = check(host, [ids], source, target, n_ctx=256, forks=TASKS)
    differs = first_difference(source, target) if source != target else None
    assert (report.task, report.n_tokens, report.n_layer) == (target, 70, N_LAYER)
    assert report.differs == differs
    assert report.n_reused == (0 if differs == 0 else 70)
    assert report.saved == (1.0 if differs is None else differs / N_LAYER)
    per_token = 2 * 64 * 2
    assert report.copied_nbytes == 70 * per_token * (N_LAYER if differs is None else differs)


VARIANTS = {
    "soft-max": {"flash_attn": False},
    "quantised-kv": {"type_k": "Q8_0", "type_v": "Q8_0", "model": {"n_head": 1, "n_head_kv": 1, "head_dim": 64}},
    "f32-kv": {"type_k": "F32", "type_v": "F32"},
    "experts": {"model": {"n_expert": 4, "n_expert_used": 2}},
    "biases": {"model": {"optional": rf"{UNTIED}|\.bias"}},
    "small-batches": {"n_batch": 48, "n_ubatch": 20},
    "one-piece": {"n_ubatch": 512},
    "last-piece-of-one": {"n_ubatch": 299},
    "f16": {"model": {"type": "F16"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_past_256_cells(hosts, variant):
    options = dict(VARIANTS[variant])
    model = tuple(options.pop("model", {}).items())
    host = hosts(("base", "half", "head", "embd"), model=model, **options)
    for target, saved in (("half", 0.5), ("head", 1.0), ("embd", 0.0)):
        assert check(host, [random_ids(300)], "base", target, forks=("half", "head")).saved == saved


@pytest.mark.parametrize("target", ["half", "head", "embd", "base"])
def test_several_calls(host, target):
    calls = [random_ids(40), random_ids(3, seed=1), random_ids(90, seed=2)]
    report = check(host, calls, "base", target)
    assert report.n_reused == (0 if target == "embd" else 133)


@pytest.mark.parametrize("target", ["half", "head", "embd"])
def test_tokens_that_came_alone_are_one_call(host, target):
    ids = random_ids(50)
    with host.session("base", n_ctx=256, forks=ANNOUNCED) as session, host.session(target, n_ctx=256) as fresh:
        session.eval(ids[:20])
        generated = list(session.generate_ids(ids[20:40], max_tokens=7, params=GREEDY))
        session.eval(ids[40:])
        fresh.eval(ids[:20])
        fresh.eval(ids[20:40])
        fresh.eval(generated + ids[40:])
        with session.fork(target) as forked:
            assert forked.fork_report.n_reused == (0 if target == "embd" else 40)
            assert 0 <= forked.fork_report.saved < 0.8
            with forked.fork(target) as again:  # the tail is a call like others now
                assert_same(again, fresh)


def test_nothing_but_single_tokens(host):
    ids = random_ids(6)
    with host.session("base", n_ctx=256, forks=ANNOUNCED) as session, host.session("half", n_ctx=256) as fresh:
        for token in ids:
            session.eval([token])
        fresh.eval(ids)
        with session.fork("half") as forked:
            assert (forked.fork_report.n_reused, forked.fork_report.saved) == (0, 0.0)
            assert_same(forked, fresh)


@pytest.mark.parametrize("target", ["half", "head"])
@pytest.mark.parametrize("n_past", [60, 45, 20, 13])
def test_rewound(host, target, n_past):
    ids, other = random_ids(60), random_ids(15, seed=3)
    with host.session("base", n_ctx=256, forks=ANNOUNCED) as session, host.session(target, n_ctx=256) as fresh:
        session.eval(ids[:20])
        session.eval(ids[20:])
        session.eval([9])
        session.rewind(n_past)
        assert session.logits is None
        calls = {60: [20, 40], 45: [20], 20: [20], 13: []}[n_past]
        rest = [*ids[sum(calls) : n_past], *other] if n_past in (45, 13) else other
        for n in calls:
            fresh.eval(ids[fresh.n_past : fresh.n_past + n])
        if n_past in (60, 20):
            with session.fork(target) as forked:
                np.testing.assert_array_equal(forked.logits, fresh.logits)
        session.eval(other)
        fresh.eval(rest)
        with session.fork(target) as forked:
            assert forked.fork_report.n_reused == sum(calls) + (15 if n_past in (60, 20) else 0)
            assert_same(forked, fresh)


def test_all_logits(host):
    """The fork's logits are those of eval() without all_logits, as a fresh session's would be."""
    ids = random_ids(40)
    for target, saved in (("half", 0.5), ("head", 1 - 8 / 40 * (1 - 3 / 4))):
        with host.session("base", n_ctx=256, forks=(*ANNOUNCED, "last")) as session:
            rows = session.eval(ids, all_logits=True)
            np.testing.assert_array_equal(session.logits, rows[-1])
            with session.fork(target) as forked, host.session(target, n_ctx=256) as fresh:
                fresh.eval(ids)
                assert forked.fork_report.saved == pytest.approx(saved)
                assert_same(forked, fresh)


@pytest.mark.parametrize(("target", "n_reused", "saved"), [("half", 0, 0.0), ("head", 64, 64 / 70), ("same", 70, 1.0)])
def test_tasks_that_were_not_announced(host, target, n_reused, saved):
    report = check(host, [random_ids(70)], "base", target, forks=())
    assert (report.n_reused, report.saved) == (n_reused, pytest.approx(saved))


def test_a_fork_starts_at_the_next_boundary_below(host):
    report = check(host, [random_ids(70)], "base", "last", forks=("half",))
    assert (report.differs, report.first_layer, report.saved) == (3, 2, 0.5)


def test_a_copy(host):
    """Without a task, a fork goes on where the session stands, also between the tokens of a generation."""
    ids = random_ids(30)
    with host.session("half", n_ctx=256, forks=("base",)) as session:
        list(session.generate_ids(ids, max_tokens=5, params=GREEDY))
        with session.fork(forks=("base",)) as forked:
            assert forked.task == "half" and forked.tokens == session.tokens
            np.testing.assert_array_equal(forked.logits, session.logits)
            assert not np.shares_memory(forked.logits, session.logits)
            ours = list(forked.generate_ids([], max_tokens=20, params=GREEDY))
            assert ours == list(session.generate_ids([], max_tokens=20, params=GREEDY))
            with forked.fork("base") as back:
                assert back.fork_report.n_reused == 30
        assert session.fork("half").n_past == 55


def test_an_empty_session(host):
    with host.session("base", n_ctx=256, forks=ANNOUNCED) as session:
        for task in ("base", "half", "head", "embd"):
            with session.fork(task) as forked, host.session(task, n_ctx=256) as fresh:
                assert forked.logits is None and forked.fork_report.n_tokens == 0
                np.testing.assert_array_equal(forked.eval([1, 5]), fresh.eval([1, 5]))


@pytest.mark.parametrize(("path", "boundaries"), [
    (("base", "half", "base", "last"), (2, 3)),
    (("head", "last", "middle", "base"), (2, 3, 4)),
    (("base", "head", "half"), (2,)),
])  # fmt: skip
def test_forks_of_forks(host, path, boundaries):
    ids = random_ids(70)
    forks = ("half", "last", "head")
    sessions = [host.session(path[0], n_ctx=256, forks=forks)]
    sessions[0].eval(ids)
    for task in path[1:]:
        sessions.append(sessions[-1].fork(task, forks=forks))
        assert sessions[-1].fork_report.n_reused == 70
    assert sessions[-1].boundaries == boundaries
    with host.session(path[-1], n_ctx=256) as fresh:
        fresh.eval(ids)
        assert_same(sessions[-1], fresh)
    for session in sessions:
        session.close()


def test_a_fork_keeps_what_its_source_kept(host):
    with host.session("base", n_ctx=256, forks=("last",)) as session:
        session.eval(random_ids(40))
        with session.fork("last", forks=("half", "head")) as forked:
            assert forked.boundaries == (3,)  # not the input of layer 2, which nobody has
            for target, first_layer in (("half", 0), ("head", 3)):
                with forked.fork(target) as again:
                    assert again.fork_report.first_layer == first_layer


def test_generation_without_a_prompt(host):
    ids = random_ids(40)
    with host.session("base", n_ctx=256, forks=("half",)) as session, host.session("half", n_ctx=256) as fresh:
        session.eval(ids)
        wanted = list(fresh.generate_ids(ids, max_tokens=8, params=GREEDY))
        with session.fork("half") as forked:
            generation = forked.generate_ids([], max_tokens=4, params=GREEDY)
            assert list(generation) == wanted[:4]
            assert (generation.timings.prompt_n, generation.timings.predicted_n) == (0, 4)
            assert "".join(forked.generate("", max_tokens=4, temperature=0.0)) == host.detokenize(wanted[4:])
            assert forked.tokens == fresh.tokens
            forked.rewind(20)
            with pytest.raises(TokenError, match=r"^there are no tokens to evaluate$"):
                forked.generate_ids(np.array([]), max_tokens=1, params=GREEDY)
            forked.eval([5])
            generation = forked.generate_ids((), max_tokens=1, params=GREEDY)
            forked.rewind(20)
            with pytest.raises(TokenError, match=r"^there is nothing to evaluate: the session was rewound"):
                next(generation)


def test_less_is_computed(hosts, monkeypatch):
    """The graphs of a fork have the nodes of the layers that differ, and what is computed of the head is one row."""
    graphs = []

    class Kept(runner.Program):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            names = [self.graph.node(i).name for i in range(self.graph.n_nodes)]
            layers = {int(name[6:]) for name in names if name.startswith("l_out-")}
            graphs.append((options["n_tokens"], options["first_layer"], layers, len(names)))

    monkeypatch.setattr(runner, "Program", Kept)
    host = hosts(("base", "half", "head"), n_ubatch=24)
    with host.session("base", n_ctx=256, forks=("half", "head")) as session:
        session.eval(random_ids(29))
        graphs.clear()
        session.fork("half").close()
        assert [graph[:3] for graph in graphs] == [(24, 2, {2}), (5, 2, {2, 3})]
        graphs.clear()
        session.fork("head").close()
        assert [graph[:3] for graph in graphs] == [(1, 4, set())] and graphs[0][3] <= 3
        graphs.clear()
        session.fork("base").close()
        assert graphs == []


def test_decoding_has_no_graphs_of_its_own(host):
    with host.session("base", n_ctx=256) as session:
        session.eval([1])
    known = set(host._engine._programs)
    with host.session("base", n_ctx=256, forks=("half",)) as session:
        session.eval([1])
        session.rewind(0)
        session.eval(random_ids(9))
        session.eval([5])
    assert [key[3] for key in set(host._engine._programs) - known] == [9]


def test_memory_of_the_states(host, hosts):
    with host.session("base", n_ctx=100) as session:
        assert (session.boundaries, session.boundary_nbytes) == ((), 0)
    with host.session("base", n_ctx=100, forks=("half", "middle", "last", "embd", "same")) as session:
        assert session.boundaries == (2, 3)
        assert session.boundary_nbytes == 2 * 100 * 64 * 4 <= session.kv_nbytes
        session.close()
        assert session.boundary_nbytes == 0
    with host.session("base", n_ctx=100, forks=("head",)) as session:
        assert (session.boundaries, session.boundary_nbytes) == ((4,), 64 * 4)
    narrow = hosts(("base", "half", "last"), model=(("n_head_kv", 1), ("head_dim", 16)))  # KV: 4 x 64 bytes a token
    with narrow.session("base", n_ctx=256, forks=("half", "last")) as session:
        assert session.boundaries == (2,)
        assert session.boundary_nbytes == session.kv_nbytes
        session.eval(random_ids(40))
        with session.fork("last") as forked:
            assert (forked.fork_report.differs, forked.fork_report.first_layer) == (3, 2)


@pytest.mark.parametrize(("wanted", "most", "kept"), [
    ([], 4, ()),
    ([None, 0, 12], 0, (12,)),
    ([6, 6, 3], 2, (3, 6)),
    ([6, 6, 3], 1, (6,)),       # 2 x 6 layers against 3 x 3
    ([11, 10, 2], 2, (2, 10)),  # 11 starts at 10: one layer more
    ([11, 10, 2], 1, (10,)),
    ([8, 9, 9, 9], 1, (8,)),    # three start one layer lower; without 8, one would start eight lower
    ([8, *[9] * 9], 1, (9,)),
    ([4, 12], 0, (12,)),
])  # fmt: skip
def test_choice_of_boundaries(wanted, most, kept):
    assert choose(wanted, 12, most) == kept


def test_errors_leave_everything_as_it_was(host, monkeypatch):
    ids = random_ids(40)
    session = host.session("base", n_ctx=256, forks=("half",))
    before = session.eval(ids).copy()
    n_sessions = len(host._sessions)

    def check_intact():
        assert len(host._sessions) == n_sessions and session.tokens == ids
        np.testing.assert_array_equal(session.logits, before)

    with pytest.raises(AdaptorError, match=r"^unknown task 'nope'") as error:
        session.fork("nope")
    assert error.value.code == "adaptor_not_found"
    check_intact()
    with pytest.raises(AdaptorError, match=r"^unknown task 'nope'"):
        session.fork("half", forks=("nope",))
    check_intact()
    with pytest.raises(ParameterError, match=r"^forks must be a list of tasks, as \['half'\], not a text$"):
        session.fork("half", forks="half")
    check_intact()
    with pytest.raises(ContextFullError, match=r"^the context of 39 tokens holds 0: 40 more do not fit"):
        session.fork("half", n_ctx=39)
    check_intact()

    def fail(*_):
        raise AllocError("no memory")

    for owner, name in ((runner.Program, "run"), (type(session._cache), "copy")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(AllocError, match=r"^no memory$"):
                session.fork("half")
        check_intact()
    session.close()
    with pytest.raises(ClosedError, match=r"^this session with task 'base' is closed$"):
        session.fork("half")
    assert len(host._sessions) == n_sessions - 1


def test_another_size_of_context(host):
    ids = random_ids(40)
    with host.session("base", n_ctx=256, forks=("half",)) as session:
        session.eval(ids)
        with session.fork("half", n_ctx=1000) as forked, host.session("half", n_ctx=1000) as fresh:
            fresh.eval(ids)
            assert forked.n_ctx == 1000
            assert_same(forked, fresh)


def test_a_task_of_other_hyper_parameters(tiny_gguf, split_models):
    models = {"base": tiny_gguf(**COMMON), "wide": tiny_gguf(**COMMON, metadata={"rope.freq_base": 5e5})}
    ids = random_ids(20)
    with pga.Host(*split_models(models), n_threads=1) as host, host.session("base", forks=("wide",)) as session:
        session.eval(ids)
        assert session.boundaries == ()
        with session.fork("wide") as forked, host.session("wide") as fresh:
            fresh.eval(ids)
            assert forked.fork_report.differs == 0
            assert_same(forked, fresh)


def fork_until_it_fails(session, outcome):
    try:
        while True:
            session.fork("half").close()
    except Exception as error:
        outcome.append(error)


def test_closing_a_host_that_forks(tiny_gguf, split_models):
    models = {task: tiny_gguf(**{**COMMON, **TASKS[task]}) for task in ("base", "half")}
    paths = split_models(models)
    for round in range(6):
        host = pga.Host(*paths, n_threads=1)
        session = host.session("base", n_ctx=256, forks=("half",))
        session.eval(random_ids(100))
        outcome = []
        thread = threading.Thread(target=fork_until_it_fails, args=(session, outcome))
        thread.start()
        time.sleep(round * 2e-3)
        while True:
            try:
                host.close()
                break
            except BusyError:
                time.sleep(0)
        thread.join(timeout=30)
        assert [type(error) for error in outcome] == [ClosedError]


def test_threads_that_fork_each_others_sessions(host):
    ids = random_ids(40)
    with host.session("half", n_ctx=256) as fresh:
        wanted = fresh.eval(ids).copy()
    sessions = [host.session("base", n_ctx=256, forks=("half",)) for _ in range(2)]
    for session in sessions:
        session.eval(ids)
    found = []

    def run(first):
        for i in range(10):
            with sessions[(first + i) % 2].fork("half") as forked:
                found.append(np.array_equal(forked.logits, wanted))

    threads = [threading.Thread(target=run, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert found == [True] * 20
    for session in sessions:
        session.close()


@pytest.mark.parametrize(("targets", "differs"), [
    (r"blk\.[23]\.attn_q\.weight", 2), (r"blk\.3\.ffn_down\.weight", 3), (r"^output\.weight", 4), ("token_embd", 0),
])  # fmt: skip
def test_low_rank(tiny_gguf, tmp_path, targets, differs):
    lora = write_lora(tmp_path / "lora.gguf", Tiny(**COMMON), targets)
    with pga.Host(tiny_gguf(**COMMON), {"lora": lora}, n_threads=1, n_ubatch=32) as host:
        host.define_task("half", ["lora:0.5"])
        for source, target in (("base", "lora"), ("lora", "base"), ("lora", "half")):
            report = check(host, [random_ids(40)], source, target, forks=(target,))
            assert (report.differs, report.saved) == (differs, differs / N_LAYER)
