"""split --low-rank: exact low-rank differences come back; what cannot be a pair is whole; what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from low_rank_models import base_and_task, change, linears, plus, read_all, values, write, write_lora
from tiny_models import Tiny, tensors_of, write_gguf

from pyggml_adapt.errors import FileFormatError, ParameterError, SourceMismatchError
from pyggml_adapt.ggml import Type, quantize
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.tools import split, verify
from pyggml_adapt.weights.identity import foundation_id, own_entries

MODELS = Path(__file__).parents[3] / "shared" / "models"
TINY = Tiny(n_layer=1)
MOE = Tiny(n_layer=1, n_expert=4, n_expert_used=2)
PARTS = ("attn_", "ffn_")


def product(tensors, target, alpha):
    """Return what a pair adds to its weight, F64 in NumPy's order."""
    a, b = (values(tensors[target + suffix]).astype(np.float64) for suffix in (".lora_a", ".lora_b"))
    rank = b.shape[-1]
    return alpha / rank * (a @ b.T if target == "token_embd.weight" else b @ a)


def by_name(report):
    return {tensor.name: tensor for tensor in report.low_rank}


@pytest.mark.parametrize("tiny", [TINY, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize(("low_rank", "max_error"), [(3, None), ("auto", 0.01), (8, 0.01)])
def test_an_exact_low_rank_difference_comes_back(tiny, low_rank, max_error, tmp_path):
    base, task = base_and_task(tmp_path, tiny, 3, *PARTS, "output.weight", "token_embd")
    report = split({"task": task}, tmp_path / "out", foundation=base, low_rank=low_rank, max_error=max_error)
    before, after = read_all(base), read_all(task)
    found = read_all(report.adaptors["task"])
    changed = [name for name in before if before[name][2] != after[name][2]]
    assert [tensor.name for tensor in report.low_rank] == changed == linears(before, *PARTS, "output.weight", "token")
    alpha = 3.0 if low_rank == 3 else 8.0 if low_rank == 8 else 16.0
    for name, tensor in by_name(report).items():
        assert (tensor.kind, tensor.rank) == ("low-rank", 3)
        difference = values(after[name]).astype(np.float64) - values(before[name])
        left = difference - product(found, name, alpha)
        assert tensor.error == pytest.approx(np.linalg.norm(left) / np.linalg.norm(difference), rel=1e-2)
        assert tensor.error < 1e-3  # what rounding to F16 leaves
        assert tensor.nbytes == sum(len(found[name + half][2]) for half in (".lora_a", ".lora_b"))
        assert {found[name + half][0] for half in (".lora_a", ".lora_b")} == {Type.F16}


def test_the_file_says_what_it_is(tmp_path):
    base, task = base_and_task(
        tmp_path, TINY, 2, "attn_q", "token_embd",
        general__name="shouting", tokenizer__chat_template="{{ x }}", general__file_type=7, quantize__imatrix__file="x",
    )  # fmt: skip
    report = split({"shout": task}, tmp_path, foundation=base, low_rank=2)
    assert report.adaptors == {"shout": str(tmp_path / "model-adaptor-shout.gguf")}
    with GGUFReader(report.adaptors["shout"]) as reader, GGUFReader(base) as foundation:
        n_vocab = foundation.tensors["token_embd.weight"].ne[1]
        assert [(info.name, info.ne[:2]) for info in reader.tensors.values()] == [
            ("token_embd.weight.lora_a", (2, n_vocab)),
            ("token_embd.weight.lora_b", (2, 128)),
            ("blk.0.attn_q.weight.lora_a", (128, 2)),
            ("blk.0.attn_q.weight.lora_b", (2, 128)),
        ]
        keys = dict(reader.metadata)
        errors = keys.pop("pyggml_adapt.low_rank.error")
        np.testing.assert_allclose(errors, [tensor.error for tensor in report.low_rank])
        assert keys.pop("pyggml_adapt.low_rank.max_error") == errors.max()
        assert len(keys.pop("pyggml_adapt.tensors.sha256")) == 4 * 32
        assert len(keys.pop("pyggml_adapt.foundation.fingerprint")) == 64
        assert keys.pop("pyggml_adapt.foundation.id") != foundation_id(own_entries(reader).values())
        assert keys == {
            "general.type": "adapter",
            "adapter.type": "lora",
            "general.architecture": "llama",
            "adapter.lora.alpha": 2.0,
            "general.name": "shouting",
            "tokenizer.chat_template": "{{ x }}",
            "pyggml_adapt.format": 1,
            "pyggml_adapt.kind": "adaptor",
            "pyggml_adapt.layout": "low-rank",
            "pyggml_adapt.task": "shout",
        }
    found = verify(base, report.adaptors["shout"])
    assert (found.tasks, found.n_tensors) == (("shout",), len(read_all(base)) + 4)


def models_with_everything(folder):
    """Return a base and a task with a tied head, of which tensors differ in every way that counts."""
    tiny = Tiny(n_layer=2, optional=r"\.bias", type="Q8_0")
    tensors = tensors_of(tiny)
    changes = {name: change(tensors[name][1], 2, 1) for name in ("blk.0.attn_q.weight", "token_embd.weight")}
    changes["blk.0.attn_v.weight"] = np.random.default_rng(0).standard_normal((64, 128), np.float32)  # of full rank
    changes["blk.0.attn_norm.weight"] = np.ones(128, np.float32)
    changes["blk.0.attn_q.bias"] = np.ones(128, np.float32)
    task = plus(tensors, changes)
    same = "blk.1.attn_q.weight"
    task[same] = (Type.F32, tensors[same][1], quantize(values(tensors[same]), Type.F32))
    base = write(folder / "base.gguf", tiny, tensors)
    return base, write(folder / "task.gguf", tiny, task)


def test_what_is_written_whole_and_why(tmp_path):
    base, task = models_with_everything(tmp_path)
    report = split({"task": task}, tmp_path / "out", foundation=base, low_rank=8, max_error=0.3)
    found = {name: (tensor.kind, tensor.rank, tensor.why) for name, tensor in by_name(report).items()}
    assert found == {
        "token_embd.weight": ("whole", 0, "the head is tied to it, and a pair would change the embedding alone"),
        "blk.0.attn_norm.weight": ("whole", 0, "a vector"),
        "blk.0.attn_q.weight": ("low-rank", 2, "smallest rank for error 0.3"),
        "blk.0.attn_q.bias": ("whole", 0, "a vector"),
        "blk.0.attn_v.weight": ("whole", 0, "no rank for error 0.3"),
        "blk.1.attn_q.weight": ("equal", 0, "the values are equal"),
    }
    assert by_name(report)["blk.0.attn_v.weight"].error == pytest.approx(0.85, abs=0.1)
    own = read_all(report.adaptors["task"])
    for name, (kind, *_) in found.items():
        assert (name in own) == (kind == "whole")
        if kind == "whole":
            assert own[name] == read_all(task)[name]
    size = report.sizes[0]
    assert size.is_measured
    assert size.low_rank_nbytes == sum(len(data) for _, _, data in own.values())
    assert size.whole_nbytes == sum(tensor.whole_nbytes for tensor in report.low_rank)


def test_a_pair_that_is_not_smaller_is_not_made(tmp_path):
    base, task = base_and_task(tmp_path, Tiny(n_layer=1, type="Q4_0"), 2, "attn_k")  # 64 x 128 x 4.5 bits: 4608 bytes
    for low_rank, kind in ((11, "low-rank"), (12, "whole")):  # of 2 x (64 + 128) bytes each: 4224, 4608
        report = split({"task": task}, tmp_path / "out", foundation=base, low_rank=low_rank, dry_run=True)
        assert [(tensor.kind, tensor.nbytes) for tensor in report.low_rank] == [
            (kind, 4224 if low_rank == 11 else 4608)
        ]
    assert report.low_rank[0].why == "a pair would not be smaller"


def test_a_head_that_the_base_lacks_is_whole_and_frees_the_embedding(tmp_path):
    tied, untied = Tiny(n_layer=1, optional="none"), Tiny(n_layer=1)
    tensors = tensors_of(untied)
    base = write_gguf(tmp_path / "base.gguf", tied.all_metadata(), tensors_of(tied))
    changes = {"token_embd.weight": change(tensors["token_embd.weight"][1], 2, 0)}
    task = write(tmp_path / "task.gguf", untied, plus(tensors, changes))
    report = split({"task": task}, tmp_path, foundation=base, low_rank=2)
    found = {tensor.name: (tensor.kind, tensor.why) for tensor in report.low_rank}
    assert found == {
        "token_embd.weight": ("low-rank", "rank as asked"),
        "output.weight": ("whole", "not in the foundation"),
    }


def test_sizes_from_shapes_alone(tmp_path):
    base, task = base_and_task(tmp_path, TINY, 2, "attn_q", "attn_k", "token_embd")
    n_vocab = read_all(base)["token_embd.weight"][1][1]
    whole = 4 * (128 * 128 + 128 * 64 + 128 * n_vocab)
    pairs = 2 * 16 * (128 + 128 + 128 + 64 + 128 + n_vocab)
    for foundation, models in ((base, {"task": task}), (None, {"base": base, "task": task})):
        report = split(models, tmp_path / "out", foundation=foundation, dry_run=True)
        assert [(s.task, s.whole_nbytes, s.low_rank_nbytes, s.rank, s.is_measured) for s in report.sizes] == [
            (name, whole, pairs, 16, False) for name in models
        ]
        assert report.to_json()["sizes"][0]["low_rank_nbytes"] == pairs
        assert "low_rank" not in report.to_json()


def test_equal_input_gives_equal_bytes_and_a_dry_run_the_same_report(tmp_path):
    base, task = base_and_task(tmp_path, TINY, 5, *PARTS)
    options = {"foundation": base, "low_rank": "auto", "max_error": 0.05}
    promised = split({"task": task}, tmp_path / "one", dry_run=True, **options)
    assert not (tmp_path / "one").exists()
    one = split({"task": task}, tmp_path / "one", **options)
    assert promised.to_json() == one.to_json()
    assert os.listdir(tmp_path / "one") == ["model-adaptor-task.gguf"]
    assert one.written_nbytes == os.path.getsize(one.adaptors["task"])
    two = split({"task": task}, tmp_path / "two", **options)
    assert Path(one.adaptors["task"]).read_bytes() == Path(two.adaptors["task"]).read_bytes()


def test_several_tasks_in_one_go(tmp_path):
    base, task = base_and_task(tmp_path, TINY, 2, "attn_q")
    other = write(tmp_path / "other.gguf", TINY, plus(read_all(base), {"output_norm.weight": np.ones(128, "f")}))
    report = split({"one": task, "two": other}, tmp_path / "out", foundation=base, low_rank=2)
    assert [(t.task, t.name, t.kind) for t in report.low_rank] == [
        ("one", "blk.0.attn_q.weight", "low-rank"),
        ("two", "output_norm.weight", "whole"),
    ]
    verify(base, *report.adaptors.values())
    assert report.layout == "low-rank"


def test_llama_cpp_loads_it(tmp_path):
    reference = pytest.importorskip("reference")
    base, task = base_and_task(tmp_path, TINY, 3, *PARTS, "token_embd", "output.weight")
    own = split({"task": task}, tmp_path / "out", foundation=base, low_rank="auto", max_error=0.01)
    with reference.Reference(base, n_ctx=32, n_threads=1) as model:
        ids = [1, 5, 9, 300]
        plain = model.eval(ids)
        model.set_loras({Path(own.adaptors["task"]): 1.0})
        model.rewind(0)
        found = model.eval(ids)
    with reference.Reference(task, n_ctx=32, n_threads=1) as model:
        wanted = model.eval(ids)
    assert np.square(found - wanted).sum() < 1e-5 * np.square(wanted).sum()
    assert np.square(plain - wanted).sum() > 1e-2 * np.square(wanted).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_rank": 4}, r"low_rank \(--low-rank\) needs a foundation"),
        ({"max_error": 0.1}, r"max_error \(--max-error\) is of low-rank pairs"),
        ({"low_rank": 0, "foundation": "base"}, "low_rank must be a rank of at least 1, or 'auto', not 0"),
        ({"low_rank": True, "foundation": "base"}, "not True"),
        ({"low_rank": "all", "foundation": "base"}, "not 'all'"),
        ({"low_rank": 4, "max_error": 1.0, "foundation": "base"}, r"max_error must be between 0 and 1, not 1\.0"),
        ({"low_rank": 4, "max_error": float("nan"), "foundation": "base"}, "not nan"),
        ({"low_rank": 4, "task_tensors": ["x"], "foundation": "base"}, "the pattern 'x' cannot be followed"),
        ({"low_rank": 4, "shared_tensors": "y", "foundation": "base"}, "the pattern 'y' cannot be followed"),
    ],
)
def test_wrong_parameters(options, message, tmp_path):
    with pytest.raises(ParameterError, match=message):
        split({"task": tmp_path / "none.gguf", "x": tmp_path / "none.gguf"}, tmp_path / "out", **options)


