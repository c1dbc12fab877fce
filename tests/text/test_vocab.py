"""Vocabularies: special tokens, and metadata that is wrong."""

import numpy as np
import pytest

from pyggml_adapt.errors import TokenizerError
from pyggml_adapt.text import Tokenizer
from pyggml_adapt.text.pre_tokenizers import PRE_TOKENIZERS

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def spm(*tokens, types=None, **keys):
    """Return metadata of a SentencePiece vocabulary: <unk> <s> </s>, 256 bytes, then `tokens`."""
    texts = ["<unk>", "<s>", "</s>", *BYTES, *tokens]
    types = [2, 3, 3, *[6] * 256, *(types or [1] * len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": np.zeros(len(texts), np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def bpe(**keys):
    """Return metadata of a byte-level vocabulary of two tokens."""
    metadata = {"model": "gpt2", "pre": "llama-bpe", "tokens": ["a", "b"], "merges": []}
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | keys).items()}


def refusal(metadata):
    with pytest.raises(TokenizerError) as e:
        Tokenizer.from_metadata(metadata)
    return str(e.value)


def test_defaults_spm():
    tok = Tokenizer.from_metadata(spm())
    assert (tok.n_vocab, tok.bos_id, tok.eos_id, tok.unk_id) == (259, 1, 2, 0)
    assert (tok.eot_id, tok.eom_id, tok.pad_id) == (None, None, None)
    assert (tok.add_bos, tok.add_eos) == (True, False)
    assert tok.eog_ids == {2}


def test_defaults_bpe():
    tok = Tokenizer.from_metadata(bpe())
    assert (tok.bos_id, tok.eos_id, tok.unk_id) == (None, None, None)  # the default, 11, is outside
    assert (tok.add_bos, tok.add_eos) == (True, False)
    tok = Tokenizer.from_metadata(bpe(tokens=list("abcdefghijkl")))
    assert (tok.bos_id, tok.eos_id, tok.eog_ids) == (11, 11, {11})


def test_defaults_of_pre_tokenizers():
    letters = list("abcdefghijkl")
    for pre, add_bos, bos_id in (("tekken", True, 11), ("qwen2", False, 11), ("glm4", False, None)):
        tok = Tokenizer.from_metadata(bpe(pre=pre, tokens=letters))
        assert (tok.add_bos, tok.bos_id, tok.eos_id) == (add_bos, bos_id, 11), pre
    tok = Tokenizer.from_metadata(bpe(pre="glm4", tokens=letters, bos_token_id=3, add_bos_token=True))
    assert (tok.add_bos, tok.bos_id) == (True, 3)


def test_ids_and_flags_from_keys():
    keys = {"bos_token_id": 259, "eos_token_id": np.uint32(260), "eot_token_id": 261, "padding_token_id": 7}
    tok = Tokenizer.from_metadata(spm("b", "e", "t", **keys, add_bos_token=False, add_eos_token=True))
    assert (tok.bos_id, tok.eos_id, tok.eot_id, tok.pad_id) == (259, 260, 261, 7)
    assert tok.eog_ids == {2, 260, 261}  # </s> by its text
    assert (tok.add_bos, tok.add_eos) == (False, True)


@pytest.mark.parametrize(
    "text", ["<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<end_of_turn>", "[EOS]", "<|fim_pad|>"]
)
def test_eog_by_text(text):
    tok = Tokenizer.from_metadata(spm(text))
    assert tok.eog_ids == {2, 259}


def test_token_that_looks_like_control_becomes_control():
    tok = Tokenizer.from_metadata(spm("<|im_end|>"))
    assert tok.token_to_piece(259) == b""
    assert tok.token_to_piece(259, special=True) == b"<|im_end|>"


def test_end_of_message_is_not_end_of_generation():
    tok = Tokenizer.from_metadata(spm("<|end|>", "<|return|>", "<|call|>", "<|channel|>", types=[3, 3, 3, 3]))
    assert tok.eog_ids == {2, 260, 261}
    assert tok.token_to_piece(259) == b"<|end|>"
    assert tok.token_to_piece(262) == b"<|channel|>"


def test_ordinary_s_token():
    tok = Tokenizer.from_metadata(spm("<|tool_response>", eos_token_id=259))
    assert tok.eog_ids == {259}
    assert tok.token_to_piece(2) == b"</s>"


def test_phi3_swallows_white_space():
    tokens = ("<|user|>", "▁", "▁a", "a")
    tok = Tokenizer.from_metadata(spm(*tokens, types=[3, 1, 1, 1]) | {"general.name": "Phi-3 mini"})
    assert tok.encode("<|user|> \n a<s> a", add_special=False, parse_special=True) == [259, 261, 1, 260, 261]


