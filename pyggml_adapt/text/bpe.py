"""Byte-level BPE: text to ids, cut into words by a pre-tokenizer and merged by the `tokenizers` library.

Source: llama.cpp src/llama-vocab.cpp, `llm_tokenizer_bpe_session`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pyggml_adapt.text.pre_tokenizers import Splitter
from pyggml_adapt.text.vocab import Vocab, read_strings

if TYPE_CHECKING:
    from tokenizers.models import BPE

# GPT-2's printable stand-in for each byte
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
CHAR_OF_BYTE = {byte: chr(byte) for byte in _SHOWN} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}

_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 32  # characters; longer words seldom come twice
_N_TOGETHER = 4096  # parts of a text


class BpeEncoder:
    """Encode fragments of text as llama.cpp does for `tokenizer.ggml.model` "gpt2"."""

    def __init__(self, vocab: Vocab, metadata: Mapping[str, object]):
        from tokenizers import models  # not needed for a SentencePiece vocabulary

        merges = _read_merges(metadata)
        self._ids = vocab.ids
        self._n_vocab = len(vocab.tokens)
        self._extra = [char for char in CHAR_OF_BYTE.values() if char not in vocab.ids]
        try:
            self._bpe = self._merger(models.BPE, merges)
        except Exception:  # nothing narrower; unlike llama.cpp, the library wants merges of tokens that give tokens
            self._extra = _missing_symbols(vocab.ids, merges)
            self._bpe = self._merger(models.BPE, merges)
        self._splitter = Splitter(vocab.pre.rules)
        self._whole_words = vocab.ids if vocab.pre.ignore_merges else {}
        self._parts: dict[str, list[int]] = {}
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, valid Unicode without special tokens."""
        ids: list[int] = []
        parts = self._splitter.parts(text)
        for start in range(0, len(parts), _N_TOGETHER):
            some = parts[start : start + _N_TOGETHER]
            known = list(map(self._parts.get, some))
            new = self._encode_parts([part for part, its in zip(some, known, strict=True) if its is None])
            for part, its in zip(some, known, strict=True):
                ids += new[part] if its is None else its
        return ids

    def _encode_parts(self, parts: list[str]) -> dict[str, list[int]]:
        """Return the ids of each part; together, since to cut many into words takes not much longer than to cut one."""
        parts = list(dict.fromkeys(parts))
        get, found = self._words.get, {}
        for part, words in zip(parts, self._splitter.words(parts), strict=True):
            if len(words) == 1:
                ids = self._encode_word(part)
            else:
                ids = []
                for word in words:
                    ids += get(word) or _keep(self._words, word, self._encode_word(word))
            found[part] = _keep(self._parts, part, ids)
        return found

    def _merger(self, bpe: Callable[..., BPE], merges: list[tuple[str, str]]) -> BPE:
        extra = {text: self._n_vocab + i for i, text in enumerate(self._extra)}
        return bpe(vocab=self._ids | extra, merges=merges, cache_capacity=0)

    def _encode_word(self, word: str) -> list[int]:
        """Return the ids of one word: the token of that text, if the model takes it first, or what the merges give."""
        symbols = "".join(map(CHAR_OF_BYTE.__getitem__, word.encode()))
        whole = self._whole_words.get(symbols)
        if whole is not None:
            ids = [whole]
        else:
            ids = [token.id for token in self._bpe.tokenize(symbols)]
            if self._extra and max(ids, default=0) >= self._n_vocab:
                ids = [part for i in ids for part in self._expand(i)]
        return ids

    def _expand(self, id: int) -> list[int]:
        """Return the tokens for a symbol that is none: as in llama.cpp, its bytes, less those that are no tokens."""
        if id < self._n_vocab:
            return [id]
        return [self._ids[char] for char in self._extra[id - self._n_vocab] if char.isascii() and char in self._ids]


def _keep(cache: dict[str, list[int]], text: str, ids: list[int]) -> list[int]:
    if len(text) <= _CACHED_LENGTH:
        if len(cache) >= _CACHED_WORDS:
            cache.clear()
        cache[text] = ids
    return ids


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
