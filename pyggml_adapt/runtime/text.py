"""The parts of a host that deal in text: sessions, generations, and the tokenizers that tasks share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pyggml_adapt.errors import ParameterError
from pyggml_adapt.runtime.sampling import Breakers, SamplerParams, find_breakers
from pyggml_adapt.runtime.session import Generation, Session, Timings
from pyggml_adapt.text import Tokenizer


class Tokenizers:
    """Tokenizers by the metadata that they are built from, so that tasks with equal vocabularies share one."""

    def __init__(self) -> None:
        self._built: dict[str, Tokenizer] = {}

    def of(self, metadata: Mapping[str, object]) -> Tokenizer:
        """Return the tokenizer that these metadata describe.  Raises: TokenizerError if there is none."""
        key = _digest({name: value for name, value in metadata.items() if name.startswith("tokenizer.")})
        if key not in self._built:
            self._built[key] = Tokenizer.from_metadata(metadata)
        return self._built[key]


def _digest(metadata: Mapping[str, object]) -> str:
    """Return a SHA-256 of metadata values, arrays included."""
    sha = hashlib.sha256()
    for key in sorted(metadata):
        value = metadata[key]
        sha.update(key.encode() + b"\0")
        sha.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


class TextSession(Session):
    """A session that takes and gives text."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], *parts: Any, **options: Any):
        """tokenizer: is asked for when text comes.  parts, options: Session's."""
        super().__init__(*parts, **options)
        self._tokenizer = tokenizer

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        parse_special: bool = False,
        **sampling: Any,
    ) -> TextGeneration:
        """Return an iterator over pieces of the text that follows `prompt`; sampling: fields of SamplerParams.

        prompt: text, or token ids.  Special tokens (BOS) are added to text at the session's start only.
        max_tokens: None for as many as fit.  parse_special: whether names of special tokens in the text mean these.
        Raises: ContextFullError at once if the prompt does not fit; ParameterError, TokenizerError, TokenError.
        """
        try:
            params = SamplerParams(**sampling)
        except TypeError:
            known = ", ".join(SamplerParams.__slots__)
            raise ParameterError(
                f"generate: one of {', '.join(sampling)} is not a parameter; known are {known}"
            ) from None
        tokenizer = self._tokenizer()
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, add_special=self.n_past == 0, parse_special=parse_special)
        ids = self.generate_ids(prompt, max_tokens=max_tokens, params=params, stop_ids=tokenizer.eog_ids)
        return TextGeneration(ids, tokenizer)

    def _breakers(self, params: SamplerParams) -> Breakers:
        return find_breakers(self._tokenizer(), tuple(params.dry_sequence_breakers))


class TextGeneration:
    """Iterate over pieces of generated text, each of whole characters; the other attributes are Generation's."""

    def __init__(self, ids: Generation, tokenizer: Tokenizer):
        self._ids = ids
        self._stream = tokenizer.stream()
        self._pieces = self._run()

    @property
    def finish_reason(self) -> str | None:
        """Return "stop", "length", or None before the end."""
        return self._ids.finish_reason

    @property
    def tokens(self) -> list[int]:
        """Return the token ids so far."""
        return self._ids.tokens

    @property
    def timings(self) -> Timings:
        """Return how long the tokens so far took."""
        return self._ids.timings

    def _run(self) -> Iterator[str]:
        for token in self._ids:
            piece = self._stream.feed(token)
            if piece:
                yield piece
        rest = self._stream.flush()
        if rest:
            yield rest

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)
