"""Tables on text: tokenizers, sampling, chats, constrained output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from markdown_table import table

Results = dict[str, Any]
OURS, LLAMA, MMAP = "pyggml_adapt", "llama.cpp", "llama.cpp, mmap"
READY_LIMIT = 1000  # ms, of a vocabulary of 152 k tokens
STYLES = ("prose", "code", "CJK", "emoji and spaces")
SAMPLE_LIMIT = 1000  # us, of the default chain over 152 k logits


def _rounds(case: Results, *keys: str) -> tuple[list[float], list[float]]:
    """Return each round's figure, ours and llama.cpp's."""

    def dig(figures: Results) -> float:
        for key in keys:
            figures = figures[key]
        return figures

    ours, theirs = ([dig(figures) for figures in case["rounds"][engine]] for engine in (OURS, LLAMA))
    return ours, theirs


def _rate_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["tokenizing"].items():
        for what in ("first", "later"):
            styles = [_rounds(case, what, style) for style in STYLES]
            ratios = (f"{median(ours) / median(theirs):.2f}" for ours, theirs in styles)
            yield [*_row(f"{name}, {what} MB", *_rounds(case, what, "all")), *ratios]
        yield [*_row(f"{name}, back to text", *_rounds(case, "decode")), *[""] * len(STYLES)]


def _row(name: str, ours: list[float], theirs: list[float], digits: int = 2) -> Sequence[str]:
    """Return medians, their ratio, and the lowest and highest ratio of one round."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    a, b = median(ours), median(theirs)
    return [name, f"{a:.{digits}f}", f"{b:.{digits}f}", f"**{a / b:.2f}** ({min(each):.2f} to {max(each):.2f})"]


def tokenizers(results: Results) -> str:
    """Return the section on tokenizers."""
    cases = results["tokenizing"]
    equal = all(case["equal_ids"] for case in cases.values())
    return "\n".join(
        [
            "## Tokenizers",
            "",
            "A megabyte, a quarter each of prose, code, Chinese and Japanese, and emoji with white space. It is made "
            "here, its words and characters as often as Zipf's law has it. The first MB meets a new tokenizer; ours "
            "remembers words, so the later one, other text of the same kinds, may be faster. llama.cpp: "
            "`llama_tokenize`, `llama_detokenize`. One thread. The vocabularies are "
            f"{results['vocabularies']}. In brackets the lowest and highest ratio of one round.",
            "",
            table(
                ["MB/s", "ours", "llama.cpp", "ours / llama.cpp", *(f"{s}, ratio" for s in STYLES)], _rate_rows(results)
            ),
            "",
            f"Ids are {'equal' if equal else '**not** equal'} in every case.",
            "",
            table(
                ["milliseconds from a file to a tokenizer", "ours", "llama.cpp", "ours / llama.cpp"],
                [_row(name, *_rounds(case, "ready"), digits=0) for name, case in cases.items()],
            ),
            "",
        ]
    )


def _us_cells(us: dict[str, float]) -> Sequence[str]:
    return [f"{us[OURS]:.0f}", f"{us[LLAMA]:.0f}", f"**{us[OURS] / us[LLAMA]:.2f}**"]


def sampling(results: Results) -> str:
    """Return the section on sampling."""
    found = results["sampling"]
    rows = [[name, *(cell for us in states.values() for cell in _us_cells(us))] for name, states in found["us"].items()]
    return "\n".join(
        [
            "## Sampling",
            "",
            f"From {found['n_vocab']} logits to a token, steady state. Probabilities fall as a power of their rank, "
            "flatly for some tokens and steeply for others, as a trained model's do. llama.cpp: "
            "`llama_sampler_sample` with the same steps and parameters. Cold: with caches that something else has "
            "filled, as after a large graph, but for the logits.",
            "",
            table(["microseconds", *("ours", "llama.cpp", "ratio"), *("ours, cold", "llama.cpp, cold", "ratio")], rows),
            "",
        ]
    )


def _turn_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, cases in results["first_token"].items():
        for length, case in cases.items():
            for turn, ms in case["ms"].items():
                n = case["n_tokens"][turn]
                whole, beside = ms["whole"], ms["beside"]
                row = _row(f"{name}, {length} prompt, {turn} turn: {n} tokens", whole[OURS], whole[MMAP], digits=1)
                yield [*row, *(f"{median(beside[engine]):.2f}" for engine in (OURS, MMAP))]


def _around_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["around"].items():
        alone = case["us"]["eval() alone"]
        for what, us in case["us"].items():
            yield [f"{name}, {case['n_vocab']} tokens, {what}", f"{us:.0f}", f"{us - alone:.0f}"]


