"""Adaptors that come and go: budget, order of leaving, pinning, prefetching, reloading, and files that change."""

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from loras import write_lora
from low_rank_models import base_and_task
from tiny_models import Tiny, random_ids, write_tiny

import pyggml_adapt as pga
from pyggml_adapt.errors import AdaptorError, ClosedError, FileAccessError, FileFormatError

SMALL = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 1}
IDS = random_ids(12)


@pytest.fixture(scope="module")
def base(tiny_gguf):
    return tiny_gguf(**SMALL)


@pytest.fixture
def loras(tmp_path):
    """Return five low-rank files of equal size."""
    return {f"l{i}": write_lora(tmp_path / f"l{i}.gguf", Tiny(**SMALL), seed=i) for i in range(5)}


def nbytes(path):
    with pga.ggml.GGUFReader(path) as reader:
        return sum(info.nbytes for info in reader.tensors.values())


def logits(host, task):
    with host.session(task, n_ctx=64) as session:
        return session.eval(IDS)


def resident(host):
    return {adaptor.name for adaptor in host.adaptors if adaptor.resident}


def failure(code, use, *args, match=None):
    with pytest.raises(AdaptorError, match=match) as error:
        use(*args)
    assert error.value.code == code
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def alone(base, loras):
    """Return each task's logits in a host that holds everything."""
    with pga.Host(base, loras, n_threads=1) as host:
        return {task: logits(host, task) for task in host.tasks}


def test_a_budget_is_never_exceeded_and_outputs_are_exact(base, loras, alone):
    size = nbytes(loras["l0"])
    rng = np.random.default_rng(0)
    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=2 * size) as host:
        assert host.tasks == ("base", *loras)
        for task in rng.choice(list(host.tasks), 60):
            np.testing.assert_array_equal(logits(host, str(task)), alone[str(task)])
            assert sum(a.nbytes for a in host.adaptors if a.resident) <= 2 * size


def test_the_one_used_longest_ago_leaves(base, loras):
    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=3 * nbytes(loras["l0"])) as host:
        assert resident(host) == {"l2", "l3", "l4"}
        logits(host, "l2")
        logits(host, "l0")
        assert resident(host) == {"l2", "l4", "l0"}
        host.activate("l4")
        logits(host, "l1")
        assert resident(host) == {"l4", "l0", "l1"}


def test_what_is_in_use_or_pinned_stays(base, loras):
    size = nbytes(loras["l0"])
    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=2 * size) as host:
        host.pin("l0")
        with host.session("l1", n_ctx=64) as session:
            session.eval(IDS)
            message = failure("adaptor_byte_limit_exceeded", host.session, "l2")
            assert message == (
                f"adaptor 'l2' needs {size} bytes, but of max_adaptor_bytes = {2 * size} only 0 are free or idle: "
                f"{2 * size} are in use or pinned"
            )
            failure("adaptor_byte_limit_exceeded", host.pin, "l2")
            session.eval([3])
            assert resident(host) == {"l0", "l1"}
        logits(host, "l2")
        assert resident(host) == {"l0", "l2"}
        host.unpin("l0")
        logits(host, "l3")
        logits(host, "l4")
        assert resident(host) == {"l3", "l4"}


def test_pinned_from_the_start(base, loras):
    with pga.Host(base, n_threads=1, max_adaptor_bytes=2 * nbytes(loras["l0"])) as host:
        host.load_adaptor("a", loras["l0"], pin=True)
        for i in range(1, 4):
            host.load_adaptor(f"l{i}", loras[f"l{i}"])
        assert resident(host) == {"a", "l3"}
        assert [adaptor.pinned for adaptor in host.adaptors] == [True, False, False, False]


def test_a_budget_smaller_than_one_adaptor(base, loras):
    size = nbytes(loras["l0"])
    with pga.Host(base, n_threads=1, max_adaptor_bytes=size - 1) as host:
        failure("adaptor_byte_limit_exceeded", host.load_adaptor, "a", loras["l0"], match=f"needs {size} bytes")
        assert host.tasks == ("base",) and host.adaptors == ()
        logits(host, "base")
    with pytest.raises(AdaptorError, match="needs") as error:
        pga.Host(base, loras, max_adaptor_bytes=0)
    assert error.value.code == "adaptor_byte_limit_exceeded"
    for wrong in (-1, 1.5, "1G", True):
        with pytest.raises(pga.errors.ParameterError, match=r"^max_adaptor_bytes = "):
            pga.Host(base, max_adaptor_bytes=wrong)