def test_model_not_supported():
    assert refusal({}) == "tokenizer.ggml.model is absent; supported are 'llama' and 'gpt2'"
    assert "tokenizer.ggml.model is 't5'; supported are" in refusal({"tokenizer.ggml.model": "t5"})


@pytest.mark.parametrize("pre", ["kimi-k2", "jina-v2-code", "gemma4", "Qwen2", 3])
def test_pre_tokenizer_not_supported(pre):
    message = refusal({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre})
    assert message == f"tokenizer.ggml.pre is {pre!r}, not one of the {len(PRE_TOKENIZERS)} supported pre-tokenizers"


def test_without_pre_tokenizer_the_default(caplog):
    absent, empty = bpe(), bpe(pre="")
    del absent["tokenizer.ggml.pre"]
    for metadata in (absent, empty):
        assert Tokenizer.from_metadata(metadata)._vocab.pre is PRE_TOKENIZERS["default"]
        assert caplog.messages == [
            "tokenizer.ggml.pre is absent: words are cut in the default way, which may not be the model's"
        ]
        caplog.clear()
    assert Tokenizer.from_metadata(bpe(pre="default"))._vocab.pre is PRE_TOKENIZERS["default"]
    assert caplog.messages == []


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("tokens", None, "is absent"),
        ("tokens", [], "is empty"),
        ("tokens", "abc", "is not an array of strings"),
        ("tokens", [b"a"] * 259, "is not an array of strings"),
        ("tokens", np.zeros(259), "is not an array of strings"),
        ("tokens", ["a", "b", "a"], "has 'a' twice"),
        ("tokens", ["a", "b\udcff"], "has an item that is not valid UTF-8, number 1"),
        ("scores", np.zeros(258, np.float32), "has 258 items for 259 tokens"),
        ("scores", np.zeros((259, 1), np.float32), "is not an array of numbers"),
        ("scores", ["x"] * 259, "is not an array of numbers"),
        ("scores", 1.0, "is not an array of numbers"),
        ("scores", np.array([0.0] * 7 + [np.nan] * 252), "has a NaN at token 7"),
        ("token_type", np.zeros(260, np.int32), "has 260 items for 259 tokens"),
        ("token_type", np.zeros(259, np.float32), "is not an array of integers"),
        ("token_type", [[1], [2, 3]], "is not an array of integers"),
        ("token_type", np.full(259, 6), "calls token 0 a byte, but its text is '<unk>'"),
        ("bos_token_id", 259, "is 259, not the id of one of 259 tokens"),
        ("eos_token_id", -1, "is -1, not the id"),
        ("unknown_token_id", "0", "is '0', not the id"),
        ("eot_token_id", True, "is True, not the id"),
        ("fim_pad_token_id", 1.0, "is 1.0, not the id"),
        ("add_bos_token", 1, "is 1, not a boolean"),
        ("add_space_prefix", "yes", "is 'yes', not a boolean"),
    ],
)
def test_wrong_metadata(key, value, says):
    metadata = spm()
    metadata.pop(f"tokenizer.ggml.{key}", None)
    if value is not None:
        metadata[f"tokenizer.ggml.{key}"] = value
    assert refusal(metadata).startswith(f"tokenizer.ggml.{key} {says}")


def test_byte_token_that_can_be_spelled():
    message = refusal(spm("<0x0", "A>"))
    assert message == "tokenizer.ggml.tokens can spell the byte token <0x0A> as '<0x0' and 'A>'"


@pytest.mark.parametrize(
    "value, says", [(None, "is absent"), ([1], "is not an array of strings"), (["a b", "\udcff b"], "has an item that")]
)
def test_wrong_merges(value, says):
    metadata = bpe(merges=value)
    if value is None:
        del metadata["tokenizer.ggml.merges"]
    assert refusal(metadata).startswith(f"tokenizer.ggml.merges {says}")


def test_empty_token_gets_a_name():
    tok = Tokenizer.from_metadata(spm("", "x"))
    assert tok.token_to_piece(259) == b"[EMPTY_259]"
    assert refusal(spm("", "[EMPTY_259]")) == "tokenizer.ggml.tokens has '[EMPTY_259]' twice"


def test_add_bos_without_bos():
    tok = Tokenizer.from_metadata(bpe())
    with pytest.raises(TokenizerError, match=r"bos_token_id is absent, but tokenizer\.ggml\.add_bos_token"):
        tok.encode("ab")
    assert tok.encode("ab", add_special=False) == [0, 1]
