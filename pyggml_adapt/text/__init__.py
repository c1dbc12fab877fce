"""Text: strings to token ids and back, and conversations to strings."""

from pyggml_adapt.text.chat import ChatTemplate, Renderer
from pyggml_adapt.text.streaming import StopStrings, StreamDecoder
from pyggml_adapt.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Renderer", "StopStrings", "StreamDecoder", "Tokenizer"]
