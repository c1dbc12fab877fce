"""Constrained output of models with random weights: what comes out parses, and is what was asked for."""

import json
import re

import numpy as np
import pytest
from tiny_models import Tiny, n_vocab, tensors_of

import pyggml_adapt as pga
from pyggml_adapt.engine.sampling import Sampler, SamplerParams
from pyggml_adapt.errors import ParameterError, TokenError
from pyggml_adapt.ggml.gguf import GGUFWriter
from pyggml_adapt.text.bpe import CHAR_OF_BYTE

MERGES = ["Ã ©", "ä ¸", '{ "', '" :', '": Ġ', "t h", "th e", "1 2", '" }', ", Ġ", "f a", "t r", "u e", "tr ue", "Ġ the"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"


def write_byte_level(path):
    """Write a model with a byte-level vocabulary: its tokens may begin and end within characters."""
    tiny, writer = Tiny(), GGUFWriter()
    merged = [merge.replace(" ", "") for merge in MERGES]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    filler = [f"<f{i}>" for i in range(n_vocab() - 256 - len(merged) - len(special))]
    texts = [*CHAR_OF_BYTE.values(), *merged, *filler, *special]
    for key, value in tiny.all_metadata().items():
        writer.set(key, value, {str: "str", float: "f32"}.get(type(value), "u32"))
    for key, value, kind in (
        ("ggml.model", "gpt2", "str"), ("ggml.pre", "qwen2", "str"), ("ggml.tokens", texts, "str"),
        ("ggml.merges", MERGES, "str"), ("ggml.token_type", [1] * (len(texts) - 3) + [3] * 3, "i32"),
        ("ggml.eos_token_id", texts.index("<|im_end|>"), "u32"), ("chat_template", CHATML, "str"),
    ):  # fmt: skip
        writer.set(f"tokenizer.{key}", value, kind)
    tensors = tensors_of(tiny)
    for name, (type_, ne, _) in tensors.items():
        writer.add_tensor(name, type_, ne)
    writer.write(path, {name: data for name, (_, _, data) in tensors.items()})
    return path


@pytest.fixture(scope="module", params=["spm", "bpe"])
def host(request, tiny_gguf, tmp_path_factory):
    path = tiny_gguf() if request.param == "spm" else write_byte_level(tmp_path_factory.mktemp("bpe") / "m.gguf")
    with pga.Host(path, n_threads=1) as host:
        yield host


def is_int(value, low, high):
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_text(value, n):
    return isinstance(value, str) and len(value) <= n


def is_tree(value, keys=("v", "kids")):
    return set(value) <= set(keys) and is_int(value["v"], 0, 9) and all(map(is_tree, value.get("kids", [])))


def has(value, **checks):
    return isinstance(value, dict) and set(value) == set(checks) and all(check(value[k]) for k, check in checks.items())


def fixed(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXT = {"type": "string", "maxLength": 6}
TREE = {"type": "object", "required": ["v"], "additionalProperties": False,
        "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9},
                       "kids": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1}}}  # fmt: skip
