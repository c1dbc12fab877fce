"""Layers with a sliding window: a cache of the window's size, past its end, rewound, forked and interrupted."""

import numpy as np
import pytest
from reference import Reference
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine import runner
from pyggml_adapt.errors import AllocError

N_CTX, N_UBATCH = 1024, 48
COMMON = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 2, "n_layer": 5, "type": "Q8_0"}
TASKS = {
    "base": {},
    "same": {},
    "middle": {"changed": {r"blk\.3\.ffn": 1}},
    "head": {"changed": {"^output_norm": 2}},
    "first": {"changed": {r"blk\.0\.attn_q": 3}},
}
IDS = random_ids(900)


@pytest.fixture(scope="module")
def path(tiny_gguf):
    return tiny_gguf("gemma3", **COMMON)


@pytest.fixture(scope="module")
def host(tiny_gguf, split_models):
    models = {task: tiny_gguf("gemma3", **COMMON, **changes) for task, changes in TASKS.items()}
    with pga.Host(*split_models(models), n_threads=1, n_ubatch=N_UBATCH) as host:
        yield host


def fed(session, *sizes):
    """Return a session that was given this many tokens in each call; 1 for one by itself."""
    for n in sizes:
        session.eval(IDS[session.n_past : session.n_past + n])
    return session


@pytest.mark.parametrize("flash_attn", [True, False], ids=["flash", "soft-max"])
@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "cohere2", "olmo2"])
def test_far_past_the_window(tiny_gguf, arch, flash_attn):
    """The cells of the window are used again several times, in pieces and token by token, after rewinds too."""
    metadata = {"attention.sliding_window": 24}
    path = tiny_gguf(arch, **COMMON, metadata={**metadata, "logit_scale": 0.0625} if arch == "cohere2" else metadata)
    options = {"n_threads": 1, "n_ubatch": N_UBATCH, "flash_attn": flash_attn}
    with Reference(path, n_ctx=N_CTX, **options) as reference, pga.Host(path, **options) as host:
        with host.session(n_ctx=N_CTX) as session:
            for n in (200, 1, 60, *[1] * 30, 150, -20, 1, 70, *[1] * 40, 90, -3, 5, 1, 1, 100):
                if n < 0:
                    reference.rewind(reference.n_past + n)
                    session.rewind(session.n_past + n)
                    assert session._n_evaluated == session.n_past  # what it sees is still there
                    continue
                ids = IDS[session.n_past : session.n_past + n]
                want, got = (model.eval(ids, all_logits=True) for model in (reference, session))
                np.testing.assert_array_equal(want, got, err_msg=f"{n} tokens after {session.n_past - n}")
            assert session.n_past > 2 * 256


def test_it_takes_no_more_memory_than_the_window(path):
    with pga.Host(path, n_threads=1, n_ubatch=N_UBATCH) as host:
        with host.session(n_ctx=N_CTX) as session:
            row = 2 * 2 * 64  # F16, two heads of 32 elements, K and V
            assert session.kv_nbytes == 5 * 256 * row  # five windows, of 24 + 48 tokens, padded
    with pga.Host(path, n_threads=1) as host, host.session(n_ctx=N_CTX) as session:
        assert session.kv_nbytes == 5 * 768 * row  # 24 + 512


def test_rewound_beyond_the_window(host):
    """The tokens that are left are evaluated again, as if they had come with the next ones."""
    with host.session("base", n_ctx=N_CTX) as session, host.session("base", n_ctx=N_CTX) as fresh:
        fed(session, 200, 1, 1, 400)
        session.rewind(250)
        assert (session.n_past, session.logits) == (250, None)
        np.testing.assert_array_equal(session.eval(IDS[600:610]), fresh.eval(IDS[:250] + IDS[600:610]))
        np.testing.assert_array_equal(session.eval([7]), fresh.eval([7]))
        session.rewind(0)
        fresh.rewind(0)
        np.testing.assert_array_equal(session.eval(IDS[:300]), fresh.eval(IDS[:300]))


def test_generation_after_a_rewind_beyond_the_window(host):
    with host.session("base", n_ctx=N_CTX) as session, host.session("base", n_ctx=N_CTX) as fresh:
        fed(session, 500)
        session.rewind(100)
        params = pga.SamplerParams(temperature=0.0)
        ours = list(session.generate_ids([5], max_tokens=6, params=params))
        assert ours == list(fresh.generate_ids([*IDS[:100], 5], max_tokens=6, params=params))


def test_an_evaluation_that_fails_midway(host, monkeypatch):
    """Its first pieces have overwritten what the window showed: all that came before is evaluated again."""
    with host.session("base", n_ctx=N_CTX) as session, host.session("base", n_ctx=N_CTX) as fresh:
        fed(session, 300)
        run, left = runner.Program.run, [5]

        def fail(*args):
            left[0] -= 1
            if left[0] < 0:
                raise AllocError("no memory")
            run(*args)

        with monkeypatch.context() as patch:
            patch.setattr(runner.Program, "run", fail)
            with pytest.raises(AllocError, match=r"^no memory$"):
                session.eval(IDS[300:700])
        assert session.tokens == IDS[:300]
        np.testing.assert_array_equal(session.eval(IDS[300:320]), fresh.eval(IDS[:320]))