def test_a_blend_needs_room_for_all_of_it(base, loras):
    size = nbytes(loras["l0"])
    with pga.Host(base, loras, n_threads=1) as host:
        host.define_task("mix", ["l0:0.5", "l1:0.5", "l2"])
        want = logits(host, "mix")
    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=3 * size) as host:
        host.define_task("mix", ["l0:0.5", "l1:0.5", "l2"])
        logits(host, "l4")
        np.testing.assert_array_equal(logits(host, "mix"), want)
        assert resident(host) == {"l0", "l1", "l2"}
        with host.session("l4", n_ctx=64):
            failure("adaptor_byte_limit_exceeded", host.session, "mix")
        np.testing.assert_array_equal(logits(host, "mix"), want)
    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=2 * size) as host:
        failure("adaptor_byte_limit_exceeded", host.define_task, "mix", ["l0:0.5", "l1:0.5", "l2"])
        assert "mix" not in host.tasks


@pytest.mark.parametrize("use_mmap", [True, False])
def test_memory_goes_back(tmp_path, use_mmap):
    """Pages of the address range, as the kernel counts them: all while it is in memory, none after it left."""
    big = {"n_embd": 512, "n_ff": 512, "n_head": 8, "n_head_kv": 8, "n_layer": 2}
    models = {"base": write_tiny(tmp_path / "base.gguf", Tiny(**big))}
    for i in range(2):
        models[f"t{i}"] = write_tiny(tmp_path / f"t{i}.gguf", Tiny(**big, changed={"attn|ffn": i + 1}))
    report = pga.split(models, tmp_path)
    size = nbytes(report.adaptors["t0"])
    with pga.Host(report.foundation, report.adaptors, n_threads=1, max_adaptor_bytes=size, use_mmap=use_mmap) as host:
        logits(host, "t0")
        first = host.memory().adaptors
        assert first["t0"].resident >= size > first["t1"].resident == 0
        logits(host, "t1")
        second = host.memory().adaptors
        assert second["t0"].mapped == 0 and second["t1"].resident >= size
        with open("/proc/self/maps") as maps:
            assert "adaptor-t0" not in maps.read()
        for _ in range(20):
            logits(host, "t0")
            logits(host, "t1")
        grown = host.memory().process.resident - second["t1"].resident
        for _ in range(20):
            logits(host, "t0")
            logits(host, "t1")
        assert host.memory().process.resident - second["t1"].resident < grown + size // 2


def test_prefetch(base, loras, alone):
    size = nbytes(loras["l0"])
    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=2 * size) as host:
        assert host.prefetch("l0").result(60) == size
        assert "l0" in resident(host) and host.memory().adaptors["l0"].resident >= size
        assert host.prefetch("base").result(60) == 0
        np.testing.assert_array_equal(logits(host, "l0"), alone["l0"])
        failure("adaptor_not_found", host.prefetch, "nothing")
        with host.session("l1", n_ctx=64), host.session("l2", n_ctx=64):
            failure("adaptor_byte_limit_exceeded", host.prefetch("l3").result, 60)
        threads = [thread.name for thread in threading.enumerate() if "prefetch" in thread.name]
        assert len(threads) == 1
    assert not any("prefetch" in thread.name for thread in threading.enumerate())
    with pytest.raises(ClosedError):
        host.prefetch("l0")


def replace(path, other):
    """Put another file in a file's place, as a careful program does: the old one stays whole where it is mapped."""
    shutil.copy(other, f"{path}.new")
    os.replace(f"{path}.new", path)


def test_reload_takes_the_file_as_it_is_now(base, loras, alone):
    with pga.Host(base, loras, n_threads=1) as host:
        host.define_task("half", ["l0:0.5", "l2:0.5"])
        half = logits(host, "half")
        assert host.reload_adaptor("l0") is False
        session = host.session("l0", n_ctx=64)
        replace(loras["l0"], loras["l1"])
        np.testing.assert_array_equal(logits(host, "l0"), alone["l0"])  # until it is reloaded
        assert host.reload_adaptor("l0") is True
        np.testing.assert_array_equal(session.eval(IDS), alone["l0"])  # it began under the old content
        np.testing.assert_array_equal(logits(host, "l0"), alone["l1"])
        assert not np.array_equal(logits(host, "half"), half)
        session.rewind(0)
        np.testing.assert_array_equal(session.eval(IDS), alone["l0"])
        session.close()
        np.testing.assert_array_equal(logits(host, "l0"), alone["l1"])
        assert host.reload_adaptor("l0") is False
        failure("adaptor_not_found", host.reload_adaptor, "nothing")


