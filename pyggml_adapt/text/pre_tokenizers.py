"""Pre-tokenizers of byte-level BPE: how llama.cpp cuts text into words, by the name in `tokenizer.ggml.pre`.

Each has rules; a rule cuts every part that the rules before it left, into what it matches and what lies between.
Absent are kimi-k2, which merges in its own way, those that are not byte-level, and those of encoders (jina-*, ...).

Source: llama.cpp src/llama-vocab.cpp, `llm_tokenizer_bpe`, `llama_vocab::impl::load`; src/unicode.cpp
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from pyggml_adapt.text.unicode_classes import ranges

# White space is what \s is in ASCII, and these.  \x1C to \x1F, which Python's \s has as well, are none.
_SPACES_BEYOND_ASCII = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACE = "\v"  # stands for each of them

# A rule that knows categories sees one character for all of a category that lie beyond ASCII.  So the lower and the
# upper case there are one, as in llama.cpp; "\xd0" stands for what has none of these categories.
_MEMBERS = {
    "L": "A-Za-z\xd2", "N": "0-9\xd1", "M": "\xd4", "P": r"!-#%-*,-/:;?@\[-\]_{}\xd3", "S": r"$+<=>\^`|~\xd5",
}  # fmt: skip
_STAND_INS = {"L": 0xD2, "N": 0xD1, "M": 0xD4, "P": 0xD3, "S": 0xD5}

_CONTRACTION = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LAST_SPACES = r"(?<!\s)\s+\Z"  # without the first condition it takes quadratic time

_GPT2 = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+|{_SYMBOLS}|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_SPACES}"
_JAIS2 = (
    rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|"
    + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"\s{1,2}(?!\S)|\s"
)
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_SYMBOLS}[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# words in which the case changes at most once, from upper to lower; letters beyond ASCII are of both
_CASED_WORDS = tuple(
    rf"[^\r\n\p{{L}}\p{{N}}]?[A-Z\xd2]{upper}[a-z\xd2]{lower}" for upper, lower in (("*", "+"), ("+", "*"))
)
_TEKKEN = rf"{'|'.join(_CASED_WORDS)}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_SPACES}"
_GPT4O = "|".join(
    [*(f"{words}(?:{_CONTRACTION})?" for words in _CASED_WORDS), rf"\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_SPACES}"]
)
_MARKED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_CONTRACTION})?"

_HAN_AND_KANA = r"[\u4e00-\u9fa5\u3040-\u30ff]+"
_ASIAN = r"[\u0800-\u9fa5\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)  # fmt: skip
_SPARK = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)  # fmt: skip
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    r"\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    r"\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    r"\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    r"\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    r"\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    r"\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    r"\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    r"\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    r"\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+"
_YOUTU = (
    r"[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    r"\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _HAN_AND_KANA
)
_AFMOE = (
    r"[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0eff\u1780-\u17ff"
    r"\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\u1100-\u11ff]+"
)
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


def _by_thousands(text: str) -> list[str]:
    """Cut after every third digit, counted from the end of each number; what stands before the number stays with it."""
    return _cut_at(text, (at for run in _NUMBERS.finditer(text) for at in _thousands(*run.span()) if at > run.start()))


def _before_thousands(text: str) -> list[str]:
    """Cut before every third ASCII digit, counted from the end of each number."""
    return _cut_at(text, (at for run in _DIGITS.finditer(text) for at in _thousands(*run.span()) if at < run.end()))


def _thousands(start: int, end: int) -> range:
    return range(start + (end - start) % 3, end + 1, 3)


def _cut_at(text: str, positions: Iterator[int]) -> list[str]:
    parts = []
    start = 0
    for at in positions:
        parts.append(text[start:at])
        start = at
    parts.append(text[start:])
    return [part for part in parts if part]


_N_COARSE = 2  # rules, after which most parts are words or their like
_NUMBERS, _DIGITS = re.compile("[0-9\xd1]+"), re.compile("[0-9]+")

Rule = str | Callable[[str], list[str]]  # a regular expression, or a function that gives the parts


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Rules that cut text into words, and what llama.cpp ties to their names.

    ignore_merges: a word that is a token is that token, whatever the merges give.  clean_spaces: decoding drops spaces
    before punctuation.  add_bos: what holds without `tokenizer.ggml.add_bos_token`.  default_bos: whether there is a
    beginning of sequence without `tokenizer.ggml.bos_token_id`.
    """

    rules: tuple[Rule, ...]
    ignore_merges: bool = False
    clean_spaces: bool = False
    add_bos: bool = False
    default_bos: bool = True


