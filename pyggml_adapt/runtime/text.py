"""The parts of a host that deal in text: sessions, generations, and the tokenizers and templates of tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pyggml_adapt.errors import BusyError, ContextFullError, ParameterError
from pyggml_adapt.runtime.sampling import Breakers, SamplerParams, find_breakers
from pyggml_adapt.runtime.session import Generation, Session, Timings
from pyggml_adapt.text import ChatTemplate, Renderer, StopStrings, Tokenizer
from pyggml_adapt.text.chat import KEY as CHAT_TEMPLATE


class TaskText:
    """How one task reads and writes: its tokenizer, its chat template, and its longest context."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, renderer: Renderer, n_ctx_train: int):
        self.tokenizer, self.template, self.n_ctx_train = tokenizer, template, n_ctx_train
        self._renderer = renderer

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text that asks for the next message of a conversation.  Raises: as ChatTemplate.render()."""
        return self.template.render(
            self._renderer, messages, tools=tools, documents=documents, template=template, variables=template_kwargs
        )

    def prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the token ids of render(); BOS comes first where the model wants it, and once.

        Raises: as render(); ParameterError if the text is empty.
        """
        ids = self.tokenizer.encode(self.render(messages, **options), add_special=False, parse_special=True)
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if not ids:
            raise ParameterError("the chat template makes no text of these messages")
        return ids


class Texts:
    """The texts of tasks by the metadata that they are made from, so that equal vocabularies share a tokenizer."""

    def __init__(self) -> None:
        self._tokenizers: dict[str, Tokenizer] = {}
        self._renderer = Renderer()

    def of(self, metadata: Mapping[str, object], n_ctx_train: int) -> TaskText:
        """Return what these metadata describe.  Raises: TokenizerError if there is no tokenizer."""
        keys = [key for key in metadata if key.startswith("tokenizer.") and not key.startswith(CHAT_TEMPLATE)]
        key = _digest({key: metadata[key] for key in keys})
        if key not in self._tokenizers:
            self._tokenizers[key] = Tokenizer.from_metadata(metadata)
        tokenizer = self._tokenizers[key]
        return TaskText(tokenizer, ChatTemplate.from_metadata(metadata, tokenizer), self._renderer, n_ctx_train)

    def close(self) -> None:
        """End the process that renders templates."""
        self._renderer.close()


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

    def __init__(self, text: Callable[[], TaskText], *parts: Any, **options: Any):
        """text: is asked for when text comes.  parts, options: Session's."""
        super().__init__(*parts, **options)
        self._text = text

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        stop: Sequence[str] = (),
        parse_special: bool = False,
        **sampling: Any,
    ) -> TextGeneration:
        """Return an iterator over pieces of the text that follows `prompt`; sampling: fields of SamplerParams.

        prompt: text, or token ids.  Special tokens (BOS) are added to text at the session's start only.
        max_tokens: None for as many as fit.  stop: strings that end the text before them, also where they begin or end
        within a token.  parse_special: whether names of special tokens in the text mean these.
        Raises: ContextFullError at once if the prompt does not fit; ParameterError, TokenizerError, TokenError.
        """
        params, stops = sampler_params(sampling), stop_strings(stop)
        tokenizer = self._tokenizer()
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, add_special=self.n_past == 0, parse_special=parse_special)
        ids = self.generate_ids(prompt, max_tokens=max_tokens, params=params, stop_ids=tokenizer.eog_ids)
        return TextGeneration(ids, tokenizer, stops)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> TextGeneration:
        """Return an iterator over pieces of the reply to a whole conversation, each message with role and content.

        Of the session's tokens those stay that the conversation begins with too, and only the rest is evaluated.
        max_tokens: None for as many as fit.  stop: as in generate().  options: as in Host.chat(), but task and n_ctx.
        Raises: ContextFullError, ParameterError, TokenizerError; BusyError when it is iterated over, if the session was
        used in between.
        """
        form, sampling = divide(options)
        params, stops = sampler_params(sampling), stop_strings(stop)
        text = self._text()
        ids = text.prompt(messages, **form)
        check_context(ids, self.n_ctx)
        shared = next((i for i, (a, b) in enumerate(zip(self._tokens, ids, strict=False)) if a != b), self.n_past)
        self.rewind(min(shared, len(ids) - 1))  # the last one is evaluated again: its logits are needed
        kept = self.tokens
        stop_ids = text.tokenizer.eog_ids
        reply = self.generate_ids(ids[len(kept) :], max_tokens=max_tokens, params=params, stop_ids=stop_ids)
        return TextGeneration(reply, text.tokenizer, stops, follows=kept)

    def _tokenizer(self) -> Tokenizer:
        return self._text().tokenizer

    def _breakers(self, params: SamplerParams) -> Breakers:
        return find_breakers(self._tokenizer(), tuple(params.dry_sequence_breakers))


def sampler_params(sampling: Mapping[str, Any]) -> SamplerParams:
    """Return the parameters with these fields.  Raises: ParameterError."""
    try:
        return SamplerParams(**sampling)
    except TypeError:
        known = ", ".join(SamplerParams.__slots__)
        raise ParameterError(f"generate: one of {', '.join(sampling)} is not a parameter; known are {known}") from None


def stop_strings(stop: Sequence[str]) -> StopStrings:
    """Return what finds these strings.  Raises: ParameterError unless they are a list of texts, none of them empty."""
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
        raise ParameterError(f"stop = {stop!r} is not a list of texts, none of them empty, as ['\\n\\n']")
    return StopStrings(stop)


def divide(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of TaskText.render(), and the others."""
    names = ("tools", "documents", "template", "template_kwargs")
    form = {name: options[name] for name in names if name in options}
    return form, {name: options[name] for name in options if name not in form}


def check_context(ids: Sequence[int], n_ctx: int) -> None:
    """Raise ContextFullError unless a conversation fits."""
    if len(ids) > n_ctx:
        raise ContextFullError(
            f"the conversation takes {len(ids)} tokens, more than the context of {n_ctx}: shorten it, or use a larger "
            f"n_ctx"
        )


class TextGeneration:
    """Iterate over pieces of generated text, each of whole characters; the other attributes are Generation's."""

    def __init__(self, ids: Generation, tokenizer: Tokenizer, stops: StopStrings, follows: list[int] | None = None):
        """follows: the tokens that the session must have when it begins; None for any."""
        self._ids, self._stops, self._follows = ids, stops, follows
        self._stream = tokenizer.stream()
        self._pieces = self._run()

    @property
    def finish_reason(self) -> str | None:
        """Return "stop", "length", or None before the end."""
        return "stop" if self._stops.found else self._ids.finish_reason

    @property
    def tokens(self) -> list[int]:
        """Return the token ids so far."""
        return self._ids.tokens

    @property
    def timings(self) -> Timings:
        """Return how long the tokens so far took."""
        return self._ids.timings

    def _run(self) -> Iterator[str]:
        if self._follows is not None and self._ids.session.tokens != self._follows:
            raise BusyError("this reply cannot begin: its session was used since the conversation was given")
        for token in self._ids:
            if piece := self._stops.feed(self._stream.feed(token)):
                yield piece
            if self._stops.found:
                return
        if rest := self._stops.feed(self._stream.flush()) + self._stops.flush():
            yield rest

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)