def test_a_reload_that_fails_changes_nothing(base, loras, alone, tmp_path):
    with pga.Host(base, loras, n_threads=1) as host:
        pair = {"blk.9.attn_q.weight.lora_a": np.ones((4, 64)), "blk.9.attn_q.weight.lora_b": np.ones((64, 4))}
        other = write_lora(tmp_path / "x.gguf", Tiny(**SMALL), change=pair)
        replace(loras["l0"], other)
        failure("adaptor_base_mismatch", host.reload_adaptor, "l0", match="'blk.9.attn_q.weight', which is not there")
        np.testing.assert_array_equal(logits(host, "l0"), alone["l0"])
        loras["l0"].write_bytes(b"GGUF, but not really")
        with pytest.raises(FileFormatError):
            host.reload_adaptor("l0")
        loras["l0"].unlink()
        with pytest.raises(FileAccessError, match="no such file"):
            host.reload_adaptor("l0")
        np.testing.assert_array_equal(logits(host, "l1"), alone["l1"])


def test_a_file_that_changed_while_its_adaptor_was_away(base, loras, alone):
    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=nbytes(loras["l0"])) as host:
        replace(loras["l0"], loras["l1"])
        failure(
            "adaptor_changed", host.session, "l0", match="has other content than when it was loaded; reload_adaptor"
        )
        np.testing.assert_array_equal(logits(host, "l2"), alone["l2"])
        assert host.reload_adaptor("l0") is True
        np.testing.assert_array_equal(logits(host, "l0"), alone["l1"])
        logits(host, "l2")
        os.utime(loras["l0"])  # another time, but the same content
        np.testing.assert_array_equal(logits(host, "l0"), alone["l1"])
        logits(host, "l2")
        loras["l0"].unlink()
        with pytest.raises(FileAccessError, match="no such file"):
            host.session("l0")
        np.testing.assert_array_equal(logits(host, "l3"), alone["l3"])


def test_what_is_no_such_file_while_its_adaptor_is_away(base, loras, alone, tmp_path):
    """A shorter file is another one too, and a pipe does not block the host."""
    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=nbytes(loras["l0"])) as host:
        write_lora(loras["l0"], Tiny(**SMALL), "attn_q", rank=1)
        failure("adaptor_changed", host.session, "l0", match="has other content than when it was loaded; reload")
        loras["l0"].unlink()
        os.mkfifo(loras["l0"])
        with pytest.raises(FileAccessError, match=r"not a regular file$"):
            host.session("l0")
        np.testing.assert_array_equal(logits(host, "l3"), alone["l3"])


def test_text_is_of_the_file_that_was_loaded(tiny_gguf, split_models, loras, tmp_path):
    """The tokenizer is read when text first comes: never from another file that has come to its place."""
    models = {"a": tiny_gguf(**SMALL), "b": tiny_gguf(**SMALL, changed={"attn_q": 1})}
    foundation, parts = split_models(models)
    parts = {task: shutil.copy(path, tmp_path) for task, path in parts.items()}
    with pga.Host(foundation, parts, n_threads=1) as host:
        replace(parts["a"], parts["b"])
        failure("adaptor_changed", lambda: host.tokenize("a", task="a"), match="is another one than when it was loaded")
        assert host.tokenize("a", task="b")
    base = shutil.copy(models["a"], tmp_path / "base.gguf")
    with pga.Host(base, {"l0": loras["l0"]}, n_threads=1) as host:
        loras["l0"].unlink()  # a LoRA has no text of its own
        ids = host.tokenize("a", task="l0")
    with pga.Host(base, n_threads=1) as host:
        replace(base, models["b"])
        failure("foundation_changed", host.tokenize, "a", match="the foundation is another file than when it was")
        assert host.session(n_ctx=64).eval(ids).size


def test_a_file_written_to_while_it_is_mapped(base, loras, alone):
    """Its pages may be anything, or gone: nothing is computed with them."""
    with pga.Host(base, loras, n_threads=1) as host, host.session("l0", n_ctx=64) as session:
        session.eval(IDS)
        time.sleep(0.01)
        os.truncate(loras["l0"], 4096)
        for _ in range(2):
            failure("adaptor_changed", session.eval, [3], match="was written to while it was in use")
        assert session.n_past == len(IDS)
        failure("adaptor_changed", host.prefetch("l0").result, 60)
        np.testing.assert_array_equal(logits(host, "l1"), alone["l1"])


def test_a_foundation_written_to_while_it_is_mapped(tmp_path):
    path = write_tiny(tmp_path / "base.gguf", Tiny(**SMALL))
    with pga.Host(path, n_threads=1) as host, host.session(n_ctx=64) as session:
        session.eval(IDS)
        time.sleep(0.01)
        with open(path, "r+b") as file:
            file.write(b"G")
        failure("foundation_changed", session.eval, [3], match="the foundation was written to while it was in use")


