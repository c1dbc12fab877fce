"""The parts of a host that deal in text: sessions, generations, and the tokenizers and templates of tasks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pyggml_adapt.engine.logprobs import TokenLogprob
from pyggml_adapt.engine.sampling import Breakers, Constraint, SamplerParams, find_breakers
from pyggml_adapt.errors import ContextFullError, ParameterError, TokenError
from pyggml_adapt.host.embeddings import pooling_type
from pyggml_adapt.host.generation import Generation, Timings
from pyggml_adapt.host.session import Session
from pyggml_adapt.text import ChatTemplate, Renderer, StopStrings, Tokenizer
from pyggml_adapt.text.chat import KEY as CHAT_TEMPLATE

NO_TOKENS = "the prompt has no tokens: give some text, or token ids, to go on from"


class TaskText:
    """How one task reads and writes: its tokenizer, its chat template, its longest context, and its pooling_type()."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, renderer: Renderer, n_ctx_train: int, pooling: object
    ):
        self.tokenizer, self.template, self.n_ctx_train, self.pooling = tokenizer, template, n_ctx_train, pooling
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

    def constraint(self, name: str, text: str) -> Constraint:
        """Return what the output must meet, see SamplerParams.constraint.  Raises: ParameterError if nothing does."""
        from pyggml_adapt.text import constraint  # here, since llguidance is slow to import

        return constraint.Constraint(self.tokenizer, name, text)


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
        template = ChatTemplate.from_metadata(metadata, tokenizer)
        return TaskText(tokenizer, template, self._renderer, n_ctx_train, pooling_type(metadata))

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
        logprobs: int | None = None,
        score_prompt: bool = False,
        **sampling: Any,
    ) -> TextGeneration:
        """Return an iterator over pieces of the text that follows `prompt`; sampling: fields of SamplerParams.

        prompt: text, or token ids.  Special tokens (BOS) are added to text at the session's start only.
        max_tokens: None for as many as fit.  stop: strings that end the text before them, also where they begin or end
        within a token.  parse_special: whether names of special tokens in the text mean these.
        logprobs: keep the log-probability of each token, and so many most probable ones, up to 100, in
        TextGeneration.logprobs; score_prompt: and for the prompt's tokens in TextGeneration.prompt_logprobs.
        Raises: ContextFullError at once if the prompt does not fit; ParameterError, TokenizerError, TokenError.
        """
        params, stops = sampler_params(sampling), stop_strings(stop)
        ids = self._prompt(prompt, add_special=self.n_past == 0, parse_special=parse_special, may_be_empty=True)
        options: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs, "score_prompt": score_prompt}
        return self._generate(ids, stops, params=params, **options)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        stop: Sequence[str] = (),
        parse_special: bool = False,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> TextGeneration:
        """Return an iterator over pieces of the text that follows `prompt`, which stands for the whole session.

        Of the session's tokens those stay that the prompt begins with too, and only the rest is evaluated: see reuse().
        Nothing is forgotten before the iteration begins.  prompt: text, to which special tokens (BOS) are added, or
        token ids.  The rest as in generate().
        Raises: as generate().
        """
        params, stops = sampler_params(sampling), stop_strings(stop)
        ids = self._prompt(prompt, parse_special=parse_special)
        return self._generate(ids, stops, params=params, max_tokens=max_tokens, logprobs=logprobs, whole=True)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        **options: Any,
    ) -> TextGeneration:
        """Return an iterator over pieces of the reply to a whole conversation, each message with role and content.

        Of the session's tokens those stay that the conversation begins with too, and only the rest is evaluated: see
        reuse().  Nothing is forgotten before the iteration begins.
        max_tokens: None for as many as fit.  stop, logprobs: as in generate().  options: as in Host.chat(), but task
        and n_ctx.
        Raises: ContextFullError, ParameterError, TokenizerError.
        """
        form, sampling = divide(options)
        params, stops = sampler_params(sampling), stop_strings(stop)
        ids = self._text().prompt(messages, **form)
        check_context(ids, self.n_ctx)
        return self._generate(ids, stops, params=params, max_tokens=max_tokens, logprobs=logprobs, whole=True)

    def _prompt(
        self,
        prompt: str | Sequence[int],
        *,
        parse_special: bool,
        add_special: bool = True,
        may_be_empty: bool = False,
    ) -> Sequence[int]:
        """Return the token ids of a prompt, which may be given.  may_be_empty: if the session can go on by itself.

        Raises: TokenError if there are none; TokenizerError.
        """
        ids = prompt
        if isinstance(ids, str):
            ids = self._tokenizer().encode(ids, add_special=add_special, parse_special=parse_special)
        if isinstance(ids, Sequence) and not ids and not (may_be_empty and self._can_go_on):
            raise TokenError(NO_TOKENS)
        return ids

    def _generate(self, ids: Sequence[int], stops: StopStrings, **options: Any) -> TextGeneration:
        """Return what follows token ids as text.  options: of generate_ids()."""
        tokenizer = self._tokenizer()
        piece_of = functools.partial(tokenizer.token_to_piece, special=True)
        generation = self.generate_ids(ids, stop_ids=tokenizer.eog_ids, piece_of=piece_of, **options)
        return TextGeneration(generation, tokenizer, stops)

    def _tokenizer(self) -> Tokenizer:
        return self._text().tokenizer

    def _breakers(self, params: SamplerParams) -> Breakers:
        return find_breakers(self._tokenizer(), tuple(params.dry_sequence_breakers))

    def _constraint(self, name: str, text: str) -> Constraint:
        return self._text().constraint(name, text)


def sampler_params(sampling: Mapping[str, Any]) -> SamplerParams:
    """Return the parameters with these fields.  Raises: ParameterError."""
    for name in sampling:
        if name not in SamplerParams.__slots__:
            known = ", ".join(SamplerParams.__slots__)
            raise ParameterError(f"{name} is not a parameter here; of sampling there are {known}")
    return SamplerParams(**sampling)


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
    """Iterate over pieces of generated text, each of whole characters; the other attributes are Generation's.

    `tokens` may be ahead of the text: an unfinished character waits for its end, and what may begin a stop string is
    held back.  At the end they include those that a stop string cut off.  `logprobs` has one element for each of them.
    """

    def __init__(self, ids: Generation, tokenizer: Tokenizer, stops: StopStrings):
        self._ids, self._stops = ids, stops
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

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Return the log-probabilities of the token ids so far; None if they were not asked for."""
        return self._ids.logprobs

    @property
    def prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Return the log-probabilities of the prompt's tokens; None if not asked for, or not begun."""
        return self._ids.prompt_logprobs

    def start(self) -> None:
        """Evaluate the prompt now: see Generation.start()."""
        self._ids.start()

    def _run(self) -> Iterator[str]:
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