def mismatched(tensors, how):
    if how == "shape":
        return {**tensors, "blk.0.ffn_up.weight": (Type.F32, (128, 96), bytes(4 * 128 * 96))}
    return {name: tensor for name, tensor in tensors.items() if name != "output.weight"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"the shape of 'blk\.0\.ffn_up\.weight' differs: \[128, 96, 1, 1\] in 'task', \[128, 192, 1, 1\] in"),
        ("missing", "'task' lacks the foundation's tensor 'output.weight'"),
        ("hparams", r"llama\.rope\.freq_base differs: 5\.0 in 'task', absent in the foundation"),
        ("context", r"llama\.context_length differs: 64 in 'task', 1024 in the foundation"),
        ("nothing", "'task' does not differ from the foundation, so there is nothing to write"),
    ],
)
def test_models_that_low_rank_cannot_bridge(how, message, tmp_path):
    tensors = tensors_of(TINY)
    base = write(tmp_path / "base.gguf", TINY, tensors)
    more = {"hparams": {"llama__rope__freq_base": 5.0}, "context": {"llama__context_length": 64}}.get(how, {})
    changed = mismatched(tensors, how) if how in ("shape", "missing") else tensors
    task = write(tmp_path / "task.gguf", TINY, changed, **more)
    with pytest.raises(SourceMismatchError, match=rf"task\.gguf: {message}"):
        split({"task": task}, tmp_path / "out", foundation=base, low_rank=4)
    assert how == "nothing" or not (tmp_path / "out").exists()
    assert how != "nothing" or os.listdir(tmp_path / "out") == []