def test_unload(base, loras, alone):
    with pga.Host(base, loras, n_threads=1) as host:
        host.define_task("mix", ["l0:0.5", "l1"])
        assert failure("adaptor_in_use", host.unload_adaptor, "l0") == (
            "adaptor 'l0' is part of task 'mix': unload that first"
        )
        with host.session("mix", n_ctx=64):
            for task in ("mix", "l0"):
                failure("adaptor_in_use", host.unload_adaptor, task)
        host.unload_adaptor("mix")
        assert host.tasks == ("base", *loras)
        with host.session("l0", n_ctx=64) as session:
            message = failure("adaptor_in_use", host.unload_adaptor, "l0")
            assert message == "task 'l0' is in use by 1 session(s)"
            session.eval(IDS)
        host.unload_adaptor("l0")
        failure("adaptor_not_found", host.session, "l0")
        failure("adaptor_not_found", host.unload_adaptor, "l0")
        failure("adaptor_in_use", host.unload_adaptor, "base", match="task 'base' is the foundation itself")
        np.testing.assert_array_equal(logits(host, "l1"), alone["l1"])
        host.load_adaptor("l0", loras["l0"])
        np.testing.assert_array_equal(logits(host, "l0"), alone["l0"])
        failure("adaptor_exists", host.load_adaptor, "l0", loras["l0"])
        failure("adaptor_exists", host.define_task, "l0", ["l1"])


def test_many_threads_while_adaptors_come_and_go(base, loras, alone):
    """Four threads evaluate, load, unload, prefetch and pin under a small budget; every result is the task's own."""
    size, errors, n_done = nbytes(loras["l0"]), [], [0] * 4
    expected = {"adaptor_in_use", "adaptor_exists", "adaptor_not_found", "adaptor_byte_limit_exceeded"}

    def work(host, thread):
        rng = np.random.default_rng(thread)
        try:
            for step in range(60):
                task = f"l{rng.integers(5)}"
                try:
                    if step % 6 == 3:
                        host.unload_adaptor(task)
                    elif step % 6 == 4:
                        host.load_adaptor(task, loras[task])
                    elif step % 6 == 5:
                        host.prefetch(task)
                    else:
                        assert np.array_equal(logits(host, task), alone[task])
                        n_done[thread] += 1
                except AdaptorError as error:
                    assert error.code in expected, error
                assert sum(a.nbytes for a in host.adaptors if a.resident) <= 4 * size
        except BaseException as error:
            errors.append(error)
            raise

    with pga.Host(base, loras, n_threads=1, max_adaptor_bytes=4 * size) as host:
        threads = [threading.Thread(target=work, args=(host, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and min(n_done) >= 10


def test_descriptors_are_closed(base, loras):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    with pga.Host(base, n_threads=1, max_adaptor_bytes=2 * nbytes(loras["l0"])) as host:
        before = opened()
        for task, path in loras.items():
            host.load_adaptor(task, path)
        assert opened() <= before + 4  # a file and its mapping, for two adaptors
        for task in loras:
            host.unload_adaptor(task)
        assert opened() == before


def test_another_alpha_is_another_content(tmp_path):
    """In a file of ours the tensors' digests do not say all: equal pairs under another alpha are another adaptor."""
    base, task = base_and_task(tmp_path, Tiny(**SMALL), 2, "attn_q")
    path = Path(pga.split({"t": task}, tmp_path, foundation=base, low_rank=2).adaptors["t"])
    other = tmp_path / "other.gguf"
    writer = pga.ggml.GGUFWriter()
    with pga.ggml.GGUFReader(path) as reader:
        for key in reader.metadata:
            writer.copy_kv(reader, key)
        writer.set("adapter.lora.alpha", 2 * reader.metadata["adapter.lora.alpha"], "f32")
        data = memoryview(reader.map())
        for info in reader.tensors.values():
            writer.add_tensor(info.name, info.type, info.ne)
        places = {i.name: data[i.offset : i.offset + i.nbytes] for i in reader.tensors.values()}
        writer.write(other, places)
    with pga.Host(base, {"t": path, "other": other}, n_threads=1) as host:
        assert len({adaptor.content_id for adaptor in host.adaptors}) == 2
        want = logits(host, "other")
        with host.session("t", n_ctx=64, forks=["other"]) as session:
            session.eval(IDS)
            with session.fork("other") as forked:
                np.testing.assert_array_equal(forked.logits, want)
        assert not np.array_equal(logits(host, "t"), want)
        replace(path, other)
        assert host.reload_adaptor("t") is True
        np.testing.assert_array_equal(logits(host, "t"), want)
