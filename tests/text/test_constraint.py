"""Constraints on small vocabularies: which tokens may follow, against what is listed by hand, and what is refused."""

import gc
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest

from pyggml_adapt.engine.sampling import SamplerParams
from pyggml_adapt.errors import ParameterError, TokenError
from pyggml_adapt.text import Tokenizer
from pyggml_adapt.text.bpe import CHAR_OF_BYTE
from pyggml_adapt.text.constraint import Constraint

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["a", "b", "ab", "abc", "aé", "é", "世", "世a", "▁", "▁a", '{"', '":', "é世x", "12", "true", "<s", '"a', "\n"]
MERGES = ["a b", "ab c", "Ã ©", "a Ã", "© a", '{ "', "1 2", "ä ¸", "ä¸ ĸ", "Ã© ä", "t r", "u e", "tr ue", "Ġ a"]


def spm():
    """Return a SentencePiece tokenizer in which letters are tokens twice, as such and as bytes."""
    texts = ["<unk>", "<s>", "</s>", "<|im_end|>", *BYTES, *PIECES]
    types = [2, 3, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.scores": np.zeros(len(texts), np.float32),
            "tokenizer.ggml.token_type": np.array(types, np.int32),
        }
    )


def bpe(ends=("<|endoftext|>", "<|im_end|>")):
    """Return a byte-level tokenizer whose tokens are also parts of characters."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    texts = [*CHAR_OF_BYTE.values(), *merged, "<tool>", "<|x|>", *ends]
    types = [1] * (len(texts) - len(ends) - 2) + [4, 3] + [3] * len(ends)
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": texts, "merges": MERGES, "token_type": np.array(types)}
    metadata |= {"eos_token_id": len(texts) - len(ends) - (0 if ends else 1)}
    return Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


@pytest.fixture(scope="module", params=[spm, bpe])
def tok(request):
    return request.param()


def pieces(tok):
    """Return the bytes of all tokens, none for those that are no text."""
    return [tok.token_to_piece(token) for token in range(tok.n_vocab)]


def language(alphabet, n):
    """Return all texts of at most n items of an alphabet."""
    texts, last = {""}, {""}
    for _ in range(n):
        last = {text + item for text in last for item in alphabet}
        texts |= last
    return texts


JSON = [1, 12, "aé", "世\n", True, None, -0.5]
FINITE = {
    "words": ("regex", "(ab|abc|é世?|aé){1,2}x?",
              {a + b + c for a in ("ab", "abc", "é", "é世", "aé") for b in ("", "ab", "abc", "é", "é世", "aé")
               for c in ("", "x")}),
    "repeated": ("regex", "(ab)*c", {"ab" * n + "c" for n in range(20)}),
    "empty": ("regex", "", {""}),
    "optional": ("regex", "(é|a|ab){0,3}", language(["é", "a", "ab"], 3)),
    "not greedy": ("regex", "a*?ab", {"a" * n + "ab" for n in range(20)}),
    "anchored": ("regex", "^ab$", {"ab"}),
    "slashes": ("regex", r"/a\/\\\n?" + "\n", {"/a/\\\n", "/a/\\\n\n"}),
    "enum": ("json_schema", json.dumps({"enum": JSON}), {json.dumps(item, ensure_ascii=False) for item in JSON}),
    "gbnf": ("grammar", 'root ::= word ("世" word)? # two\nword ::= [ab] | "é" "a"?',
             {a + b for a in ("a", "b", "é", "éa") for b in ("", *("世" + w for w in ("a", "b", "é", "éa")))}),
    "gbnf repetition": ("grammar", 'root ::= [^\\x00-`c-\\U0010FFFF]{2,3} "\\n"',
                        {text + "\n" for text in language("ab", 3) if len(text) > 1}),
    "gbnf escapes": ("grammar",
                     r'root ::= "\x41\u00e9\xe9" [\u4e16\-] [&~~] "\\u" | [^\x00-\u00e8\u00ea-\U0010FFFF]+ # é',
                     {"Aéé" + a + b + "\\u" for a in "世-" for b in "&~"} | {"é" * n for n in range(1, 20)}),
    "lark": ("grammar", 'start: A | "<tool>" A?\nA: /[ab]{1,2}/',
             {text for text in language("ab", 2) if text} | {"<tool>" + text for text in language("ab", 2)}),
    "recursive": ("grammar", 'root ::= "a" root "b" | "é"', {"a" * n + "é" + "b" * n for n in range(20)}),
}  # fmt: skip


@pytest.mark.parametrize("case", FINITE)
def test_exactly_the_tokens_that_can_go_on_are_allowed(tok, case):
    """For every token: whether a text of the language begins with what is there and the token's bytes."""
    name, text, texts = FINITE[case]
    words = sorted(item.encode() for item in texts)
    all_pieces, rng = pieces(tok), np.random.default_rng(0)
    for _ in range(6):
        constraint, prefix = Constraint(tok, name, text), b""
        for _ in range(12):
            starts = {word[len(prefix) : n] for word in words if word.startswith(prefix) for n in range(len(word) + 1)}
            want = {token for token, piece in enumerate(all_pieces) if piece and piece in starts}
            if prefix in words:
                want |= tok.eog_ids
            allowed = constraint.allowed()
            assert set(np.flatnonzero(allowed).tolist()) == want
            assert constraint.is_complete == (prefix in words)
            token = int(rng.choice(sorted(want)))
            constraint.accept(token)
            if token in tok.eog_ids:
                break
            prefix += all_pieces[token]


