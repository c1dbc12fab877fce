"""Text that is made here, the same on every run: prose, code, Chinese and Japanese, emoji and white space; and chats.

How often words and characters come follows Zipf's law, so that a tokenizer that remembers words meets old and new ones
as it would elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, product
from typing import Any

_COMMON = str.split(
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many must before back see through way where get much go well your know should "
    "down work year because come people just say each those take day good how long little use water house small night"
)
_STARTS = str.split(
    "act bel cor dan ear fen gar hol ind jus kin lam mor nav ost par quen ros sal tem und ver wil yar zel"
)
_MIDDLES = str.split("a e i o u an er in or us ati ent ili omo ura")
_ENDS = ["", *str.split("s ed ing er ly tion ness ment able ful ist al ity less ship")]
_SIGNS = [
    "🙂", "🚀", "👍🏽", "👨‍👩‍👧", "🇩🇪", "1️⃣", "❤️", "…", "→", "é", "e\u0301", "ß", "Привет", "مرحبا", "नमस्ते", "안녕",
]  # fmt: skip
_SPACES = [" ", "  ", "    ", " " * 16, "\n", "\n\n", "\t", "\t\t", "\r\n", "\u00a0", "\u3000"]

Style = Callable[[random.Random], str]


class _Zipf:
    """Items, of which the n-th comes with a weight of 1/n."""

    def __init__(self, items: Sequence[str]):
        self._items = items
        self._weights = list(accumulate(1 / n for n in range(1, len(items) + 1)))

    def draw(self, rng: random.Random, n: int) -> list[str]:
        """Return n of them."""
        return rng.choices(self._items, cum_weights=self._weights, k=n)


def _shuffled(items: Sequence[str]) -> list[str]:
    return random.Random(1).sample(items, len(items))


@cache
def _words() -> _Zipf:
    made = ["".join(parts) for parts in product(_STARTS, _MIDDLES, [*"bdlmnrt"], _ENDS)]
    return _Zipf([*_COMMON, *_shuffled(made)])


@cache
def _characters() -> _Zipf:
    return _Zipf(_shuffled([chr(code) for code in range(0x4E00, 0x5E00)]))


def _prose(rng: random.Random) -> str:
    words = _words().draw(rng, rng.randint(5, 25))
    for i in range(len(words)):
        kind = rng.random()
        if kind < 0.06:
            words[i] += ","
        elif kind < 0.08:
            words[i] = str(rng.randrange(10 ** rng.randint(1, 5)))
        elif kind < 0.1:
            words[i] = rng.choice(("it's", "don't", "we'll", "I've", words[i].upper(), f'"{words[i]}"'))
    words[0] = words[0].capitalize()
    return " ".join(words) + rng.choice((". ", ". ", ". ", "? ", "! ", ".\n\n"))


def _code(rng: random.Random) -> str:
    a, b, c, d, e, f = _words().draw(rng, 6)
    name, kind, n = f"{a}_{b}", c.capitalize() + d.capitalize(), rng.randrange(1000)
    return rng.choice(
        (
            f"def {name}(self, {e}: int = {n}, *, {f}=None) -> {kind}:\n    if {e} > {n}:\n"
            f"        return {kind}({e}, {f}[{n}:])\n    self.{f}.append({e} * {n / 7:.3f})  # {a} {b} {e}\n\n",
            f"for (size_t i = 0; i < {name}.size(); ++i) {{\n\t{kind} *{e} = {name}[i]->{f}(0x{n:04X});\n"
            f'\tif (!{e} || {e}->{d} != "{a}\\n") {{ return -{n}; }}\n}}\n',
            f'{{"{name}": {{"{e}": [{n}, {n + 1}], "{f}": "{kind}", "url": "https://{a}.example/{b}?{e}={n}"}}}},\n',
        )
    )


def _cjk(rng: random.Random) -> str:
    chars = "".join(_characters().draw(rng, rng.randint(6, 30)))
    kana = "".join(chr(rng.randrange(0x3041, 0x3094)) for _ in range(rng.randrange(6)))
    return (
        chars[:9]
        + kana
        + chars[9:]
        + rng.choice(("，", "。", "！", "、", "：「", "」。\n", f" {rng.randrange(3000)} "))
    )


def _signs(rng: random.Random) -> str:
    return (
        rng.choice(_SIGNS) * rng.choice((1, 1, 2, 5)) + rng.choice(_SPACES) + rng.choice((*_words().draw(rng, 2), ""))
    )


STYLES: dict[str, Style] = {"prose": _prose, "code": _code, "CJK": _cjk, "emoji and spaces": _signs}


def make_text(style: str, n_bytes: int, seed: int) -> str:
    """Return about n_bytes bytes of text in UTF-8, of one of STYLES."""
    rng, parts, left = random.Random(f"{style} {seed}"), [], n_bytes
    while left > 0:
        parts.append(STYLES[style](rng))
        left -= len(parts[-1].encode())
    return "".join(parts)


def make_chat(n_messages: int, n_bytes: int, seed: int) -> list[dict[str, Any]]:
    """Return a conversation that begins with a system message and ends with a user's; each of about n_bytes bytes."""
    roles = ["system", *("user", "assistant") * (n_messages // 2)][:n_messages]
    return [{"role": role, "content": make_text("prose", n_bytes, seed + i).strip()} for i, role in enumerate(roles)]
