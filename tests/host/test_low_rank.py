"""Low-rank adaptors at run time, against llama.cpp with the same files, and against merged weights."""

import numpy as np
import pytest
from loras import LINEARS, factors, write_lora
from parity import differences
from real_models import SHARED_MODELS
from reference import Reference
from tiny_models import Tiny, random_ids, tensors_of, write_gguf, write_tiny

import pyggml_adapt as pga
from pyggml_adapt.engine import runner
from pyggml_adapt.errors import AdaptorError, ModelError
from pyggml_adapt.ggml import Type, quantize

SMALL = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 1}
MIXTURE = {**SMALL, "n_expert": 4, "n_expert_used": 2}
EXPERTS = r"ffn_(up|gate|down)_exps|ffn_gate_inp"
CASES = {
    "linears": (SMALL, LINEARS, {}),
    "f16-factors": (SMALL, LINEARS, {"type": Type.F16}),
    "bf16-factors": (SMALL, LINEARS, {"type": Type.BF16}),
    "q8_0-base": ({**SMALL, "type": "Q8_0"}, LINEARS, {}),
    "q4_k-base": ({**SMALL, "type": "Q4_K", "n_embd": 256, "n_ff": 256}, LINEARS, {"rank": 16}),
    "no-alpha-of-its-own": (SMALL, LINEARS, {"alpha": 0.0}),
    "one-layer": (SMALL, r"blk\.1\.attn_[qv]", {}),
    "head": (SMALL, r"^output\.weight", {}),
    "embedding": (SMALL, "token_embd", {}),
    "biases": ({**SMALL, "optional": r"^output\.weight|\.bias"}, LINEARS, {}),
    "experts": (MIXTURE, f"{EXPERTS}|attn_q", {}),
    "rank-1": (SMALL, LINEARS, {"rank": 1}),
}


@pytest.fixture(scope="module")
def ids():
    return random_ids(160)


def ours(host, task, ids, other):
    with host.session(task, n_ctx=512) as session:
        return differences(other, session, ids)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_llama_cpp(tiny_gguf, tmp_path, ids, case, flash_attn):
    variant, targets, options = CASES[case]
    base, lora = tiny_gguf(**variant), write_lora(tmp_path / "lora.gguf", Tiny(**variant), targets, **options)
    same = {"n_ubatch": 48, "n_threads": 1, "flash_attn": flash_attn}
    with Reference(base, **same) as reference, pga.Host(base, {"lora": lora}, **same) as host:
        assert ours(host, "base", ids, reference) == []
        reference.rewind(0)
        reference.set_loras({lora: 1.0})
        assert ours(host, "lora", ids, reference) == []
        with host.session("lora", n_ctx=64) as session, host.session("base", n_ctx=64) as plain:
            assert not np.array_equal(session.eval(ids[:8]), plain.eval(ids[:8]))


@pytest.mark.parametrize("factor", [0.5, -1.25, 0.0, 0.1])
def test_a_factor_is_llama_cpps(tiny_gguf, tmp_path, ids, factor):
    base, lora = tiny_gguf(**SMALL), write_lora(tmp_path / "lora.gguf", Tiny(**SMALL), alpha=3.0, rank=7)
    with Reference(base, n_ubatch=48, n_threads=1) as reference, pga.Host(base, n_threads=1, n_ubatch=48) as host:
        host.load_adaptor("lora", lora)
        host.define_task("some", [f"lora:{factor}"])
        reference.set_loras({lora: factor})
        assert ours(host, "some", ids, reference) == []