def test_the_end(tok):
    assert len(tok.eog_ids) == 2
    constraint = Constraint(tok, "regex", "a+b")
    for piece in (b"a", b"a", b"b"):
        assert not constraint.allowed()[list(tok.eog_ids)].any()
        constraint.accept(pieces(tok).index(piece))
    assert set(np.flatnonzero(constraint.allowed())) == tok.eog_ids
    with pytest.raises(TokenError, match=r"^regex: token 70 may not follow: "):
        constraint.accept(70)


def test_mask():
    tok = bpe()
    constraint = Constraint(tok, "regex", "ab?")
    for n_logits in (tok.n_vocab - 3, tok.n_vocab, tok.n_vocab + 7):
        logits = np.arange(n_logits, dtype=np.float32)
        masked = constraint.mask(logits)
        kept = np.flatnonzero(masked > -np.inf)
        assert sorted(pieces(tok)[token] for token in kept) == [b"a", b"ab"]
        assert (masked[kept] == logits[kept]).all() and masked.dtype == np.float32 and len(masked) == n_logits
        assert (logits == np.arange(n_logits)).all()


def test_a_dot_of_gbnf_is_any_character():
    for char in ("b", "\n", "é", "世", "👍", "\x00"):
        constraint = Constraint(spm(), "grammar", 'root ::= "a" . "b" # .')
        for token in [4 + byte for byte in f"a{char}b".encode()]:
            assert constraint.allowed()[token]
            constraint.accept(token)
        assert constraint.is_complete


def test_control_tokens_only_where_a_grammar_names_them():
    tok = bpe()
    names = [tok.token_to_piece(token, special=True) for token in range(tok.n_vocab)]
    control = [names.index(b"<|x|>"), *sorted(tok.eog_ids)]
    constraint = Constraint(tok, "regex", r"(.|\n)*")
    assert set(np.flatnonzero(constraint.allowed())) >= tok.eog_ids and not constraint.allowed()[control[0]]
    constraint = Constraint(tok, "grammar", 'start: "a" <|x|> "b"')
    constraint.accept(names.index(b"a"))
    assert np.flatnonzero(constraint.allowed()).tolist() == [control[0]]
    constraint = Constraint(tok, "grammar", 'start: "a" <|im_end|> "b"')  # an end within cannot be
    constraint.accept(names.index(b"a"))
    with pytest.raises(TokenError, match=r"^grammar: no token may follow, and the text is not complete"):
        constraint.allowed()


