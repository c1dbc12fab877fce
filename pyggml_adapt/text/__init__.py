"""Text: strings to token ids and back."""

from pyggml_adapt.text.streaming import StreamDecoder
from pyggml_adapt.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