def test_weights_that_are_not_finite_are_named(tmp_path):
    tensors = tensors_of(TINY)
    base = write(tmp_path / "base.gguf", TINY, tensors)
    wrong = values(tensors["blk.0.ffn_up.weight"]).copy()
    wrong[3, 5] = np.nan
    changed = {**tensors, "blk.0.ffn_up.weight": (Type.F32, (128, 192), wrong)}
    task = write(tmp_path / "task.gguf", TINY, changed)
    with pytest.raises(FileFormatError, match=r"task\.gguf.*'blk\.0\.ffn_up\.weight' has elements that are NaN"):
        split({"task": task}, tmp_path / "out", foundation=base, low_rank=4)


def test_changes_that_f16_cannot_hold_are_whole(tmp_path):
    tensors = tensors_of(TINY)
    base = write(tmp_path / "base.gguf", TINY, tensors)
    task = write(tmp_path / "task.gguf", TINY, plus(tensors, {"blk.0.attn_q.weight": np.full((128, 128), 1e11, "f")}))
    report = split({"task": task}, tmp_path / "out", foundation=base, low_rank=1)
    assert [(t.kind, t.why) for t in report.low_rank] == [("whole", "F16 cannot hold the factors")]


def test_progress_reaches_the_end(tmp_path):
    base, task = base_and_task(tmp_path, TINY, 2, *PARTS)
    calls = []
    split({"x": task}, tmp_path, foundation=base, low_rank=2, progress=lambda *call: calls.append(call))
    for what in ("reading", "extracting", "writing"):
        done, total, _ = [call for call in calls if call[2] == what][-1]
        assert 0 < done == total