UNMEETABLE = {
    "false": False,
    "no enum": {"enum": []},
    "bounds": {"type": "integer", "minimum": 5, "maximum": 3},
    "between": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4},
    "lengths": {"type": "string", "minLength": 5, "maxLength": 2},
    "types": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "no ref": {"$ref": "#/$defs/nope"},
    "remote": {"$ref": "https://example.com/schema"},
    "itself": {"$ref": "#"},
    "required": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "endless list": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "endless tuple": {"type": "array", "prefixItems": [True, {"$ref": "#"}], "minItems": 2},
    "endless object": {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}]}}, "required": ["a"]},
    "endless, of two": {"$ref": "#/$defs/a", "$defs": {
        "a": {"type": ["object"], "required": ["b"], "additionalProperties": {"$ref": "#/$defs/b~1"}},
        "b/": {"type": ["object", "array"], "items": {"$ref": "#/$defs/a"}, "minItems": 3,
               "required": ["c"], "properties": {"c": {"allOf": [{}, {"$ref": "#"}]}}},
    }},
    "pattern": {"type": "string", "pattern": "(a"},
    "lookahead": {"type": "string", "pattern": "a(?=b)"},
    "type": {"type": "strin"},
    "not": {"not": {"type": "string"}},
    "unique": {"type": "array", "uniqueItems": True},
    "format": {"type": "string", "format": "nope"},
    "options": {"x-guidance": {"lenient": True}},
    "disjoint": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "surrogate": {"const": "\ud800"},
}  # fmt: skip


@pytest.mark.parametrize("case", UNMEETABLE)
def test_schemas_that_cannot_be_met(case):
    with pytest.raises(ParameterError, match=r"^json_schema: ") as error:
        Constraint(bpe(), *SamplerParams(json_schema=UNMEETABLE[case]).constraint)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


