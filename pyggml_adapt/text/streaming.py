"""Streamed text: token by token to strings that never end within a character.

Source: Unicode 15.1, section 3.9, "U+FFFD Substitution of Maximal Subparts"
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class StreamDecoder:
    """Turn tokens into text as they come; bytes of an unfinished character wait for the next token."""

    def __init__(self, token_to_piece: Callable[[int], bytes]):
        self._token_to_piece = token_to_piece
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the text that `token` completes; control tokens give none."""
        return self._decoder.decode(self._token_to_piece(token))

    def flush(self) -> str:
        """Return what is left, U+FFFD for an unfinished character, and start anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopStrings:
    """Ends streamed text where the first of some strings begins; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False  # whether the text has ended

    def feed(self, piece: str) -> str:
        """Return the text that is known to come before any stop string."""
        text = self._held + piece
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        self.found = bool(starts)
        end = min(starts) if starts else len(text) - self._n_begun(text)
        self._held = "" if starts else text[end:]
        return text[:end]

    def _n_begun(self, text: str) -> int:
        """Return how many characters at the end of `text` a stop string begins with, at most."""
        begun = (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        return max(begun, default=0)

    def flush(self) -> str:
        """Return what is held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held