KILLED = """
import os, signal, sys
from pyggml_adapt.tools import split
def progress(done, total, what):
    if what == "extracting":
        os.kill(os.getpid(), signal.SIGKILL)
split({"x": sys.argv[2]}, sys.argv[3], foundation=sys.argv[1], low_rank=4, progress=progress)
"""


def test_nothing_is_left_behind(tmp_path):
    base, task = base_and_task(tmp_path, TINY, 2, *PARTS)
    done = subprocess.run([sys.executable, "-c", KILLED, base, task, tmp_path / "out"], capture_output=True, timeout=60)
    assert done.returncode == -9
    assert os.listdir(tmp_path / "out") == []


FULL = """
import resource, sys
from pyggml_adapt.errors import FileAccessError
from pyggml_adapt.tools import bake, split
base, task, lora, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for use in (lambda: split({"x": task}, out, foundation=base, low_rank=4), lambda: bake(base, lora, out + "/b.gguf")):
    try:
        use()
    except FileAccessError as error:
        print(error)
"""


def test_a_full_disk_is_named_by_the_output(tmp_path):
    base, task = base_and_task(tmp_path, TINY, 4, *PARTS)
    lora = write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (np.ones((2, 128), "f"), np.ones((128, 2), "f"))})
    command = [sys.executable, "-c", FULL, base, task, lora, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        f"{tmp_path}/out/model-adaptor-x.gguf: file too large",
        f"{tmp_path}/out/b.gguf: file too large",
    ]
    assert os.listdir(tmp_path / "out") == []