SCHEMAS = {
    "boolean": ({"type": "boolean"}, lambda v: isinstance(v, bool)),
    "null": ({"type": "null"}, lambda v: v is None),
    "integer": ({"type": "integer", "minimum": -3, "maximum": 120}, lambda v: is_int(v, -3, 120)),
    "multiple": ({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 999}, lambda v: v % 7 == 0 <= v <= 999),
    "number": ({"type": "number", "minimum": 0.5, "maximum": 2}, lambda v: 0.5 <= v <= 2),
    "text": (TEXT, lambda v: is_text(v, 6)),
    "pattern": ({"type": "string", "pattern": "^[A-Zé世]{2}[0-9]+$", "maxLength": 9},
                lambda v: re.fullmatch("[A-Zé世]{2}[0-9]{1,7}", v)),
    "date": ({"type": "string", "format": "date"}, lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v)),
    "enum": ({"enum": ["é\n", "世界", 3, None, [1, {}]]}, lambda v: v in ["é\n", "世界", 3, None, [1, {}]]),
    "const": ({"const": {"a": ["\"\\", 1.5]}}, lambda v: v == {"a": ["\"\\", 1.5]}),
    "list": ({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
             lambda v: 2 <= len(v) <= 4 and all(isinstance(item, bool) for item in v)),
    "tuple": ({"type": "array", "prefixItems": [TEXT, {"type": "null"}], "items": False, "minItems": 2},
              lambda v: len(v) == 2 and is_text(v[0], 6) and v[1] is None),
    "object": (fixed(name=TEXT, é={"type": "integer", "minimum": 0, "maximum": 150}),
               lambda v: has(v, name=lambda x: is_text(x, 6), é=lambda x: is_int(x, 0, 150))),
    "nested": (fixed(a=fixed(b={"type": "array", "items": fixed(c={"type": "null"}), "maxItems": 2})),
               lambda v: has(v, a=lambda x: has(x, b=lambda y: len(y) <= 2 and all(z == {"c": None} for z in y)))),
    "choice": ({"anyOf": [TEXT, fixed(x={"type": "boolean"})]},
               lambda v: is_text(v, 6) or has(v, x=lambda x: isinstance(x, bool))),
    "both": ({"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 20}]}, lambda v: is_int(v, 10, 20)),
    "recursive": ({"$ref": "#/$defs/t", "$defs": {"t": TREE}}, is_tree),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEMAS)
def test_json_schema(host, case):
    schema, is_met = SCHEMAS[case]
    steps = [{"temperature": 1.0}, {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"mirostat": 2}]
    for seed, sampling in enumerate(steps):
        with host.session(n_ctx=900) as session:
            generation = session.generate("the", max_tokens=800, json_schema=schema, seed=seed, **sampling)
            text = "".join(generation)
        assert generation.finish_reason == "stop"
        assert is_met(json.loads(text)), text
        assert text == b"".join(map(host.tokenizer().token_to_piece, generation.tokens)).decode()


def test_any_json(host):
    n_whole = 0
    for seed in range(12):
        with host.session(n_ctx=400) as session:
            schema = (True, {}, "{}", "true")[seed % 4]
            generation = session.generate(
                "the", max_tokens=300, json_schema=schema, seed=seed, temperature=2.0, min_p=0
            )
            text = "".join(generation)
        if generation.finish_reason == "stop":
            json.loads(text)
            n_whole += 1
    assert n_whole > 3


@pytest.mark.parametrize("regex", ["[a-f]{3}", "(yes|no|é世)!?", r"\d{3}-[A-Z]*x", "👍{2,4}", "", r"(a|b)*c\n\."])
def test_regex(host, regex):
    for seed in range(4):
        text = host.generate("the", max_tokens=400, regex=regex, seed=seed, temperature=1.5)
        assert re.fullmatch(regex, text)


GBNF = r"""
root ::= "[" (expr ("," " "? expr)*)? "]"   # a list of sums
expr ::= num | "(" expr "+" expr ")"
num ::= [1-9] [0-9]{0,2}
"""
LARK = 'start: "[" [expr ("," " "? expr)*] "]"\nexpr: NUM | "(" expr "+" expr ")"\nNUM: /[1-9][0-9]{0,2}/'


@pytest.mark.parametrize("grammar", [GBNF, LARK], ids=["gbnf", "lark"])
def test_grammar(host, grammar):
    n_whole = 0
    for seed in range(10):
        with host.session(n_ctx=300) as session:
            generation = session.generate("the", max_tokens=250, grammar=grammar, seed=seed, temperature=1.0)
            text = "".join(generation)
        if generation.finish_reason == "stop":
            n_whole += 1
            assert isinstance(eval(re.sub(r"\d+", "1", text), {"__builtins__": {}}), list)
            assert re.fullmatch(r"[][()+, 0-9]*", text) and not re.search(r"\b0|\d{4}|, {2}", text)
    assert n_whole > 3


def test_greedy_takes_the_most_probable_that_may_follow(host):
    with host.session(n_ctx=64) as session:
        generation = session.generate("the", regex="[b-y]{2}", temperature=0.0)
        "".join(generation)
        first = generation.tokens[0]
    with host.session(n_ctx=64) as session:
        logits = session.eval(host.tokenize("the"))
    pieces = [host.tokenizer().token_to_piece(token) for token in range(len(logits))]
    able = [token for token, piece in enumerate(pieces) if re.fullmatch(rb"[b-y]{1,2}", piece)]
    assert first == max(able, key=lambda token: logits[token])


def test_the_end_is_drawn_where_nothing_else_can_follow(host):
    with host.session(n_ctx=64) as session:
        generation = session.generate("the", regex="ab", temperature=0.0)
        assert ("".join(generation), generation.finish_reason) == ("ab", "stop")
    ends = {token: float("-inf") for token in host.tokenizer().eog_ids}
    with host.session(n_ctx=64) as session, pytest.raises(TokenError, match="no token can be drawn"):
        "".join(session.generate("the", regex="ab", logit_bias=ends))


def test_cut_short(host):
    with host.session(n_ctx=64) as session:
        generation = session.generate("the", max_tokens=5, regex="[a-z]{90}")
        assert re.fullmatch("[a-z]{5,}", "".join(generation)) and generation.finish_reason == "length"
    text = host.generate("the", regex="[a-y]{4}z[a-y]{4}", stop=["z"], temperature=1.0, seed=1)
    assert re.fullmatch("[a-y]{4}", text)


def test_each_generation_begins_anew(host):
    with host.session(n_ctx=128) as session:
        for _ in range(3):
            assert re.fullmatch("x{2}y", "".join(session.generate("the", regex="x{2}y")))
        assert re.fullmatch("[0-9]", "".join(session.generate("the", regex="[0-9]")))


def test_nothing_is_evaluated_for_what_cannot_be_met(host):
    with host.session(n_ctx=64) as session:
        for values, message in (
            ({"json_schema": {"enum": []}}, "json_schema: Unsatisfiable schema: anyOf is empty"),
            (
                {"json_schema": {"$ref": "#"}},
                "json_schema: nothing meets it, since its required parts contain it again",
            ),
            ({"regex": "(("}, "regex: unclosed group"),
            ({"grammar": "root ::= nope"}, "grammar: Rule 'nope' not found"),
        ):
            with pytest.raises(ParameterError, match=f"^{re.escape(message)}"):
                session.generate("the", **values)
        assert session.tokens == []


def test_chat(tmp_path):
    with pga.Host(write_byte_level(tmp_path / "m.gguf"), n_threads=1) as host:
        messages = [{"role": "user", "content": "hi"}]
        schema = fixed(ok={"type": "boolean"})
        options = {"json_schema": schema, "temperature": 2.0, "seed": 1, "max_tokens": 100}
        whole = host.chat(messages, **options)
        assert isinstance(json.loads(whole)["ok"], bool)
        assert "".join(host.stream_chat(messages, **options)) == whole
        with host.session(n_ctx=300) as session:
            assert "".join(session.chat(messages, **options)) == whole
        with pytest.raises(ParameterError, match=r"^json_schema: Invalid type: nope"):
            host.chat(messages, json_schema={"type": "nope"})


def test_tokens_alone(tiny_gguf):
    with pga.Host(tiny_gguf(tokenizer=False), n_threads=1) as host, host.session(n_ctx=16) as session:
        with pytest.raises(pga.Error):
            session.generate_ids([1], max_tokens=1, params=SamplerParams(regex="a"))


def test_parameters():
    assert SamplerParams().constraint is None
    assert SamplerParams(json_schema=True).constraint == ("json_schema", "{}")
    assert SamplerParams(json_schema=' {"type" : "null"}').constraint == ("json_schema", '{"type": "null"}')
    assert SamplerParams(regex="").constraint == ("regex", "")
    assert hash(SamplerParams(json_schema={"enum": [[1]]})) == hash(SamplerParams(json_schema='{"enum": [[1]]}'))
    endless = []
    endless.append(endless)
    nested = {}
    for _ in range(100_000):
        nested = {"items": nested}
    for values, message in (
        ({"regex": "a", "grammar": "b"}, "regex and grammar are given: the output can meet one of them only"),
        ({"json_schema": 3}, "json_schema: int is neither a dictionary, text, nor True"),
        ({"json_schema": "3"}, "json_schema: the text is JSON, but neither an object nor true or false"),
        ({"json_schema": "{"}, "json_schema: it is not JSON: Expecting property name enclosed in double quotes"),
        ({"json_schema": {"enum": {1}}}, "json_schema: it is not JSON: Object of type set is not JSON serializable"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema: it is not JSON: Out of range float values"),
        ({"json_schema": {"enum": endless}}, "json_schema: it is not JSON: Circular reference detected"),
        ({"json_schema": nested}, "json_schema: it is not JSON: maximum recursion depth exceeded"),
        ({"json_schema": {"const": "x" * 140_000}}, "json_schema: it has 140013 bytes, more than 131072"),
        ({"regex": 3}, "regex: int is not text"),
        ({"regex": "a" * 9000}, "regex: it has 9000 bytes, more than 8192"),
        ({"regex": "\ud800"}, "regex: it has a lone surrogate"),
        ({"grammar": b"root"}, "grammar: bytes is not text"),
    ):
        with pytest.raises(ParameterError, match=f"^{re.escape(message)}"):
            SamplerParams(**values)


def test_the_mask_comes_before_all_steps():
    """The candidates are the chain's, of the tokens that may follow: the others take no place among the top k."""

    class Even:
        accepted = []

        def mask(self, logits):
            return np.where(np.arange(len(logits)) % 2 == 0, logits, np.float32(-np.inf))

        def accept(self, token):
            self.accepted.append(token)

    logits = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))
    params = SamplerParams(top_k=2, top_p=1.0, min_p=0.0, temperature=1.0, seed=1, logit_bias={0: float(np.log(2))})
    sampler = Sampler(params, constraint=Even())
    ids, probs = sampler.candidates(logits, ())
    assert ids.tolist() == [0, 2] and probs.tolist() == pytest.approx([0.5, 0.5])
    drawn = [sampler.sample(logits, ()) for _ in range(20)]
    assert drawn == Even.accepted and set(drawn) == {0, 2}
    for values in ({"temperature": 0.0}, {"mirostat": 2}, {"top_k": 0}, {"xtc_probability": 1.0}):
        assert Sampler(SamplerParams(seed=2, **values), constraint=Even()).sample(logits, ()) in (0, 2, 4)


def test_a_chat_that_cannot_meet_its_schema_is_refused_before_the_first_piece(host):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ParameterError, match=r"^json_schema: Unsatisfiable schema: minimum"):
        host.stream_chat(
            [{"role": "user", "content": "hi"}],
            template=template,
            json_schema={"type": "integer", "minimum": 2, "maximum": 1},
        )