CALLS = {  # the sizes of the calls, and of how many tokens a fork reuses K and V
    "within": ((100, 60), 160),
    "past the window": ((100, 60, 300), 460),
    "and steps": ((300, 1, 1, 1), 300),
    "and too many steps": ((300, *[1] * 240), 0),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("calls", CALLS)
def test_forks(host, task, calls):
    """Bit for bit a fresh session's, whether or not the window still holds what a fork needs."""
    sizes, n_reused = CALLS[calls]
    whole = [n for n in sizes if n > 1]
    rest = sum(sizes) - sum(whole)
    with (
        host.session("base", n_ctx=N_CTX, forks=("middle", "head")) as session,
        host.session(task, n_ctx=N_CTX) as fresh,
    ):
        fed(session, *sizes)
        is_copy = task in ("base", "same")
        fed(fresh, *(sizes if is_copy else (*whole, rest)) if rest else sizes)
        with session.fork(task) as forked:
            np.testing.assert_array_equal(forked.logits, fresh.logits)
            for ids in ([5], IDS[:70], [6], [7]):
                np.testing.assert_array_equal(forked.eval(ids), fresh.eval(ids))
            report = forked.fork_report
        if is_copy:
            assert report.n_reused == sum(sizes)
        else:
            assert report.n_reused == (0 if task == "first" else n_reused)
            assert report.saved == 0 if report.n_reused == 0 else 0.1 < report.saved <= 1


def test_forks_without_kept_states_and_into_another_size(host):
    with host.session("base", n_ctx=N_CTX) as session, host.session("head", n_ctx=N_CTX) as fresh:
        fed(session, 100, 300)
        fed(fresh, 100, 300)
        with session.fork("head") as forked:  # the last piece is computed, 300 % 48 tokens
            np.testing.assert_array_equal(forked.logits, fresh.logits)
            assert forked.fork_report.n_reused == 400 - 300 % N_UBATCH
            np.testing.assert_array_equal(forked.eval(IDS[:60]), fresh.eval(IDS[:60]))
        with session.fork("base", n_ctx=600) as forked, host.session("base", n_ctx=600) as other:
            fed(other, 100, 300)
            np.testing.assert_array_equal(forked.logits, other.logits)
            np.testing.assert_array_equal(forked.eval(IDS[:60]), other.eval(IDS[:60]))


def test_forks_of_a_session_that_was_rewound_past_the_end_of_the_window(host):
    """Its tokens are in other cells than a fresh session's, so the fork computes them all, in one call."""
    with host.session("base", n_ctx=N_CTX, forks=["middle"]) as session:
        fed(session, 100, 300)
        session.rewind(390)
        fed(session, 1, 20)
        for task in ("middle", "base"):
            with session.fork(task) as forked, host.session(task, n_ctx=N_CTX) as fresh:
                report = forked.fork_report
                if task == "base":
                    assert report.n_reused == 411
                    np.testing.assert_array_equal(forked.eval([5]), session.eval([5]))
                else:
                    assert report.n_reused == 0
                    np.testing.assert_array_equal(forked.logits, fresh.eval(IDS[:411]))


def test_reports_of_forks_say_what_was_reused(host):
    with host.session("base", n_ctx=N_CTX, forks=["middle"]) as session:
        fed(session, 100, 300)
        session.rewind(390)
        fed(session, 20)
        with session.fork("middle") as forked:
            report = forked.fork_report
            assert (report.n_reused, report.saved, report.copied_nbytes) == (0, 0.0, 0)
        session.rewind(150)  # all that is left must be evaluated again
        with session.fork("base") as forked, host.session("base", n_ctx=N_CTX) as fresh:
            report = forked.fork_report
            assert (report.n_tokens, report.n_reused, report.saved) == (150, 0, 0.0)
            assert forked.logits is None
            np.testing.assert_array_equal(forked.eval([5]), fresh.eval([*IDS[:150], 5]))


@pytest.mark.parametrize("arch", ["phi3", "llama"])
@pytest.mark.parametrize("sizes", [(256, 1024), (1024, 256)])
def test_forks_between_short_and_long_factors(tiny_gguf, arch, sizes):
    """LongRoPE's factors depend on the size of the context, so K of one size is not that of the other."""
    more = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 300}
    path = tiny_gguf(arch, **COMMON, optional="^output|rope_f", metadata=more)
    with pga.Host(path, n_threads=1) as host:
        with host.session(n_ctx=sizes[0]) as session, host.session(n_ctx=sizes[1]) as fresh:
            fed(session, 100)
            with session.fork(n_ctx=sizes[1]) as forked:
                np.testing.assert_array_equal(forked.logits, fresh.eval(IDS[:100]))
                assert forked.fork_report.n_reused == 0
                assert not np.array_equal(forked.logits, session.logits)
            with session.fork() as forked:
                assert forked.fork_report.n_reused == 100
