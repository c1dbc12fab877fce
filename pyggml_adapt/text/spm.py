"""SentencePiece BPE: text to ids by the `sentencepiece` library, on a model rebuilt from tokens and scores.

Source: llama.cpp src/llama-vocab.cpp, `llm_tokenizer_spm_session`; sentencepiece src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from pyggml_adapt.errors import TokenizerError
from pyggml_adapt.text.vocab import PREFIX, Vocab, read_numbers

_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6  # ModelProto.SentencePiece.Type


class SpmEncoder:
    """Encode fragments of text as llama.cpp does for `tokenizer.ggml.model` "llama"."""

    def __init__(self, vocab: Vocab, metadata: Mapping[str, object]):
        import sentencepiece  # not needed for a byte-level vocabulary

        scores = read_numbers(metadata, "scores", "fiu", len(vocab.tokens))
        if scores is None:
            scores = np.zeros(len(vocab.tokens), np.float32)
        if np.isnan(scores).any():
            raise TokenizerError(f"{PREFIX}scores has a NaN at token {int(np.isnan(scores).argmax())}")
        extra = _missing_bytes(vocab.ids)
        _check_bytes_unreachable(vocab.ids)
        self._n_vocab = len(vocab.tokens)
        self._extra = extra
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(_model_proto(vocab.tokens, scores.astype("<f4"), extra))
        except RuntimeError as e:
            raise TokenizerError(f"{PREFIX}tokens is not a SentencePiece vocabulary: {e}") from e

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, valid Unicode without special tokens."""
        ids: list[int] = self._processor.encode(text)
        if self._extra and max(ids, default=0) >= self._n_vocab:
            byte = self._extra[next(i for i in ids if i >= self._n_vocab) - self._n_vocab]
            raise TokenizerError(f"{PREFIX}tokens has no token {byte}, which the text needs")
        return ids


def _byte_texts() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _missing_bytes(ids: dict[str, int]) -> list[str]:
    return [text for text in _byte_texts() if text not in ids]


def _check_bytes_unreachable(ids: dict[str, int]) -> None:
    """Raise if merges can spell a byte token out: sentencepiece then differs from llama.cpp."""
    for text in _byte_texts():
        for parts in ((text[:k], text[k:]) for k in range(1, 6)):
            if text in ids and all(len(part) == 1 or part in ids for part in parts):
                raise TokenizerError(f"{PREFIX}tokens can spell the byte token {text} as {parts[0]!r} and {parts[1]!r}")


def _model_proto(tokens: list[str], scores: np.ndarray, extra: list[str]) -> bytes:
    """Return a serialized ModelProto: every token mergeable, unlike sentencepiece's own control tokens.

    After the n tokens come the byte tokens that the vocabulary lacks, and one unknown token, which must exist.
    """
    bytes_ = set(_byte_texts())
    packed = scores.tobytes()
    out = [_piece(t, packed[4 * i : 4 * i + 4], _BYTE if t in bytes_ else _NORMAL) for i, t in enumerate(tokens)]
    out += [_piece(text, bytes(4), _BYTE) for text in extra]
    unknown = "<unk>"
    taken = set(tokens)
    while unknown in taken:
        unknown += ">"
    out.append(_piece(unknown, struct.pack("<f", 0.0), _UNKNOWN))
    trainer = _int(3, 2) + _int(35, 1) + _int(40, len(out) - 1)  # model_type BPE, byte_fallback, unk_id
    trainer += b"".join(_int(field, (1 << 64) - 1) for field in (41, 42, 43))  # no bos, eos, pad: -1
    normalizer = _bytes(1, b"identity") + _int(3, 0) + _int(4, 0) + _int(5, 1)  # only escape white space
    return b"".join(out) + _bytes(2, trainer) + _bytes(3, normalizer)


def _piece(text: str, score: bytes, kind: int) -> bytes:
    return _bytes(1, _bytes(1, text.encode()) + b"\x15" + score + b"\x18" + bytes((kind,)))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


@lru_cache(maxsize=1024)  # most are lengths of tokens, of which there are few
def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
