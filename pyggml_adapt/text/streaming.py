"""Streamed text: token by token to strings that never end within a character.

Source: Unicode 15.1, section 3.9, "U+FFFD Substitution of Maximal Subparts"
"""

from __future__ import annotations

import codecs
from collections.abc import Callable


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