ENDING = {
    "list": ({"type": "array", "items": {"$ref": "#"}}, "[[],[[]]]"),
    "tree": ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "required": ["k"], "additionalProperties": False,
              "properties": {"k": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}}}, '{"k":[{"k":[]}]}'),
    "choice": ({"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"type": "integer"}]}, "[[1],2]"),
    "late": ({"$ref": "#/$defs/0", "$defs": {str(i): {"type": "array", "minItems": 1, "maxItems": 1, "items": {
              "$ref": f"#/$defs/{i + 1}"} if i < 9 else True} for i in range(10)}}, "[" * 10 + "null" + "]" * 10),
    "scalar": ({"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1}, "[[null]]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDING)
def test_recursive_schemas_that_can_be_met(case):
    schema, text = ENDING[case]
    tok = bpe()
    constraint = Constraint(tok, "json_schema", json.dumps(schema))
    for token in tok.encode(text, add_special=False):
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert constraint.is_complete


INEXACT = " cannot be held exactly: whole numbers go up to 2**53, others begin at 1e-09 and have 15 digits"
MESSAGES = [
    ("json_schema", '{"enum": []}', "Unsatisfiable schema: anyOf is empty"),
    ("json_schema", '{"not": {}}', 'not is not a keyword that is supported'),
    ("json_schema", '{"type": "string", "maxlength": 3}', "maxlength is not a keyword that is supported"),
    ("json_schema", '{"properties": {"a": {"foo": 1}}}', "foo is not a keyword that is supported"),
    ("json_schema", '{"const": 9007199254740993}', f"9007199254740993{INEXACT}"),
    ("json_schema", '{"enum": [1, [1.8126486333322134e-05]]}', f"1.8126486333322134e-05{INEXACT}"),
    ("json_schema", '{"type": "number", "maximum": 1e-30}', f"1e-30{INEXACT}"),
    ("regex", "((", "unclosed group"),
    ("regex", "[a-", "unclosed character class"),
    ("regex", "a\\", "it ends within an escape"),
    ("regex", r"(a)\1", "backreferences are not supported"),
    ("regex", r"[^\x00-\U0010FFFF]", "nothing meets it"),
    ("grammar", "", "it has neither a rule root ::= as GBNF, nor a rule start: as Lark"),
    ("grammar", "start ::= \"a\"", "it has neither a rule root ::= as GBNF, nor a rule start: as Lark"),
    ("grammar", 'root ::= "\\uD800"', "\\uD800 is not a character"),
    ("grammar", "start: a", 'at 1(8): unknown name: "a"'),
    ("grammar", "root ::= a", "Rule 'a' not found"),
    ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "it is nested too deeply"),
    ("grammar", "start: </s>", "nothing meets it"),
]  # fmt: skip


@pytest.mark.parametrize("name, text, message", MESSAGES)
def test_messages(name, text, message):
    tok = spm() if "</s>" in text else bpe()
    with pytest.raises(ParameterError) as error:
        Constraint(tok, name, text)
    assert str(error.value) == f"{name}: {message}"


def test_no_end_of_generation():
    tok = Tokenizer.from_metadata({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]})
    assert tok.eog_ids == frozenset()
    with pytest.raises(ParameterError, match=r"^regex: the vocabulary has no token that ends a generation, so nothing"):
        Constraint(tok, "regex", "a")


def test_what_is_kept_for_a_tokenizer_goes_with_it():
    tok = bpe()
    Constraint(tok, "regex", "a")
    ref = weakref.ref(tok)
    del tok
    gc.collect()
    assert ref() is None


def chain(n, link):
    return {"$defs": {f"a{i}": link(f"#/$defs/a{i + 1}") for i in range(n)} | {f"a{n}": {}}, "$ref": "#/$defs/a0"}


HOSTILE = {  # what would take very long, much memory or a deep stack, if nothing limited it
    "references": lambda: ("json_schema", chain(3000, lambda ref: {"$ref": ref})),
    "lists": lambda: ("json_schema", chain(2000, lambda ref: {"type": "array", "items": {"$ref": ref}})),
    "doubled": lambda: ("json_schema", chain(60, lambda ref: {"allOf": [{"$ref": ref}, {"$ref": ref}]})),
    "choices": lambda: ("json_schema", {"allOf": [
        {"anyOf": [{"properties": {f"p{i}": {"type": "integer"}}}, {"properties": {f"q{i}": {"type": "null"}}}]}
        for i in range(30)]}),
    "long patterns": lambda: ("json_schema", {"type": "string", "pattern": "a?" * 9000}),
    "multiples": lambda: ("json_schema", {"type": "integer", "multipleOf": 99999989, "minimum": 3}),
    "long": lambda: ("json_schema", {"const": "x" * 120_000}),
    "exponential": lambda: ("regex", "(a|b)*a(a|b){25}"),
    "powers": lambda: ("regex", "((((a{1000}){1000}){1000}){1000})"),
    "optional": lambda: ("regex", "a?" * 2700 + "a" * 2700),
    "unicode": lambda: ("regex", r"(\p{L}\w{0,500}){0,500}"),
    "parentheses": lambda: ("regex", "(" * 4000 + "a" + ")" * 4000),
    "rules": lambda: ("grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4000)) + '\nr4000: "a"'),
    "terminals": lambda: ("grammar", "start: R0\n" + "\n".join(f"R{i}: (R{i + 1})?" for i in range(3500))
                          + '\nR3500: "a"'),
    "gbnf rules": lambda: ("grammar", "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(3500))
                           + '\nr3500 ::= "a"'),
    "gbnf many rules": lambda: ("grammar", "root ::= r0\n" + "\n".join(f'r{i} ::= r{i + 1} | "b"' for i in range(300))
                                + '\nr300 ::= "a"\n' + "\n".join(f's{i} ::= "a"+' for i in range(3300))),
    "ambiguous": lambda: ("grammar", 'start: start start | "a" |'),
    "alternatives": lambda: ("grammar", "start: " + "|".join(f'"{i}" start' for i in range(3000))),
}  # fmt: skip

CHILD = """
import resource, sys, time
sys.path[:0] = {paths!r}
from test_constraint import *
tok, rng = bpe(), np.random.default_rng(0)
for case in HOSTILE:
    print(case, end=" ", flush=True)
    start, (name, text) = time.perf_counter(), HOSTILE[case]()
    try:
        constraint = Constraint(tok, *SamplerParams(**{{name: text}}).constraint)
        for _ in range(30):
            allowed = np.flatnonzero(constraint.allowed())
            constraint.accept(int(rng.choice(allowed)))
            if allowed[-1] in tok.eog_ids:
                break
    except (ParameterError, TokenError) as error:
        assert str(error).startswith(name) and len(str(error)) < 300, error
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


def test_hostile(request):
    """All in one process: none may end it, take long, or much memory."""
    here = request.path.parent
    code = CHILD.format(paths=[str(here), str(here.parent)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr)
    lines = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()]
    assert [case for case, _, _ in lines] == list(HOSTILE)
    assert max(float(seconds) for _, seconds, _ in lines) < 20
    assert int(lines[-1][2]) < 1 << 20  # KiB