MEMORY = """
import sys
from pyggml_adapt.tools import bake, split
def peak():  # of this process alone: getrusage() counts what its parent had when it was made
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
peaks = []
for base, task in (sys.argv[1:3], sys.argv[3:5]):
    report = split({"x": task}, sys.argv[5], foundation=base, low_rank=4, force=True)
    bake(base, report.adaptors["x"], sys.argv[5] + "/baked.gguf", force=True)
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""

EXACT = {  # so that chance has no part in what is resident
    "MALLOC_MMAP_THRESHOLD_": "131072",  # what is freed goes back to the system, and leaves no holes in the heap
    "NUMPY_MADVISE_HUGEPAGE": "0",  # nor does the system fill holes up to pages of 2 MiB, whenever it gets to it
    "OPENBLAS_NUM_THREADS": "1",
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_is_that_of_a_few_tensors(tmp_path):
    def model(n_layer, seed):
        values = np.random.default_rng(seed).standard_normal((n_layer, 2048, 1024), "f").astype("e")
        tensors = {f"blk.{il}.ffn_up.weight": (Type.F16, (1024, 2048), values[il].tobytes()) for il in range(n_layer)}
        path = tmp_path / f"{n_layer}-{seed}.gguf"
        return write_gguf(path, {"general.architecture": "other"}, tensors, tokenizer=False)

    # with a single tensor there is none whose last piece is still held while the next one is read
    paths = [model(n_layer, seed) for n_layer in (2, 12) for seed in (1, 2)]
    command = [sys.executable, "-c", MEMORY, *paths, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=os.environ | EXACT)
    assert int(done.stdout) < 4 << 10  # KiB more with 12 tensors of 4 MiB than with two


@pytest.mark.parametrize(
    ("family", "most", "error"), [("260K-{}-f16", 0.21, 0.002), ("260K-{}-q8_0", 0.32, 0.03), ("4M-{}-q8_0", 0.1, 0.06)]
)
def test_a_real_task_that_was_a_lora(family, most, error, tmp_path):
    base, task = (MODELS / f"stories{family.format(name)}.gguf" for name in ("base", "shout"))
    if not task.exists():
        pytest.skip("no ../shared/models")
    report = split({"shout": task}, tmp_path, foundation=base, low_rank=8)
    assert {tensor.kind for tensor in report.low_rank} == {"low-rank"}
    assert len(report.low_rank) == 35
    assert max(tensor.error for tensor in report.low_rank) < error
    assert report.sizes[0].low_rank_nbytes < most * report.sizes[0].whole_nbytes
    verify(base, report.adaptors["shout"])
