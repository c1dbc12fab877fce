"""TextHost: what a host does with text; its tasks, weights and sessions are Host's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pyggml_adapt.engine.parameters import count
from pyggml_adapt.errors import ParameterError, TokenError, TokenizerError
from pyggml_adapt.host.completion import Completion, complete
from pyggml_adapt.host.embeddings import check_pooling, check_texts, embed
from pyggml_adapt.host.text import TaskText, TextSession, check_context, divide, sampler_params, stop_strings
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
        sampler_params(sampling)  # there are parameters of completions() among what is none here
        (found,) = self.completions(
            prompt,
            task=task,
            max_tokens=max_tokens,
            n_ctx=n_ctx,
            stop=stop,
            parse_special=parse_special,
            **sampling,
        )
        return found.text

    def completions(
        self,
        prompt: str | Sequence[int],
        *,
        task: str | None = None,
        n: int = 1,
        echo: bool = False,
        logprobs: int | None = None,
        max_tokens: int | None = 128,
        n_ctx: int | None = None,
        stop: Sequence[str] = (),
        parse_special: bool = False,
        **sampling: Any,
    ) -> tuple[Completion, ...]:
        """Return n texts that follow `prompt`, a text or token ids, which is evaluated once.

        If `seed` is given, completion i draws with seed + i, modulo 2**64, and is what a call with that seed and n = 1
        returns.  There are two KV caches at a time, at most.
        echo: put the prompt's text and tokens first; with max_tokens = 0 nothing else comes.
        logprobs: of each token, and of so many most probable ones, up to 100, under the model's own distribution:
        before biases, penalties and temperature.  With echo those of the prompt's tokens come first, none of the first.
        n_ctx: by default what prompt and max_tokens need.  The rest as in TextSession.generate().
        Raises: as session() and TextSession.generate().
        """
        task = self._name(task)
        ids = self.tokenize(prompt, task=task, parse_special=parse_special) if isinstance(prompt, str) else prompt
        if not isinstance(ids, (Sequence, np.ndarray)):
            raise ParameterError(f"prompt must be a text or a list of token ids, not {type(prompt).__name__}")
        if isinstance(ids, np.ndarray) and ids.ndim != 1:
            raise TokenError("token ids must be a flat sequence")
        if n_ctx is None and max_tokens is not None:
            n_ctx = max(len(ids) + max(count("max_tokens", max_tokens, least=0), 1), 1)
        text = None
        if echo:
            text = prompt if isinstance(prompt, str) else self.detokenize(ids, task=task)
        with self.session(task, n_ctx=n_ctx) as session:
            return complete(
                session, ids, n=n, echo=text, logprobs=logprobs, sampling=sampling, max_tokens=max_tokens, stop=stop
            )

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        task: str | None = None,
        pooling: str | None = None,
        normalize: bool = True,
        n_ctx: int | None = None,
        parse_special: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """Return the embedding of a text, F32 [n_embd]; of a list of texts, [n, n_embd].

        It is made of the last hidden states, normed, of the text's tokens, special ones (BOS) included.
        pooling: "mean" of all tokens, "cls" for the first token, "last" for the last, or "none" for one vector of each
        token: F32 [n_tokens, n_embd], of a list of texts a list of these.  By default as the model's metadata say
        (pooling_type), else "mean".  normalize: divide each vector by its Euclidean length.
        n_ctx: by default what the longest text needs.
        Raises: TokenError for a text without tokens, ContextFullError for one that does not fit, ParameterError; as
        session() and tokenize().
        """
        task = self._name(task)
        pooling = check_pooling(pooling, self._text(task).pooling)
        each = [texts] if isinstance(texts, str) else texts
        if not isinstance(each, Sequence) or isinstance(each, bytes):
            raise ParameterError(f"texts must be a text or a list of texts, not {type(texts).__name__}")
        ids = [self.tokenize(text, task=task, parse_special=parse_special) for text in each]
        n_ctx = max([1, *map(len, ids)]) if n_ctx is None else count("n_ctx", n_ctx)
        check_texts(ids, n_ctx)
        with self.session(task, n_ctx=n_ctx) as session:
            found = [embed(session, tokens, pooling, normalize=normalize) for tokens in ids]
            if isinstance(texts, str):
                return found[0]
            return found if pooling == "none" else np.array(found).reshape(len(found), session.n_embd)

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
        params = sampler_params(sampling)
        stop_strings(stop)
        task = self._name(task)
        text = self._text(task)
        params.check_vocabulary(text.tokenizer.n_vocab)
        if params.constraint is not None:
            text.constraint(*params.constraint)
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