def test_a_blend_is_llama_cpps(tiny_gguf, tmp_path, ids):
    """llama.cpp adds the files in the order of a hash map, so it must equal one of the two orders."""
    base, tiny = tiny_gguf(**SMALL), Tiny(**SMALL)
    one = write_lora(tmp_path / "one.gguf", tiny, seed=1)
    two = write_lora(tmp_path / "two.gguf", tiny, r"attn_q|ffn_down", seed=2, rank=2)
    with Reference(base, n_ubatch=48, n_threads=1) as reference, pga.Host(base, n_threads=1, n_ubatch=48) as host:
        host.load_adaptor("one", one)
        host.load_adaptor("two", two)
        host.define_task("ab", ["one:0.7", "two:0.3"])
        host.define_task("ba", ["two:0.3", "one:0.7"])
        reference.set_loras({one: 0.7, two: 0.3})
        found = [ours(host, "ab", ids, reference)]
        reference.rewind(0)
        found.append(ours(host, "ba", ids, reference))
        assert [] in found
        assert host.low_rank_on("blk.0.attn_q.weight", "ba") == (
            (str(two), 2, pytest.approx(0.3 * 8 / 2)),
            (str(one), 4, pytest.approx(0.7 * 8 / 4)),
        )
        assert host.low_rank_on("blk.0.attn_k.weight", "base") == ()


def merged(tiny, path, targets, **options):
    """Write the model with the pairs added to its F32 weights."""
    tensors = tensors_of(tiny)
    rank, alpha = options.get("rank", 4), options.get("alpha", 8.0)
    for spec in tiny.tensors():
        if any(name in spec.name for name in targets):
            a, b = factors(spec, rank, options.get("seed", 0))
            delta = a @ b.T if spec.name == "token_embd.weight" else b @ a
            weights = tiny.data(spec) + np.float32(alpha / rank) * delta
            tensors[spec.name] = (Type.F32, spec.ne, quantize(weights, Type.F32))
    return write_gguf(path, tiny.all_metadata(), tensors)


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        (SMALL, ["attn_q", "ffn_down"]),
        (SMALL, ["token_embd"]),
        (SMALL, ["output.weight"]),
        (MIXTURE, ["ffn_up_exps", "ffn_down_exps", "ffn_gate_inp"]),
    ],
)
def test_as_the_merged_weights(tmp_path, ids, variant, targets):
    """W x + s B (A x) is (W + s B A) x but for F32 rounding: a relative error of 1e-6 of the logits, squared."""
    tiny = Tiny(**variant)
    base, whole = write_tiny(tmp_path / "base.gguf", tiny), merged(tiny, tmp_path / "merged.gguf", targets)
    lora = write_lora(tmp_path / "lora.gguf", tiny, "|".join(targets))
    options = {"n_threads": 1, "type_k": "F32", "type_v": "F32", "flash_attn": False}
    with pga.Host(base, {"lora": lora}, **options) as host, pga.Host(whole, **options) as other:
        with host.session("lora", n_ctx=256) as session, other.session(n_ctx=256) as wanted:
            got, want = session.eval(ids, all_logits=True), wanted.eval(ids, all_logits=True)
    assert ((got - want) ** 2).sum() / (want**2).sum() < 1e-10


def test_a_tied_head_is_not_the_embeddings(tmp_path, ids):
    """As in PEFT, a pair on the embedding does not act on the head, even if these are the same tensor."""
    tied = Tiny(**SMALL, optional="^$")
    base = write_tiny(tmp_path / "base.gguf", tied)
    lora = write_lora(tmp_path / "lora.gguf", tied, "token_embd")
    spec = next(spec for spec in tied.tensors() if spec.name == "token_embd.weight")
    a, b = factors(spec, 4, 0)
    tensors = tensors_of(tied)
    tensors["output.weight"] = tensors["token_embd.weight"]
    tensors["token_embd.weight"] = (Type.F32, spec.ne, quantize(tied.data(spec) + 2 * (a @ b.T), Type.F32))
    untied = write_gguf(tmp_path / "untied.gguf", tied.all_metadata(), tensors)
    with pga.Host(base, {"lora": lora}, n_threads=1) as host, pga.Host(untied, n_threads=1) as other:
        with host.session("lora", n_ctx=256) as session, other.session(n_ctx=256) as wanted:
            got, want = session.eval(ids, all_logits=True), wanted.eval(ids, all_logits=True)
    assert ((got - want) ** 2).sum() / (want**2).sum() < 1e-6  # K and V are F16: their rounding differs


