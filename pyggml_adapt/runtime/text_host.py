"""TextHost: what a host does with text; its tasks, weights and sessions are Host's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from pyggml_adapt.errors import TokenizerError
from pyggml_adapt.runtime.parameters import count
from pyggml_adapt.runtime.text import TaskText, TextSession, check_context, divide, sampler_params, stop_strings
from pyggml_adapt.text import Tokenizer


class TextHost(ABC):
    """Text in, text out, by whole calls."""

    @abstractmethod
    def session(self, task: str | None = None, *, n_ctx: int | None = None, forks: Collection[str] = ()) -> TextSession:
        """Return a new session with a task."""

    @abstractmethod
    def _name(self, task: str | None) -> str:
        """Return the task's name, the active one's for None."""

    @abstractmethod
    def _text(self, task: str | None) -> TaskText:
        """Return how a task reads and writes."""

    def tokenize(
        self, text: str, *, task: str | None = None, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Return the token ids of a text.

        Raises: TokenizerError if the model has no tokenizer that is supported.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"only text can be tokenized, not {type(text).__name__}")
        return self.tokenizer(task).encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int], *, task: str | None = None) -> str:
        """Return the text of token ids.

        Raises: TokenizerError, TokenError.
        """
        return self.tokenizer(task).decode(ids)

    def tokenizer(self, task: str | None = None) -> Tokenizer:
        """Return a task's tokenizer.  Raises: TokenizerError if there is none that is supported."""
        return self._text(task).tokenizer

    def generate(
        self,
        prompt: str,
        *,
        task: str | None = None,
        max_tokens: int | None = 128,
        n_ctx: int | None = None,
        stop: Sequence[str] = (),
        parse_special: bool = False,
        **sampling: Any,
    ) -> str:
        """Return the text that follows `prompt`; sampling: fields of SamplerParams.

        n_ctx: by default what prompt and max_tokens need.  The rest as in TextSession.generate().
        Raises: as session() and TextSession.generate().
        """
        task = self._name(task)
        ids = self.tokenize(prompt, task=task, parse_special=parse_special)
        if n_ctx is None and max_tokens is not None:
            n_ctx = max(len(ids) + max(count("max_tokens", max_tokens, least=0), 1), 1)
        with self.session(task, n_ctx=n_ctx) as session:
            return "".join(session.generate(ids, max_tokens=max_tokens, stop=stop, **sampling))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        task: str | None = None,
        max_tokens: int | None = 1024,
        n_ctx: int | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> str:
        """Return the reply to a conversation, a list of messages with role and content.

        The text that the model sees comes from its chat template, an adaptor's own before the foundation's; without
        one, ChatML's if the vocabulary has its tokens.
        max_tokens: None for as many as fit.  n_ctx: by default what the conversation and max_tokens need, but not more
        than the model was trained on.  stop: as in TextSession.generate().
        options: tools, documents: lists of dictionaries that the template knows what to do with.  template: the name of
        one of the model's, or one in Jinja.  template_kwargs: what a template reads beside, as {"enable_thinking":
        False}.  The others: fields of SamplerParams.
        Raises: TokenizerError if there is no template, or one that fails; ParameterError if it refuses the messages; as
        session() and TextSession.generate().
        """
        return "".join(self.stream_chat(messages, task=task, max_tokens=max_tokens, n_ctx=n_ctx, stop=stop, **options))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        task: str | None = None,
        max_tokens: int | None = 1024,
        n_ctx: int | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Iterator[str]:
        """Return an iterator over pieces of the reply that chat() returns, each of whole characters.

        Raises: as chat(), at once.
        """
        form, sampling = divide(options)
        sampler_params(sampling)
        stop_strings(stop)
        task = self._name(task)
        text = self._text(task)
        ids = text.prompt(messages, **form)
        n_most = text.n_ctx_train if max_tokens is None else len(ids) + count("max_tokens", max_tokens, least=0)
        if n_ctx is None:
            n_ctx = max(min(n_most, text.n_ctx_train), 1)
        check_context(ids, count("n_ctx", n_ctx))
        return _reply(lambda: self.session(task, n_ctx=n_ctx), ids, max_tokens, {**sampling, "stop": stop})


def _reply(
    open_session: Callable[[], TextSession], ids: list[int], max_tokens: int | None, options: Mapping[str, Any]
) -> Iterator[str]:
    """Yield pieces of what follows `ids` in a session that lives as long."""
    with open_session() as session:
        yield from session.generate(ids, max_tokens=max_tokens, **options)