def chats(results: Results) -> str:
    """Return the section on chats."""
    equal = all(case["equal_tokens"] for cases in results["first_token"].values() for case in cases.values())
    rendered = [
        [name, *(f"{ms[when]:.2f}" for when in ("first", "second", "later"))]
        for name, ms in results["rendering"].items()
    ]
    return "\n".join(
        [
            "## Chats",
            "",
            "From messages to the first token of the reply: template, tokenizer, prompt, default sampling chain. The "
            "second turn adds the reply and another question, and evaluates these only. llama.cpp: "
            "`llama_chat_apply_template`, `llama_tokenize`, `llama_decode`, `llama_sampler_sample`, and "
            "`llama_memory_seq_rm` where a chat goes on. Ours renders the template in a process of its own, which runs "
            f"already. Both evaluate {'the same' if equal else '**other**'} tokens. Beside: what is not evaluation.",
            "",
            table(
                ["milliseconds", "ours", "llama.cpp, mmap", "ratio", "ours, beside", "llama.cpp, beside"],
                _turn_rows(results),
            ),
            "",
            "Rendering 20 messages of 200 bytes. The first time starts the process; the second one finds the template "
            "compiled. (`transformers`, whose texts these are, is not among what `make bench` installs.)",
            "",
            table(["milliseconds", "first", "second", "later"], rendered),
            "",
            "A generated token outside ggml, from logits to text: sampling, decoding, stop strings; and how much that "
            "is more than `eval()` alone.",
            "",
            table(["microseconds", "outside ggml", "more than eval()"], _around_rows(results)),
            "",
        ]
    )


def constraints(results: Results) -> str:
    """Return the section on constrained output and log-probabilities."""
    found = results["constraining"]
    us = found["us"]
    rows = [
        [name, *(f"{us[f'{engine}, {name}']:.0f}" if f"{engine}, {name}" in us else "" for engine in ("ours", LLAMA))]
        for name in ("mask", "longest mask", "one token", "accept")
    ]
    compiled = ", ".join(f"{name} {ms:.1f} ms" for name, ms in found["compile_ms"].items())
    scores = ", ".join(f"{us:.0f} for {n}" for n, us in found["logprobs_us"].items())
    return "\n".join(
        [
            "## Constrained output",
            "",
            f"A document of {found['n_tokens']} tokens that meets a JSON Schema, token by token, with a vocabulary of "
            f"{found['n_vocab']}; llama.cpp's grammar is made of the same schema. Ours looks at the whole vocabulary "
            "before each token. llama.cpp's programs draw first and look at the one token, and at the whole vocabulary "
            "only where that one is refused.",
            "",
            table(["microseconds", "ours", LLAMA], rows),
            "",
            f"Once for a vocabulary: {found['vocabulary_ms']:.0f} ms. For each constraint, compiled: {compiled}.",
            "",
            f"Log-probabilities of a token and of the most probable ones, microseconds: {scores}.",
            "",
        ]
    )


def verdicts(results: Results) -> Iterable[tuple[str, str, str, bool]]:
    """Yield what is promised of text, the limit, what was found, and whether it holds."""
    ratios = {}
    for name, case in results["tokenizing"].items():
        for what in ("first", "later"):
            ours, theirs = _rounds(case, what, "all")
            ratios[f"{what} MB, {name}"] = median(ours) / median(theirs)
    worst = min(ratios, key=lambda name: ratios[name])
    yield f"tokenizer, of llama.cpp's; worst: {worst}", ">= 1.00 x", f"{ratios[worst]:.2f} x", ratios[worst] >= 0.995
    name = next(name for name in results["tokenizing"] if "152 k" in name)
    ms = median(_rounds(results["tokenizing"][name], "ready")[0])
    yield f"vocabulary ready, {name}", f"< {READY_LIMIT} ms", f"{ms:.0f} ms", ms < READY_LIMIT
    n_vocab = results["sampling"]["n_vocab"]
    for state, case in results["sampling"]["us"]["default chain"].items():
        what, us = f"sampling, default chain, {n_vocab} logits, {state} caches", case[OURS]
        yield what, f"< {SAMPLE_LIMIT} us", f"{us:.0f} us", us < SAMPLE_LIMIT
    turns = {
        f"{turn} turn, {length} prompt, {name}": median(ms["whole"][OURS]) / median(ms["whole"][MMAP])
        for name, cases in results["first_token"].items()
        for length, case in cases.items()
        for turn, ms in case["ms"].items()
    }
    worst = max(turns, key=lambda name: turns[name])
    yield (
        f"first token of a reply, of {MMAP}; worst: {worst}",
        "<= 1.00 x",
        f"{turns[worst]:.2f} x",
        turns[worst] <= 1.005,
    )