def test_norms_and_biases_in_the_file_are_applied(tmp_path, ids):
    """llama.cpp skips norms in these files, and refuses biases; here they replace the model's."""
    tiny = Tiny(**SMALL, optional=r"^output\.weight|\.bias")
    base = write_tiny(tmp_path / "base.gguf", tiny)
    rng = np.random.default_rng(5)
    whole = {
        "blk.1.attn_norm.weight": rng.standard_normal(64, dtype=np.float32),
        "output_norm.weight": rng.standard_normal(64, dtype=np.float32),
        "blk.0.attn_q.bias": rng.standard_normal(64, dtype=np.float32),
    }
    lora = write_lora(tmp_path / "lora.gguf", tiny, whole=whole)
    tensors = tensors_of(tiny) | {name: (Type.F32, (64,), quantize(array, Type.F32)) for name, array in whole.items()}
    changed = write_gguf(tmp_path / "changed.gguf", tiny.all_metadata(), tensors)
    plain = write_lora(tmp_path / "plain.gguf", tiny)
    with pga.Host(base, {"lora": lora}, n_threads=1) as host, pga.Host(changed, {"lora": plain}, n_threads=1) as other:
        assert host.where("blk.1.attn_norm.weight", "lora") == ("adaptor", "F32", 256, str(lora))
        with other.session("lora", n_ctx=512) as wanted:
            assert ours(host, "lora", ids, wanted) == []


@pytest.mark.parametrize("layout", ["complement", "overlay"])
def test_a_stack_of_whole_tensors_and_low_rank(tiny_gguf, split_models, tmp_path, ids, layout):
    models = {"base": tiny_gguf(**SMALL), "code": tiny_gguf(**SMALL, changed={"attn|norm": 1})}
    foundation, adaptors = split_models(models, layout)
    lora = write_lora(tmp_path / "lora.gguf", Tiny(**SMALL))
    with pga.Host(foundation, adaptors, n_threads=1) as host, pga.Host(models["code"], {"s": lora}, n_threads=1) as one:
        host.load_adaptor("style", lora)
        assert ("style" in host.tasks) is (layout == "overlay")
        host.define_task("both", ["code", "style:0.5"])
        one.define_task("both", ["s:0.5"])
        with one.session("both", n_ctx=512) as wanted:
            assert ours(host, "both", ids, wanted) == []
        if layout == "complement":
            with pytest.raises(AdaptorError, match=r"^adaptor 'style' is low-rank and .* define_task") as error:
                host.session("style")
            assert error.value.code == "adaptor_not_found"


def test_swaps_build_no_graphs(tiny_gguf, tmp_path, monkeypatch):
    """Tasks with pairs of the same shapes share graphs, whatever their scales; a base task has its own."""
    built = []

    class Counted(runner.Program):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            built.append(self.graph.n_nodes)

    monkeypatch.setattr(runner, "Program", Counted)
    tiny = Tiny(**SMALL)
    loras = {f"l{i}": write_lora(tmp_path / f"{i}.gguf", tiny, seed=i, alpha=1.0 + i) for i in range(3)}
    with pga.Host(tiny_gguf(**SMALL), loras, n_threads=1) as host:
        host.define_task("part", ["l1:0.5"])
        alone = {}
        for task in host.tasks:
            with host.session(task, n_ctx=256) as session:
                alone[task] = session.eval([5])
        plain, with_pairs = built
        assert plain < with_pairs
        sessions = {task: host.session(task, n_ctx=256) for task in host.tasks}
        for _ in range(20):
            for task, session in sessions.items():
                session.rewind(0)
                np.testing.assert_array_equal(session.eval([5]), alone[task])
        assert len(built) == 2
    assert len({logits.tobytes() for logits in alone.values()}) == len(alone)


