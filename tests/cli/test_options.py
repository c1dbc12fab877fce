"""Options that several sub-commands share."""

import argparse
import math

import pytest

from pyggml_adapt.cli import options
from pyggml_adapt.engine.sampling import SamplerParams
from pyggml_adapt.errors import FileAccessError, ParameterError


def parsed(*flags):
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_sampling_options(parser)
    return options.sampling(parser.parse_args(flags))


def test_flags():
    assert SamplerParams(**parsed()) == SamplerParams()
    constraints = {"json_schema", "regex", "grammar"}
    assert parsed().keys() >= set(SamplerParams.__slots__) - {"dry_sequence_breakers", "min_keep"} - constraints
    values = parsed(
        *("--temp", "0.5", "--top-k", "9", "--top-n-sigma", "1.5", "--typical", "0.9", "--xtc-probability", "0.2"),
        *("--presence-penalty", "-0.5", "--dry-base", "2", "--dynatemp-exp", "3", "--mirostat", "2"),
        *("--mirostat-lr", "0.2", "--mirostat-ent", "4", "--seed", "-1"),
    )
    assert SamplerParams(**values) == SamplerParams(
        temperature=0.5, top_k=9, top_n_sigma=1.5, typical_p=0.9, xtc_probability=0.2, presence_penalty=-0.5,
        dry_base=2.0, dynatemp_exponent=3.0, mirostat=2, mirostat_eta=0.2, mirostat_tau=4.0,
    )  # fmt: skip


def test_flags_for_tokens_and_texts():
    biases = parsed("-l", "15043+1", "--logit-bias", "7-1.5", "-l", "7-.5", "-l", "8-inf")["logit_bias"]
    assert biases == {15043: 1.0, 7: -2.0, 8: -math.inf}
    for texts, want in ((["x", "\n"], ["x", "\n"]), (["none"], []), (["x", "none", "y"], ["y"]), (["x", "none"], [])):
        flags = [flag for text in texts for flag in ("--dry-sequence-breaker", text)]
        assert parsed(*flags)["dry_sequence_breakers"] == want
    for text in ("5", "5=1", "x+1", "+1", "5+", "5+nan", "5+1e3", "5++1", "5 + 1"):
        with pytest.raises(argparse.ArgumentError, match="is not a token id and a bias, as 15043"):
            parsed("-l", text)


def test_flags_for_constraints(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "null"}')
    (tmp_path / "g.gbnf").write_text('root ::= "é"', encoding="utf-8")
    (tmp_path / "bad").write_bytes(b"\xff")
    for flags, want in (
        (("-j", "{}"), ("json_schema", "{}")),
        (("--json-schema", '{"a": 1}'), ("json_schema", '{"a": 1}')),
        (("-jf", f"{tmp_path}/s.json"), ("json_schema", '{"type": "null"}')),
        (("--regex", ""), ("regex", "")),
        (("--grammar", "x"), ("grammar", "x")),
        (("--grammar-file", f"{tmp_path}/g.gbnf"), ("grammar", 'root ::= "é"')),
    ):
        assert SamplerParams(**parsed(*flags)).constraint == want
    with pytest.raises(argparse.ArgumentError, match="not allowed with argument"):
        parsed("--regex", "a", "-j", "{}")
    with pytest.raises(FileAccessError, match="no such file"):
        parsed("--grammar-file", f"{tmp_path}/none")
    with pytest.raises(ParameterError, match=r"bad: the JSON Schema is not UTF-8 at byte 0"):
        parsed("--json-schema-file", f"{tmp_path}/bad")
