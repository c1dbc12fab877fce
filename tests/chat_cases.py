"""Conversations that chat templates are rendered with, here and by transformers (see text/make_chat_golden.py)."""

from __future__ import annotations

from typing import Any

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}  # what the special tokens' texts are in all of them
TODAY = (2025, 3, 14, 15, 9, 26)  # what strftime_now() tells

SYSTEM = {"role": "system", "content": "You are terse.\nAnswer in one line."}
HELLO = {"role": "user", "content": 'Hello <there> & "friends"'}
TURNS = [
    HELLO,
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "  What is 2 + 2?  \n"},
]
THOUGHT = [
    HELLO,
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHi.", "reasoning_content": "A greeting."},
    {"role": "user", "content": "And now?"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather – wie ist's?",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city's name"},
                "days": {"type": "integer", "enum": [1, 2, 3], "default": 1},
            },
            "required": ["city"],
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Tell the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": ["string", "null"]}}},
    },
}


def call(name: str, arguments: object) -> dict[str, Any]:
    """Return a call of a tool as an assistant's message has it."""
    return {"id": "abcdefgh1", "type": "function", "function": {"name": name, "arguments": arguments}}


ASKED = [{"role": "user", "content": "Weather in Zürich?"}]
CALLED = [
    *ASKED,
    {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "Zürich", "days": 2})]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "name": "get_weather", "content": '{"sky": "grey", "°C": 4.5}'},
]
ANSWERED = [*CALLED, {"role": "assistant", "content": "Grey, 4.5 °C."}, {"role": "user", "content": "Thanks!"}]
AS_TEXT = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [call("get_weather", '{"city": "Zürich"}')]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "name": "get_weather", "content": "grey"},
]
ODD = "e\u0301 世界 👩\u200d👩\u200d👧 \u200fשלום\u200f \u2028 <|im_end|> </s> {{ 7 * 7 }} \t\x07"
UNICODE = [{"role": "user", "content": ODD}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
DOCUMENTS = [{"title": "A", "text": "First."}, {"title": "B", "text": "Zweites – ja."}]

CASES: dict[str, dict[str, Any]] = {
    "user": {"messages": [HELLO]},
    "user, no reply": {"messages": [HELLO], "add_generation_prompt": False},
    "system": {"messages": [SYSTEM, HELLO]},
    "turns": {"messages": [SYSTEM, *TURNS]},
    "reply last": {"messages": [SYSTEM, *TURNS[:2]], "add_generation_prompt": False},
    "thought": {"messages": THOUGHT},
    "thinking on": {"messages": THOUGHT, "enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
    "thinking off": {"messages": THOUGHT, "enable_thinking": False, "thinking": False, "reasoning_effort": "low"},
    "tools": {"messages": [SYSTEM, *ASKED], "tools": [WEATHER, TIME]},
    "tool": {"messages": ASKED, "tools": [WEATHER]},
    "tool result": {"messages": [SYSTEM, *CALLED], "tools": [WEATHER]},
    "tool answered": {"messages": ANSWERED, "tools": [WEATHER]},
    "arguments as text": {"messages": AS_TEXT, "tools": [WEATHER]},
    "unicode": {"messages": UNICODE},
    "parts": {"messages": PARTS},
    "documents": {"messages": [HELLO], "documents": DOCUMENTS},
    "roles": {"messages": [HELLO, HELLO, {"role": "narrator", "content": "x"}]},
}
