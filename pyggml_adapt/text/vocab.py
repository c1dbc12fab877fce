"""Vocabulary: what GGUF metadata says about tokens, checked once, with llama.cpp's defaults filled in.

Source: llama.cpp src/llama-vocab.cpp, `llama_vocab::impl::load`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.errors import TokenizerError
from pyggml_adapt.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

_logger = logging.getLogger(__name__)

PREFIX = "tokenizer.ggml."

# token attributes; one token can have several
UNKNOWN, UNUSED, NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 2, 4, 8, 16, 32
_ATTR_OF_TYPE = {1: NORMAL, 2: UNKNOWN, 3: CONTROL, 4: USER_DEFINED, 5: UNUSED, 6: BYTE}

# metadata key -> special token; of two keys for one token the later wins
_ID_KEYS = {
    "bos_token_id": "bos", "eos_token_id": "eos", "eot_token_id": "eot", "eom_token_id": "eom",
    "unknown_token_id": "unk", "seperator_token_id": "sep", "padding_token_id": "pad", "mask_token_id": "mask",
    "fim_pre_token_id": "fim_pre", "fim_suf_token_id": "fim_suf", "fim_mid_token_id": "fim_mid",
    "fim_pad_token_id": "fim_pad", "fim_rep_token_id": "fim_rep", "fim_sep_token_id": "fim_sep",
    "prefix_token_id": "fim_pre", "suffix_token_id": "fim_suf", "middle_token_id": "fim_mid",
}  # fmt: skip

_DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {"bos": 11, "eos": 11}}
_NO_PRE_TOKENIZER = PreTokenizer((), add_bos=True)  # SentencePiece has none

# special tokens that have no key are found by their text; the first that the vocabulary has is taken
_TEXTS = {
    "eot": (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
        "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
    ),
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip

# tokens that end a generation whenever the vocabulary has them
_EOG_TEXTS = (
    *_TEXTS["eot"], "<|eom_id|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "</s>", "[EOS]", "<eos>",
    "<turn|>", "<|tool_response>", "[e~[",
)  # fmt: skip
_SHOWN_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # control tokens that are shown


@dataclass(slots=True)
class Vocab:
    """Tokens of one model: texts, attributes, special ids and flags.

    attrs: one byte of attribute bits per token.  special: name ("bos", "eot", ...) -> id, only those that exist.
    pre: empty for SentencePiece.
    """

    model: str
    pre: PreTokenizer
    tokens: list[str]
    ids: dict[str, int]
    attrs: bytearray
    special: dict[str, int]
    eog: frozenset[int]
    rstrip: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Vocab:
        """Return the vocabulary described by `metadata`, the keys and values of a GGUF file.

        Raises: TokenizerError naming the key, if one is absent, malformed or not supported.
        """
        model = _read_model(metadata)
        is_spm = model == "llama"
        pre = _NO_PRE_TOKENIZER if is_spm else _read_pre(metadata)
        tokens = _read_tokens(metadata)
        ids = {text: i for i, text in enumerate(tokens)}
        if len(ids) != len(tokens):
            repeated = next(text for i, text in enumerate(tokens) if ids[text] != i)
            raise TokenizerError(f"{PREFIX}tokens has {repeated!r} twice")
        attrs = _read_attrs(metadata, tokens)
        defaults = {name: id for name, id in _DEFAULTS[model].items() if pre.default_bos or name != "bos"}
        special = _read_special(metadata, len(tokens), defaults)
        eog = _find_eog(ids, attrs, special)
        return cls(
            model=model, pre=pre, tokens=tokens, ids=ids, attrs=attrs, special=special, eog=eog,
            rstrip=_find_rstrip(metadata, ids, attrs),
            add_bos=_read_flag(metadata, "add_bos_token", pre.add_bos),
            add_eos=_read_flag(metadata, "add_eos_token", False),
            add_space_prefix=_read_flag(metadata, "add_space_prefix", is_spm),
        )  # fmt: skip


def _read_model(metadata: Mapping[str, object]) -> str:
    """Return the tokenizer model, "llama" or "gpt2", if this package can tokenize for it."""
    model = metadata.get(PREFIX + "model")
    if model not in ("llama", "gpt2"):
        what = "is absent" if model is None else f"is {model!r}"
        raise TokenizerError(f"{PREFIX}model {what}; supported are 'llama' and 'gpt2'")
    return str(model)


def _read_pre(metadata: Mapping[str, object]) -> PreTokenizer:
    """Return the pre-tokenizer; without one the default of old files, with a warning, as in llama.cpp."""
    name = metadata.get(PREFIX + "pre", "")
    if name == "":
        _logger.warning("%spre is absent: words are cut in the default way, which may not be the model's", PREFIX)
        name = "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise TokenizerError(f"{PREFIX}pre is {name!r}, not one of the {len(PRE_TOKENIZERS)} supported pre-tokenizers")
    return PRE_TOKENIZERS[name]


def read_strings(metadata: Mapping[str, object], key: str) -> list[str]:
    """Return the string array `key`."""
    values = metadata.get(PREFIX + key)
    if values is None:
        raise TokenizerError(f"{PREFIX}{key} is absent")
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or set(map(type, values)) - {str}:
        raise TokenizerError(f"{PREFIX}{key} is not an array of strings")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as e:
        bad = next(i for i, text in enumerate(values) if any("\ud800" <= c <= "\udfff" for c in text))
        raise TokenizerError(f"{PREFIX}{key} has an item that is not valid UTF-8, number {bad}") from e
    return list(values)


def _read_tokens(metadata: Mapping[str, object]) -> list[str]:
    """Return the token texts; an empty one is named [EMPTY_<id>], as llama.cpp names it."""
    tokens = read_strings(metadata, "tokens")
    if not tokens:
        raise TokenizerError(f"{PREFIX}tokens is empty")
    if "" in tokens:
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    return tokens


def read_numbers(metadata: Mapping[str, object], key: str, kinds: str, n: int) -> np.ndarray | None:
    """Return the numeric array `key` of n items, or None if absent; kinds: NumPy dtype kinds allowed."""
    values = metadata.get(PREFIX + key)
    if values is None:
        return None
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise TokenizerError(f"{PREFIX}{key} is not an array of {'integers' if kinds == 'iu' else 'numbers'}")
    if len(array) != n:
        raise TokenizerError(f"{PREFIX}{key} has {len(array)} items for {n} tokens")
    return array


def _is_byte_text(text: str) -> bool:
    """Return whether the text is <0xHH>, the form of a byte token."""
    if len(text) != 6 or not text.startswith("<0x") or text[5] != ">":
        return False
    return all(c in "0123456789abcdefABCDEF" for c in text[3:5])


def _read_attrs(metadata: Mapping[str, object], tokens: list[str]) -> bytearray:
    types = read_numbers(metadata, "token_type", "iu", len(tokens))
    if types is None:
        return bytearray([NORMAL]) * len(tokens)
    attrs = bytearray(_ATTR_OF_TYPE.get(t, 0) for t in types.tolist())
    for i in np.flatnonzero(types == 6).tolist():
        if not _is_byte_text(tokens[i]):
            raise TokenizerError(f"{PREFIX}token_type calls token {i} a byte, but its text is {tokens[i]!r}")
    return attrs


def _read_flag(metadata: Mapping[str, object], key: str, default: bool) -> bool:
    value = metadata.get(PREFIX + key, default)
    if not isinstance(value, bool | np.bool_):
        raise TokenizerError(f"{PREFIX}{key} is {value!r}, not a boolean")
    return bool(value)


def _read_special(metadata: Mapping[str, object], n_vocab: int, defaults: dict[str, int]) -> dict[str, int]:
    special = {name: id for name, id in defaults.items() if id < n_vocab}
    for key, name in _ID_KEYS.items():
        value = metadata.get(PREFIX + key)
        if value is None:
            continue
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value < n_vocab:
            raise TokenizerError(f"{PREFIX}{key} is {value!r}, not the id of one of {n_vocab} tokens")
        special[name] = int(value)
    return special


def _find_eog(ids: dict[str, int], attrs: bytearray, special: dict[str, int]) -> frozenset[int]:
    """Return the tokens that end a generation; completes `special` and corrects `attrs` on the way."""
    for name, texts in _TEXTS.items():
        found = next((ids[text] for text in texts if text in ids), None)
        if name not in special and found is not None:
            special[name] = found
            attrs[found] |= CONTROL
    eog = {special[name] for name in ("fim_pad", "fim_rep", "fim_sep") if name in special}
    for text in _EOG_TEXTS:
        if text in ids:
            eog.add(ids[text])
            attrs[ids[text]] |= CONTROL
    for text in _SHOWN_TEXTS:
        if text in ids:
            attrs[ids[text]] = USER_DEFINED
    eog.update(special[name] for name in ("eos", "eot", "eom") if name in special)

    def ends(text: str) -> bool:
        return ids.get(text) in eog

    # where <|call|> and its like end a turn, <|end|> only ends a message
    if ends("<|end|>") and (ends("<|call|>") or ends("<|calls|>")) and (ends("<|return|>") or ends("<|flush|>")):
        eog.remove(ids["<|end|>"])
        attrs[ids["<|end|>"]] = USER_DEFINED
    # Gemma 4 and PLaMo have an ordinary token of this text
    if ends("</s>") and (ends("<|tool_response>") or ends("<|plamo:eos|>")):
        eog.remove(ids["</s>"])
        attrs[ids["</s>"]] = NORMAL
    return frozenset(eog)


def _find_rstrip(metadata: Mapping[str, object], ids: dict[str, int], attrs: bytearray) -> frozenset[int]:
    """Return the special tokens that swallow the white space after them: Phi-3's, known by the model's name."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    swallow = {i for i, attr in enumerate(attrs) if attr & (CONTROL | USER_DEFINED | UNKNOWN)}
    swallow |= {ids[text] for text in ("</s>",) if text in ids}
    return frozenset(swallow - {ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")})
