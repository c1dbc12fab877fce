"""Byte-level BPE with the Llama 3 pre-tokenizer: text to ids, merged by the `tokenizers` library.

Source: llama.cpp src/llama-vocab.cpp, `llm_tokenizer_bpe_session`; src/unicode.cpp, `unicode_regex_split`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pyggml_adapt.text.vocab import Vocab, read_strings

if TYPE_CHECKING:
    from tokenizers.models import BPE

# GPT-2's printable stand-in for each byte
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
CHAR_OF_BYTE = {byte: chr(byte) for byte in _SHOWN} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}

# Letters and numbers that Unicode 16.0 added.  llama.cpp's tables are of 15.1, the library's regex is of 16.0.
_NEW_LETTERS = (
    r"\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D4A}-\x{10D65}\x{10D6F}-\x{10D85}"
    r"\x{10EC2}-\x{10EC4}\x{11380}-\x{113D3}\x{11BC0}-\x{11BE0}\x{13460}-\x{143FA}\x{16100}-\x{1611D}"
    r"\x{16D40}-\x{16D6C}\x{18CFF}\x{1E5D0}-\x{1E5F0}"
)
_NEW_NUMBERS = (
    r"\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{16130}-\x{16139}\x{16D70}-\x{16D79}"
    r"\x{1CCF0}-\x{1CCF9}\x{1E5F1}-\x{1E5FA}"
)
# {L} letters, {N} numbers, {X} neither, {Y} neither and no line end
_WORDS = (
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|{Y}?{L}+|{N}{{1,3}}| ?{X}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTER = rf"[\p{{L}}&&[^{_NEW_LETTERS}]]"
NUMBER = rf"[\p{{N}}&&[^{_NEW_NUMBERS}]]"
_ASCII_WORDS = _WORDS.format(L="[A-Za-z]", N="[0-9]", X=r"[^\sA-Za-z0-9]", Y=r"[^\r\nA-Za-z0-9]")
_UNICODE_WORDS = _WORDS.format(
    L=LETTER,
    N=NUMBER,
    X=rf"[[^\s\p{{L}}\p{{N}}]{_NEW_LETTERS}{_NEW_NUMBERS}]",
    Y=rf"[[^\r\n\p{{L}}\p{{N}}]{_NEW_LETTERS}{_NEW_NUMBERS}]",
)
# A word always ends between a letter and a space, so text may be cut there: into what is ASCII and what is not.
_SEGMENTS = r"[\x00-\x7F]*[A-Za-z](?= )|.+?[A-Za-z](?= )|.+"

_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 32  # characters; longer words seldom come twice


class BpeEncoder:
    """Encode fragments of text as llama.cpp does for `tokenizer.ggml.model` "gpt2", pre-tokenizer Llama 3."""

    def __init__(self, vocab: Vocab, metadata: Mapping[str, object]):
        from tokenizers import Regex, models, pre_tokenizers  # not needed for a SentencePiece vocabulary

        merges = _read_merges(metadata)
        self._ids = vocab.ids
        self._n_vocab = len(vocab.tokens)
        self._extra = [char for char in CHAR_OF_BYTE.values() if char not in vocab.ids]
        try:
            self._bpe = self._merger(models.BPE, merges)
        except Exception:  # nothing narrower; unlike llama.cpp, the library wants merges of tokens that give tokens
            self._extra = _missing_symbols(vocab.ids, merges)
            self._bpe = self._merger(models.BPE, merges)
        self._splitter = pre_tokenizers.Split(Regex(_UNICODE_WORDS), "isolated")
        self._ascii_words = re.compile(_ASCII_WORDS, re.ASCII)
        self._segments = re.compile(_SEGMENTS, re.DOTALL)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, valid Unicode without special tokens."""
        ids: list[int] = []
        get = self._cache.get
        for word in self._split(text):
            ids += get(word) or self._encode_word(word)
        return ids

    def _merger(self, bpe: Callable[..., BPE], merges: list[tuple[str, str]]) -> BPE:
        extra = {text: self._n_vocab + i for i, text in enumerate(self._extra)}
        return bpe(vocab=self._ids | extra, merges=merges, cache_capacity=0)

    def _split(self, text: str) -> list[str]:
        """Return the words of `text`; ASCII, which is most text, goes a faster way to the same result."""
        if text.isascii():
            return self._ascii_words.findall(text)
        words: list[str] = []
        for segment in self._segments.findall(text):
            if segment.isascii():
                words += self._ascii_words.findall(segment)
            else:
                words += [word for word, _ in self._splitter.pre_tokenize_str(segment)]
        return words

    def _encode_word(self, word: str) -> list[int]:
        """Return the ids of one word: the token of that text if there is one, else what the merges give."""
        symbols = "".join(map(CHAR_OF_BYTE.__getitem__, word.encode()))
        whole = self._ids.get(symbols)
        if whole is not None:
            ids = [whole]
        else:
            ids = [token.id for token in self._bpe.tokenize(symbols)]
            if self._extra and max(ids, default=0) >= self._n_vocab:
                ids = [part for i in ids for part in self._expand(i)]
        if len(word) <= _CACHED_LENGTH:
            if len(self._cache) >= _CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def _expand(self, id: int) -> list[int]:
        """Return the tokens for a symbol that is none: as in llama.cpp, its bytes, less those that are no tokens."""
        if id < self._n_vocab:
            return [id]
        return [self._ids[char] for char in self._extra[id - self._n_vocab] if char.isascii() and char in self._ids]


def decode_symbols(text: str) -> bytes:
    """Return the bytes that a token's text stands for; a foreign character becomes the note that llama.cpp makes."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in text])
    except KeyError:
        out = bytearray()
        for char in text:
            if char in BYTE_OF_CHAR:
                out.append(BYTE_OF_CHAR[char])
            else:
                out += f"[UNK_BYTE_0x{char.encode().hex()}{text}]".encode()
        return bytes(out)


def _read_merges(metadata: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the pairs to merge, best first; of a repeated pair the first counts."""
    lines = read_strings(metadata, "merges")
    if len(set(lines)) < len(lines):
        lines = list(dict.fromkeys(lines))
    pairs = (line.partition(" ") for line in lines)
    return [(left, right) for left, _, right in pairs if left and right]  # others can never apply


def _missing_symbols(ids: dict[str, int], merges: list[tuple[str, str]]) -> list[str]:
    """Return the symbols, single bytes or parts and results of merges, that are not tokens."""
    symbols = set(CHAR_OF_BYTE.values())
    for left, right in merges:
        symbols |= {left, right, left + right}
    return sorted(symbols - ids.keys())
