"""Tokenizer: strings to the token ids that llama.cpp gives, and back.

Source: llama.cpp src/llama-vocab.cpp, `tokenize`, `tokenizer_st_partition`, `token_to_piece`, `detokenize`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from operator import index

from pyggml_adapt.errors import TokenError, TokenizerError
from pyggml_adapt.text.bpe import BpeEncoder, decode_symbols
from pyggml_adapt.text.spm import SpmEncoder
from pyggml_adapt.text.streaming import StreamDecoder
from pyggml_adapt.text.vocab import BYTE, CONTROL, NORMAL, PREFIX, UNKNOWN, USER_DEFINED, Vocab

_WHITE_SPACE = " \t\n\v\f\r"

# clean_up_tokenization_spaces of byte-level models, in order: punctuation, lone apostrophes, contractions
_CLEAN_UPS = (
    (re.compile(rb" (?=[?!.,])"), b""),
    (re.compile(rb" ' "), b"'"),
    (re.compile(rb" (?='(?:[sm]|re|ve))"), b""),
)


class Tokenizer:
    """Text to token ids and back for one vocabulary; immutable, so threads may share it."""

    def __init__(self, vocab: Vocab, encoder: SpmEncoder | BpeEncoder):
        self._vocab = vocab
        self._encoder = encoder
        self._is_spm = vocab.model == "llama"
        self._shown, self._plain = _Pieces(vocab, special=True), _Pieces(vocab, special=False)
        special = [i for i, attr in enumerate(vocab.attrs) if attr & (CONTROL | USER_DEFINED | UNKNOWN)]
        special.sort(key=lambda i: -len(vocab.tokens[i].encode()))
        self._special = _Finder([(vocab.tokens[i], i) for i in special])
        self._user_defined = _Finder(
            [(vocab.tokens[i], i) for i in special if not vocab.attrs[i] & (CONTROL | UNKNOWN)]
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Return the tokenizer that the metadata of a GGUF file describes.

        Raises: TokenizerError naming the key at fault, or the tokenizer that is not supported.
        """
        vocab = Vocab.from_metadata(metadata)
        encoder = SpmEncoder if vocab.model == "llama" else BpeEncoder
        return cls(vocab, encoder(vocab, metadata))

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""
        return len(self._vocab.tokens)

    @property
    def bos_id(self) -> int | None:
        """Beginning of sequence."""
        return self._vocab.special.get("bos")

    @property
    def eos_id(self) -> int | None:
        """End of sequence."""
        return self._vocab.special.get("eos")

    @property
    def unk_id(self) -> int | None:
        """Unknown token."""
        return self._vocab.special.get("unk")

    @property
    def eot_id(self) -> int | None:
        """End of turn."""
        return self._vocab.special.get("eot")

    @property
    def eom_id(self) -> int | None:
        """End of message."""
        return self._vocab.special.get("eom")

    @property
    def pad_id(self) -> int | None:
        """Padding."""
        return self._vocab.special.get("pad")

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every token that ends a generation."""
        return self._vocab.eog

    @property
    def add_bos(self) -> bool:
        """Whether encode(add_special=True) puts bos_id first."""
        return self._vocab.add_bos

    @property
    def add_eos(self) -> bool:
        """Whether encode(add_special=True) puts eos_id last."""
        return self._vocab.add_eos

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`.

        add_special: add bos_id and eos_id where the model wants them.  parse_special: take the text of a control
        token for the token; user-defined tokens are always taken so.
        Raises: TokenizerError if `text` has a lone surrogate, or needs a token that the vocabulary lacks.
        """
        _check_unicode(text)
        ids: list[int] = []
        if add_special and self.add_bos:
            ids.append(self._required("bos"))
        space = " " if self._is_spm and self._vocab.add_space_prefix else ""
        prefix = space  # at the start and after each special token
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                prefix = space
            else:
                ids += self._encoder.encode(prefix + part)
                prefix = ""
        if add_special and self.add_eos:
            ids.append(self._required("eos"))
        return ids

    def decode(self, ids: Sequence[int], *, remove_special: bool = False, unparse_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        remove_special: drop the bos_id and eos_id that encode adds.  unparse_special: give control tokens as text.
        Raises: TokenError.
        """
        try:
            tokens = list(map(index, ids))
        except TypeError:
            raise TokenError(f"token ids must be a flat sequence of whole numbers, not {ids!r:.60}") from None
        return self._detokenize(tokens, remove_special, unparse_special).decode(errors="replace")

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of one token, which may be a part of a character; of a control token only if `special`."""
        return (self._shown if special else self._plain)[token]

    def stream(self) -> StreamDecoder:
        """Return a decoder for tokens that come one by one."""
        return StreamDecoder(self.token_to_piece)

    def _required(self, name: str) -> int:
        if name not in self._vocab.special:
            raise TokenizerError(f"{PREFIX}{name}_token_id is absent, but {PREFIX}add_{name}_token asks for it")
        return self._vocab.special[name]

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Return `text` cut at special tokens, the longest tokens first, as non-empty strings and ids."""
        parts: list[str | int] = [text] if text else []
        for special, id in (self._special if parse_special else self._user_defined).present(text):
            parts = [piece for part in parts for piece in self._cut(part, special, id)]
        return parts

    def _cut(self, part: str | int, special: str, id: int) -> Iterator[str | int]:
        """Yield the pieces of `part` between which `special` stands, and its id in their midst."""
        if isinstance(part, int):
            yield part
            return
        start = 0
        while (at := part.find(special, start)) >= 0:
            if at > start:
                yield part[start:at]
            yield id
            start = at + len(special)
            if id in self._vocab.rstrip:
                start = len(part) - len(part[start:].lstrip(_WHITE_SPACE))
        if start < len(part):
            yield part[start:]

    def _detokenize(self, ids: list[int], remove_special: bool, unparse_special: bool) -> bytes:
        strip = self._vocab.add_space_prefix
        if remove_special and self.add_bos and ids and ids[0] == self.bos_id:
            del ids[0]
            strip = False
        if remove_special and self.add_eos and ids and ids[-1] == self.eos_id:
            del ids[-1]
        pieces = list(map((self._shown if unparse_special else self._plain).__getitem__, ids))
        if strip and pieces:
            pieces[0] = pieces[0].removeprefix(b" ")
        out = b"".join(pieces)
        if self._vocab.pre.clean_spaces:
            for pattern, replacement in _CLEAN_UPS:
                out = pattern.sub(replacement, out)
        return out


class _Pieces(dict[int, bytes]):
    """The bytes of tokens by id, made when they are first asked for."""

    def __init__(self, vocab: Vocab, *, special: bool):
        """special: whether control tokens have any."""
        self._vocab = vocab
        self._empty = 0 if special else CONTROL | UNKNOWN

    def __missing__(self, token: int) -> bytes:
        vocab = self._vocab
        if not 0 <= token < len(vocab.tokens):
            raise TokenError(f"token {token} is outside the vocabulary of {len(vocab.tokens)}")
        piece = b"" if vocab.attrs[token] & self._empty else _piece(vocab, token)
        self[token] = piece
        return piece


def _piece(vocab: Vocab, token: int) -> bytes:
    attr, text = vocab.attrs[token], vocab.tokens[token]
    if attr & (CONTROL | USER_DEFINED | UNKNOWN):
        return text.encode()
    if attr & NORMAL:
        return text.replace("▁", " ").encode() if vocab.model == "llama" else decode_symbols(text)
    if attr & BYTE:
        return bytes.fromhex(text[3:5])
    return b""


class _Finder:
    """Find which of many tokens a text has; most start alike, so most are ruled out by a few starts."""

    def __init__(self, tokens: list[tuple[str, int]]):
        self.tokens = tokens
        self._by_start: dict[str, list[int]] = {}
        for i, (text, _) in enumerate(tokens):
            self._by_start.setdefault(text[:6], []).append(i)

    def present(self, text: str) -> list[tuple[str, int]]:
        """Return the tokens that `text` has, texts and ids, in their order."""
        maybe = sorted(i for start, indices in self._by_start.items() if start in text for i in indices)
        return [self.tokens[i] for i in maybe if self.tokens[i][0] in text]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TokenizerError(f"the text has a lone surrogate, U+{ord(text[e.start]):04X}, at {e.start}") from e
