"""Zero copy: what the kernel says of the pages of foundation and adaptors, and of what is private."""

import subprocess
import sys

import pytest
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.host.memory import Pages, _mappings

LARGE = {"n_embd": 512, "n_ff": 1536, "n_head": 8, "n_head_kv": 8, "n_layer": 4}  # 54 MB in F32
MiB = 1 << 20
USE = """
import sys, pyggml_adapt as pga
host = pga.Host(sys.argv[1], {"a": sys.argv[2], "b": sys.argv[3]}, n_threads=1)
session = host.session("a", n_ctx=64)
session.eval([1, 2, 3])
print("ready", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/smaps")


@pytest.fixture(scope="module")
def parts(tiny_gguf, split_models):
    foundation, adaptors = split_models(
        {task: tiny_gguf(**LARGE, changed={r"blk\.3\.attn": i}) for i, task in enumerate("abcd")}
    )
    return foundation, adaptors


def test_processes_share_the_foundation(parts):
    """With a second process on the same files nearly none of their pages is this one's own."""
    foundation, adaptors = parts
    with subprocess.Popen(
        [sys.executable, "-c", USE, foundation, adaptors["a"], adaptors["b"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "ready\n"
        with pga.Host(foundation, {"a": adaptors["a"]}, n_threads=1) as host:
            with host.session("a", n_ctx=64) as session:
                session.eval([1, 2, 3])
                memory = host.memory()
        other.stdin.close()
    for pages, path in ((memory.foundation, foundation), (memory.adaptors["a"], adaptors["a"])):
        size = path.stat().st_size
        assert size <= pages.mapped < size + 2 * 4096
        assert pages.shared > 0.9 * size
        assert pages.private < 0.02 * size + 16 * 4096
        assert pages.pss < 0.6 * size


def test_private_memory_grows_by_cache_and_compute_only(parts):
    """Four tasks of 54 MB each; the bound is what was allocated for KV and graphs, and 8 MiB for Python objects."""
    foundation, adaptors = parts
    with pga.Host(foundation, {"a": adaptors["a"]}, n_threads=1) as host:  # warm: imports, thread stacks
        with host.session("a", n_ctx=64) as session:
            session.eval(random_ids(64))
    with pga.Host(foundation, n_threads=1) as host:
        before = host.memory().process
        for task, path in adaptors.items():
            host.load_adaptor(task, path)
        sessions = [host.session(task, n_ctx=512) for task in adaptors]
        for session in sessions:
            session.eval(random_ids(512))
        memory = host.memory()
    kv_per_session = 4 * 512 * 512 * 2 * 2  # layers, elements of K and V, cells, F16
    assert memory.kv == 4 * kv_per_session
    assert 0 < memory.compute < 64 * MiB
    mapped = sum((pages for pages in memory.adaptors.values()), memory.foundation)
    growth = (memory.process.private - mapped.private) - before.private
    assert growth < memory.kv + memory.compute + 8 * MiB
    assert mapped.mapped > 54 * MiB


def test_closing_gives_memory_back(parts):
    foundation, adaptors = parts
    with pga.Host(foundation, {"a": adaptors["a"]}, n_threads=1) as host:
        assert host.memory().kv == 0
        with host.session("a", n_ctx=512):
            assert host.memory().kv == 4 * 512 * 512 * 2 * 2
        assert host.memory().kv == 0


def test_compute_memory_is_bounded(parts):
    """A thousand batches of other sizes: kept graphs are dropped before they take more than a fixed amount."""
    from pyggml_adapt.engine.runner import MAX_IDLE_NBYTES

    foundation, adaptors = parts
    with pga.Host(foundation, {"a": adaptors["a"]}, n_threads=1) as host, host.session("a", n_ctx=512) as session:
        session.eval(random_ids(512), all_logits=True)
        largest = host.memory().compute
        for n in range(1, 120, 3):
            session.rewind(0)
            session.eval(random_ids(n))
            assert host.memory().compute <= MAX_IDLE_NBYTES + largest


def test_without_mmap_the_weights_are_private(parts):
    foundation, adaptors = parts
    with pga.Host(foundation, {"a": adaptors["a"]}, n_threads=1, use_mmap=False) as host:
        memory = host.memory()
        for pages in (memory.foundation, memory.adaptors["a"]):
            assert pages.private == pages.resident == pages.mapped > 0


def test_mlock_is_asked_for_and_its_failure_only_warns(parts, caplog):
    foundation, _ = parts
    with pga.Host(foundation, n_threads=1, use_mlock=True) as host:
        assert host.memory().foundation.mapped
    for record in caplog.records:
        assert record.message.startswith(f"{foundation}: mlock of ")


def test_smaps():
    text = """7f0000000000-7f0000003000 r--p 00000000 08:01 42   /models/a (deleted)
Size:                 12 kB
Rss:                   8 kB
Pss:                   2 kB
Shared_Clean:          4 kB
Shared_Dirty:          0 kB
Private_Clean:         4 kB
Private_Dirty:         0 kB
VmFlags: rd mr mw me
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
Size:                  4 kB
Private_Dirty:         4 kB
"""
    (start, first), (_, second) = _mappings(text)
    assert start == 0x7F0000000000
    assert first == Pages(mapped=12288, resident=8192, shared=4096, private=4096, pss=2048)
    assert second == Pages(mapped=4096, private=4096)
    assert (first + second).private == 8192
