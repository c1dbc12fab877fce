"""Chats: what rendering a template takes, the time to the first token of a reply, and what text costs a token."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from engines import Llama, Ours, llama_cpp
from sampling import LlamaChain
from speed import Timed, compute_call_us, seconds
from text import make_chat

from pyggml_adapt.engine.sampling import SamplerParams
from pyggml_adapt.text.chat import CHATML, Renderer

N_CTX = 2048
PAUSE = 0.05  # seconds before a turn: nobody asks sooner, and the threads of the last graph spin for some ms
N_GENERATED = 64  # tokens of a generation whose costs are looked at
WAYS: dict[str, dict[str, Any]] = {
    "text, greedy": {"temperature": 0.0},
    "text, default chain": {"seed": 1},
    "text, default chain, 4 stop strings": {"seed": 1, "stop": ["\n\n", "</s>", "User:", "###"]},
    "text, default chain, penalties, DRY": {"seed": 1, "repeat_penalty": 1.1, "dry_multiplier": 0.8},
}
Chat = list[dict[str, Any]]

TEMPLATES = {
    "ChatML": CHATML,
    "headers, as Llama 3 has them": """\
{{- bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}{% endif %}
{%- set today = strftime_now('%d %B %Y') %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' ~ today ~ '\\n' ~ system ~ '<|eot_id|>' }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}
    {%- endif %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "tools": """\
{%- macro shown(tool) %}{{ {'name': tool.function.name, 'takes': tool.function.parameters.properties} | tojson }}
{%- endmacro %}
{%- if tools %}{{ '<|im_start|>system\\nTools, one a line:\\n' }}
    {%- for tool in tools %}{{ shown(tool) ~ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<call>' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson ~ '</call>' }}
    {%- endfor %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
}


def _tools(n: int) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}}
    return [{"type": "function", "function": {"name": f"tool_{i}", "parameters": parameters}} for i in range(n)]


def rendering(n_messages: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return ms by template: of the first rendering, for which a process is started, of the next, and of later ones."""
    messages = make_chat(n_messages, 200, seed=5)
    call = {"type": "function", "function": {"name": "tool_1", "arguments": {"place": "here", "days": 3}}}
    found = {}
    for name, source in TEMPLATES.items():
        given = {"messages": messages, "bos_token": "<s>", "add_generation_prompt": True, "tools": None}
        if name == "tools":
            given |= {"tools": _tools(8), "messages": [*messages[:-1], {"role": "assistant", "tool_calls": [call]}]}
        renderer = Renderer()
        render = partial(renderer.render, source, given)
        ms = [1e3 * seconds(render) for _ in range(rounds)]
        renderer.close()
        found[name] = {"first": ms[0], "second": ms[1], "later": median(ms[2:])}
    return found


class _Ours:
    """A session that chats."""

    name = "pyggml_adapt"

    def __init__(self, path: str):
        self._engine = Ours(path, n_ctx=N_CTX)
        self.host = self._engine.host

    def reset(self) -> None:
        """Forget all tokens."""
        self._engine.reset()

    def first_token(self, messages: Chat) -> tuple[list[int], float]:
        """Return the conversation's tokens, after the reply's first, and the ms that their evaluation took."""
        reply = self._engine.session.chat(messages, max_tokens=1, template=CHATML, seed=1)
        for _ in reply:
            pass
        return self._engine.session.tokens[:-1], reply.timings.prompt_ms

    def close(self) -> None:
        """Free everything."""
        self._engine.close()


class _Llama:
    """llama.cpp's functions in the order in which its chat program calls them; what is cached is used as ours is."""

    name = "llama.cpp, mmap"

    def __init__(self, path: str):
        self._engine = Llama(path, n_ctx=N_CTX).start()
        self._engine.eval([300])
        self._vocab = llama_cpp.llama_model_get_vocab(self._engine.model)
        self._memory = llama_cpp.llama_get_memory(self._engine.ctx)
        self._chain = LlamaChain(self._engine, SamplerParams())
        self._tokens: list[int] = []

    def reset(self) -> None:
        """Forget all tokens."""
        self._engine.reset()
        self._tokens = []

    def first_token(self, messages: Chat) -> tuple[list[int], float]:
        """Return the conversation's tokens, after the reply's first, and the ms that their evaluation took."""
        ids = self._tokenize(self._render(messages))
        shared = next((i for i, (a, b) in enumerate(zip(self._tokens, ids, strict=False)) if a != b), len(self._tokens))
        shared = min(shared, len(ids) - 1)
        llama_cpp.llama_memory_seq_rm(self._memory, 0, shared, -1)
        taken = seconds(lambda: self._engine.eval(ids[shared:]))
        self._tokens = ids
        self._chain.sample()
        return ids, taken * 1e3

    def _render(self, messages: Chat) -> bytes:
        kept = [(message["role"].encode(), message["content"].encode()) for message in messages]
        chat = (llama_cpp.llama_chat_message * len(kept))(*kept)
        out = ctypes.create_string_buffer(1 << 16)
        n = llama_cpp.llama_chat_apply_template(b"chatml", chat, len(kept), True, out, len(out))
        return out.raw[:n]

    def _tokenize(self, text: bytes) -> list[int]:
        ids = (llama_cpp.llama_token * (len(text) + 16))()
        return ids[: llama_cpp.llama_tokenize(self._vocab, text, len(text), ids, len(ids), True, True)]

    def close(self) -> None:
        """Free everything."""
        self._chain.close()
        self._engine.close()


def _conversation(count: Callable[[Chat], int], n_tokens: int) -> Chat:
    """Return messages that end with the user's, which `count` says are about n_tokens tokens."""
    n_bytes = 16
    while count(make_chat(2, n_bytes, seed=9)) < n_tokens:
        n_bytes += max(n_tokens // 50, 1)
    return make_chat(2, n_bytes, seed=9)


def _turns(engines: Sequence[_Ours | _Llama], turns: dict[str, Chat], rounds: int) -> tuple[dict[str, Any], bool]:
    """Return each round's ms by turn and engine, which take turns, and whether all saw the same tokens.

    Whole, and beside the evaluation of the prompt.
    """
    ms = {turn: {key: {engine.name: [] for engine in engines} for key in ("whole", "beside")} for turn in turns}
    seen: dict[str, list[tuple[list[int], float]]] = {turn: [] for turn in turns}
    for i in range(rounds + 1):
        for engine in engines[:: 1 - i % 2 * 2]:
            engine.reset()
            for turn, messages in turns.items():
                time.sleep(PAUSE)
                whole = 1e3 * seconds(lambda: seen[turn].append(engine.first_token(messages)))  # noqa: B023
                if i:  # the first round is to get warm
                    ms[turn]["whole"][engine.name].append(whole)
                    ms[turn]["beside"][engine.name].append(whole - seen[turn][-1][1])
    return ms, all(tokens == each[0][0] for each in seen.values() for tokens, _ in each)


def first_token(path: str, rounds: int) -> dict[str, Any]:
    """Return by prompt the tokens that two turns add, each round's ms to a reply's first token, and if all is equal."""
    engines = [_Ours(path), _Llama(path)]

    def count(messages: Chat) -> int:
        return len(engines[0].host._text(None).prompt(messages, template=CHATML))

    found: dict[str, Any] = {}
    for name, n_tokens in (("short", 60), ("long", 1000)):
        first = _conversation(count, n_tokens)
        second = [*first, {"role": "assistant", "content": "So it is."}, *make_chat(2, 60, seed=11)[1:]]
        ms, equal = _turns(engines, {"first": first, "second": second}, rounds)
        n_added = {"first": count(first), "second": count(second) - count(first)}
        found[name] = {"n_tokens": n_added, "ms": ms, "equal_tokens": equal}
    for engine in engines:
        engine.close()
    return found


def around(path: str, rounds: int) -> dict[str, Any]:
    """Return the median microseconds a token outside ggml: of eval() alone, and of text generated in several ways."""
    ours = Ours(path)
    session, prompt = ours.session, list(range(300, 364))
    ways = {name: partial(session.generate, prompt, max_tokens=N_GENERATED, **given) for name, given in WAYS.items()}
    ours.eval(prompt)
    ours.eval(prompt[:1])
    (program,) = [p for p in ours.host._engine._programs.values() if p.inputs.n_tokens == 1]
    timed = program.graph = Timed(program.graph)
    found: dict[str, list[float]] = {"eval() alone": [], **{name: [] for name in ways}}

    def outside(call: Callable[[], object]) -> float:
        timed.seconds.clear()
        whole = seconds(call)
        return (whole - sum(timed.seconds)) / len(timed.seconds) * 1e6

    for i in range(rounds + 1):
        ours.reset()
        ours.eval(prompt)
        tokens = prompt[:N_GENERATED]
        us = [outside(lambda: [ours.eval([token]) for token in tokens])]  # noqa: B023
        for way in ways.values():
            ours.reset()
            pieces = way()
            next(pieces)
            us.append(outside(lambda: list(pieces)))  # noqa: B023
        for name, each in zip(found, us, strict=True):
            found[name] += [each] * (i > 0)  # the first round is to get warm
    call_us = compute_call_us()
    n_vocab = session.n_vocab
    ours.close()
    return {"n_vocab": n_vocab, "us": {name: median(each) + call_us for name, each in found.items()}}