_TABLE: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((_LLAMA3,), ignore_merges=True, clean_spaces=True, add_bos=True),
    ),
    ("dbrx smaug-bpe", PreTokenizer((_LLAMA3,), clean_spaces=True)),
    ("chatglm-bpe", PreTokenizer((_LLAMA3,), clean_spaces=True, default_bos=False)),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True, clean_spaces=True, default_bos=False)),
    ("jais-2", PreTokenizer((_JAIS2,), clean_spaces=True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 hunyuan solar-open grok-2", PreTokenizer((_QWEN2,))),
    ("stablelm2 megrez", PreTokenizer((_QWEN2,), clean_spaces=True)),
    ("laguna", PreTokenizer((r"\n+", _QWEN2))),
    ("ufakzeka", PreTokenizer((rf"{_LETTERS}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}",))),
    (
        "qwen35",
        PreTokenizer(
            (
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
                + _SPACES,
            )
        ),
    ),
    (
        "minicpm5",
        PreTokenizer(
            (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}+|{_SYMBOLS}[\r\n]*|{_SPACES}"),
            ignore_merges=True,
            clean_spaces=True,
        ),
    ),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer((rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)),
    ),
    (
        "seed-coder",
        PreTokenizer((rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    ),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,), clean_spaces=True)),
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais", PreTokenizer((_GPT2,), clean_spaces=True)),
    ("trillion granite-docling", PreTokenizer((_GPT2,))),
    (
        "starcoder refact codeshell exaone minerva-7b mellum2",
        PreTokenizer((r"\p{N}", _GPT2), clean_spaces=True),
    ),
    ("command-r smollm", PreTokenizer((r"\p{N}", _GPT2))),
    ("falcon", PreTokenizer((r"[\p{P}$+<=>\^~|`]+", _GPT2, "[0-9]{3}"), clean_spaces=True)),
    ("default", PreTokenizer((r"[\p{P}$+<=>\^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}"), clean_spaces=True)),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
    (
        "tiny_aya cohere2moe",
        PreTokenizer((_by_thousands, rf"{_MARKED_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_SPACES}")),
    ),
    (
        "youtu",
        PreTokenizer((_YOUTU, rf"{_MARKED_WORDS}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_SPACES}"), ignore_merges=True),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, _LAST_SPACES, _ASIAN, r"\p{N}+"),
        ),
    ),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", PreTokenizer((r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3))),
    ("spark2_5", PreTokenizer((r"\p{N}{1,3}", _HAN_AND_KANA, _SPARK, r"\p{N}"))),
    ("afmoe", PreTokenizer((_by_thousands, _AFMOE, _DEEPSEEK3))),
    ("poro-chat", PreTokenizer((_BLOOM,))),
    ("bloom gpt3-finnish", PreTokenizer((_BLOOM,), clean_spaces=True)),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("superbpe", PreTokenizer((r"\p{N}+", _before_thousands))),
    (
        "chameleon",
        PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
)
PRE_TOKENIZERS = {name: pre for names, pre in _TABLE for name in names.split()}


_Step = tuple[bool, Callable[[str], list[str]]]  # whether it is about categories, and what gives the parts of a text


class Splitter:
    """Cut text into words by rules: coarsely first, so that the caller can keep what becomes of short parts."""

    def __init__(self, rules: tuple[Rule, ...]):
        steps = [(not isinstance(rule, str) or r"\p{" in rule, _compile(rule)) for rule in rules]
        self._coarse, self._fine = steps[:_N_COARSE], steps[_N_COARSE:]

    def parts(self, text: str) -> list[str]:
        """Return the parts of `text`, valid Unicode, of which each is a word or several."""
        return _cut([text], self._coarse)

    def words(self, parts: list[str]) -> list[list[str]]:
        """Return the words of each part."""
        if not self._fine:
            return [[part] for part in parts]
        words, found = iter(_cut(parts, self._fine)), []
        for part in parts:
            left, its = len(part), []
            while left:
                word = next(words)
                its.append(word)
                left -= len(word)
            found.append(its)
        return found


def _cut(texts: list[str], steps: list[_Step]) -> list[str]:
    """Return the words of texts, none of which goes across their ends."""
    text = "".join(texts)
    if text.isascii():
        words = texts
        for _, cut in steps:
            words = [word for part in words for word in cut(part)]
        return words
    plain = _BEYOND_ASCII.sub(_SPACE, text)
    collapsed = _collapse(text) if any(by_category for by_category, _ in steps) else ""
    lengths = list(map(len, texts))
    for by_category, cut in steps:
        parts = _pieces(collapsed if by_category else plain, lengths)
        lengths = [len(word) for part in parts for word in cut(part)]
    return list(_pieces(text, lengths))


_BEYOND_ASCII = re.compile(f"[{_SPACES_BEYOND_ASCII}]")


def _pieces(text: str, lengths: list[int]) -> Iterator[str]:
    start = 0
    for length in lengths:
        yield text[start : start + length]
        start += length


def _compile(rule: Rule) -> Callable[[str], list[str]]:
    """Return a function that gives the parts of a text, none of them empty."""
    if not isinstance(rule, str):
        return rule
    inside = False

    def translate(match: re.Match[str]) -> str:
        nonlocal inside
        if match[1]:
            return _MEMBERS[match[1]] if inside else f"[{_MEMBERS[match[1]]}]"
        if match[0] in "[]":
            inside = match[0] == "["
        return match[0]

    pattern = re.sub(r"\\p\{(\w)\}|\\.|[\[\]]", translate, rule)
    find = re.compile(pattern, re.ASCII).findall
    split = re.compile(f"({pattern})", re.ASCII).split

    def cut(text: str) -> list[str]:
        words: list[str] = find(text)  # half the time of split, but without what lies between
        if not words:
            return [text] if text else []
        return words if sum(map(len, words)) == len(text) else list(filter(None, split(text)))

    return cut


@cache
def _stand_ins() -> np.ndarray:
    """Return what each code point becomes, uint8 [0x110000]."""
    table = np.full(0x110000, 0xD0, np.uint8)
    table[:0x80] = np.arange(0x80)
    for category, stand_in in _STAND_INS.items():
        for first, last in ranges(category):
            table[first : last + 1] = stand_in
    for char in range(0x80, 0x3001):
        if _BEYOND_ASCII.match(chr(char)):
            table[char] = ord(_SPACE)
    return table


def _collapse(text: str) -> str:
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return _stand_ins()[codes].tobytes().decode("latin-1")