BAD = {
    "another architecture": (
        {"metadata": {"general.architecture": "gemma3"}}, "adaptor_base_mismatch",
        "lora.gguf: the adaptor does not belong to .*: it is for architecture 'gemma3', and that is 'llama'$"),
    "unknown target": (
        {"change": {"blk.7.attn_q.weight.lora_a": np.ones((4, 64)), "blk.7.attn_q.weight.lora_b": np.ones((64, 4))}},
        "adaptor_base_mismatch", "it has a low-rank pair on 'blk.7.attn_q.weight', which is not there$"),
    "a target of another shape": (
        {"change": {"blk.0.attn_q.weight.lora_a": np.ones((4, 32), np.float32)}}, "adaptor_base_mismatch",
        r"its pair on 'blk.0.attn_q.weight', \[32, 4, 1\] and \[4, 64, 1\], does not fit \[64, 64, 1\]$"),
    "a vector": (
        {"change": {"output_norm.weight.lora_a": np.ones((4, 64)), "output_norm.weight.lora_b": np.ones((1, 4))}},
        "adaptor_base_mismatch", r"its pair on 'output_norm.weight', .* does not fit \[64, 1, 1\]$"),
    "another rank": (
        {"change": {"blk.0.attn_q.weight.lora_a": np.ones((5, 64), np.float32)}}, "adaptor_invalid",
        r"the pair on 'blk.0.attn_q.weight' has shapes \[64, 5\] and \[4, 64\], which do not fit each other"),
    "half of a pair": (
        {"change": {"blk.0.attn_q.weight.lora_b": None}}, "adaptor_invalid",
        "the pair on 'blk.0.attn_q.weight' has no lora_b$"),
    "no alpha": (
        {"alpha": None}, "adaptor_invalid", "the key 'adapter.lora.alpha' must be a finite F32, but it is absent$"),
    "alpha not a number": (
        {"alpha": float("nan")}, "adaptor_invalid", "'adapter.lora.alpha' must be a finite F32, but it is nan$"),
    "NaN": (
        {"change": {"blk.0.attn_q.weight.lora_a": np.full((4, 64), np.nan, np.float32)}}, "adaptor_invalid",
        "'blk.0.attn_q.weight.lora_a' has elements that are NaN or infinite$"),
    "infinite F16": (
        {"type": Type.F16, "change": {"blk.0.attn_q.weight.lora_a": np.full((4, 64), np.inf, np.float32)}},
        "adaptor_invalid", "'blk.0.attn_q.weight.lora_a' has elements that are NaN or infinite$"),
    "NaN in a norm": (
        {"whole": {"output_norm.weight": np.full(64, np.nan, np.float32)}}, "adaptor_invalid",
        "'output_norm.weight' has elements that are NaN or infinite$"),
    "quantised": (
        {"targets": "attn_q", "type": Type.Q8_0, "rank": 32}, "adaptor_invalid",
        "'blk.0.attn_q.weight.lora_a' has type Q8_0: low-rank factors are F32, F16 or BF16$"),
    "both": (
        {"whole": {"blk.0.attn_q.weight": np.ones((64, 64), np.float32)}}, "adaptor_invalid",
        "'blk.0.attn_q.weight' has a low-rank pair and is there as a whole tensor too$"),
    "empty": ({"targets": "^$"}, "adaptor_invalid", "it holds no tensor$"),
    "another base": (
        {"metadata": {"general.base_model.0.repo_url": "https://huggingface.co/someone/other-1b"}},
        "adaptor_base_mismatch", "it was made for other-1b, and that comes from tiny-base$"),
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    path = tmp_path_factory.mktemp("host") / "base.gguf"
    write_gguf(
        path,
        {**Tiny(**SMALL).all_metadata(), "general.source.repo_url": "https://huggingface.co/us/Tiny-Base"},
        tensors_of(Tiny(**SMALL)),
    )
    with pga.Host(path, n_threads=1) as host:
        yield host


@pytest.mark.parametrize("case", BAD)
def test_bad_files(host, tmp_path, case):
    options, code, message = BAD[case]
    lora = write_lora(tmp_path / "lora.gguf", Tiny(**SMALL), **options)
    with pytest.raises(AdaptorError, match=message) as error:
        host.load_adaptor("bad", lora)
    assert error.value.code == code
    assert "\n" not in str(error.value) and str(lora) in str(error.value)
    assert host.tasks == ("base",) and host.adaptors == ()
    with host.session("base", n_ctx=8) as session:
        assert np.isfinite(session.eval([1])).all()


def test_an_unknown_whole_tensor(host, tmp_path):
    lora = write_lora(tmp_path / "lora.gguf", Tiny(**SMALL), whole={"blk.0.x.weight": np.ones(4, np.float32)})
    with pytest.raises(ModelError, match=r"lora\.gguf: tensor blk\.0\.x\.weight is not one that architecture llama"):
        host.load_adaptor("bad", lora)
    assert host.adaptors == ()


def test_a_scale_beyond_f32(host, tmp_path):
    """It would make every logit NaN."""
    host.load_adaptor("huge", write_lora(tmp_path / "lora.gguf", Tiny(**SMALL), "blk.0.attn_q", rank=1, alpha=3e38))
    try:
        with pytest.raises(AdaptorError) as error:
            host.define_task("t", ["huge:2"])
        assert str(error.value) == (
            "task 't': adaptor 'huge' scales its pair on 'blk.0.attn_q.weight' by 2 x 3e+38 / 1, beyond F32"
        )
        assert error.value.code == "adaptor_invalid"
        host.define_task("t", ["huge:0.1"])
        host.unload_adaptor("t")
    finally:
        host.unload_adaptor("huge")


def test_the_right_base_by_name(host, tmp_path):
    names = {"general.base_model.0.repo_url": "https://huggingface.co/us/tiny-base/"}
    host.load_adaptor("good", write_lora(tmp_path / "lora.gguf", Tiny(**SMALL), metadata=names))
    host.unload_adaptor("good")


def test_what_cannot_be_a_task(host, tmp_path):
    norm = {"output_norm.weight": np.ones(64, np.float32)}
    for name, seed in (("a", 1), ("b", 2)):
        host.load_adaptor(name, write_lora(tmp_path / f"{name}.gguf", Tiny(**SMALL), seed=seed, whole=norm))
    try:
        for parts, message in (
            (["a", "b"], "task 't': adaptors 'a' and 'b' both replace tensor 'output_norm.weight'"),
            (["a:0.5"], "task 't': adaptor 'a' replaces tensor 'output_norm.weight' as a whole: no factor but 1"),
        ):
            with pytest.raises(AdaptorError) as error:
                host.define_task("t", parts)
            assert (str(error.value), error.value.code) == (message, "adaptor_invalid")
        with pytest.raises(AdaptorError, match=r"^unknown adaptor 'c'; loaded adaptors: a, b$") as error:
            host.define_task("t", ["a", "c"])
        assert error.value.code == "adaptor_not_found"
        for parts in ("a", [], [1], 1, (part for part in ["a"]), {"a": 0.5}):  # of the last, the factor would be lost
            with pytest.raises(pga.errors.ParameterError, match=r"^task 't': adaptors must be a list of names"):
                host.define_task("t", parts)
        assert host.tasks == ("base", "a", "b")
    finally:
        host.unload_adaptor("a")
        host.unload_adaptor("b")


@pytest.mark.parametrize("family", ["stories260K", "stories4M"])
def test_real_adaptors(family, ids):
    base = next(iter(sorted(SHARED_MODELS.glob(f"{family}-base-*.gguf"))), None)
    if base is None:
        pytest.skip("no such models here")
    lora = SHARED_MODELS / f"{family}-shout-lora-f32.gguf"
    tokens = [1, *(3 + (i * 41) % 200 for i in range(119))]
    with Reference(base, n_threads=1) as reference, pga.Host(base, {"shout": lora}, n_threads=1) as host:
        reference.set_loras({lora: 1.0})
        assert ours(host, "shout", tokens, reference) == []
        assert "THERE WAS A L" in host.generate("Once upon a time", task="shout", max_tokens=24, temperature=0.0)
