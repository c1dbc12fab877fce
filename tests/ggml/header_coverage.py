"""Compare ggml's headers with what pyggml_adapt.ggml wraps, and say what is neither wrapped nor left out for a reason.

A function is wrapped if a `Wraps:` line of a docstring in pyggml_adapt/ggml names it.  not_wrapped.json, beside this
file, names the others, by reason.  `python tests/ggml/header_coverage.py` prints a table and ends with status 1 if
anything is wrong; tests/ggml/test_header_coverage.py runs it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "vendor" / "ggml" / "upstream" / "ggml" / "include"
HEADERS = ("ggml.h", "ggml-alloc.h", "ggml-backend.h", "ggml-cpu.h", "ggml-opt.h", "gguf.h")
PACKAGE = ROOT / "pyggml_adapt" / "ggml"
LEFT_OUT = Path(__file__).with_name("not_wrapped.json")

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
FUNCTION = re.compile(r"\b(?:GGML|GGML_BACKEND)_API\b[^;{}()]*?\b((?:ggml|gguf)_\w+)\s*\(")
WRAPS = re.compile(r'Wraps:(.*?)(?:"""|\n\s*\n)', re.DOTALL)
NAME = re.compile(r"\b(?:ggml|gguf)_\w+\*?")
DECLARED = re.compile(r"^    (?!enum|struct|ctypedef)[\w *]*?\b((?:ggml|gguf)_\w+)\(", re.MULTILINE)
PROSE = re.compile(r'"""(?:.|\n)*?"""|#[^\n]*')


def functions() -> dict[str, str]:
    """Return the header that declares each function of ggml."""
    found: dict[str, str] = {}
    for header in HEADERS:
        text = COMMENT.sub(" ", (INCLUDE / header).read_text())
        found |= {name: header for name in FUNCTION.findall(text) if name not in found}
    return found


def sources(*suffixes: str) -> dict[Path, str]:
    """Return the text of each Cython file of the package."""
    return {path: path.read_text() for path in sorted(PACKAGE.rglob("*")) if path.suffix in suffixes}


def is_declarations(path: Path) -> bool:
    """Return whether the file only declares what ggml has."""
    return path.suffix == ".pxd" and path.name.startswith("lib")


def used() -> set[str]:
    """Return the names that code has, in the files that declare nothing."""
    files = {path: text for path, text in sources(".pyx", ".pxi", ".pxd").items() if not is_declarations(path)}
    return set(NAME.findall("\n".join(PROSE.sub(" ", text) for text in files.values())))


def wrapped() -> dict[str, Path]:
    """Return the names in `Wraps:` lines, and a file that has each; name_* are the names so begun that code has."""
    found = {}
    for path, text in sources(".pyx", ".pxi", ".py").items():
        for names in WRAPS.findall(text):
            for name in NAME.findall(names):
                every = [each for each in used() if each.startswith(name[:-1])] if name.endswith("*") else [name]
                found |= dict.fromkeys(every, path)
    return found


def left_out() -> dict[str, str]:
    """Return the reason why each function of not_wrapped.json is not wrapped."""
    reasons: dict[str, list[str]] = json.loads(LEFT_OUT.read_text())
    found: dict[str, str] = {}
    for reason, names in reasons.items():
        for name in names:
            if name in found:
                raise SystemExit(f"{LEFT_OUT.name} has {name} twice")
            found[name] = reason
    return found


def uncalled() -> dict[str, Path]:
    """Return the functions that a .pxd declares and no code uses, and where."""
    declarations = {path: text for path, text in sources(".pxd").items() if is_declarations(path)}
    names = used()
    return {name: path for path, text in declarations.items() for name in DECLARED.findall(text) if name not in names}


def complain(title: str, names: Iterable[str]) -> bool:
    """Print the names below the title, if there are any, and return whether there are."""
    lines = [f"  {name}" for name in names]
    if lines:
        print("\n".join(["", f"{title}:", *lines]))
    return bool(lines)


def main() -> int:
    """Return 0 if every function is wrapped or left out for a reason, and all else is in order."""
    have, ours, reasons = functions(), wrapped(), left_out()
    mentioned = {name for header in HEADERS for name in NAME.findall((INCLUDE / header).read_text())}
    mentioned |= {name.removesuffix("_t") for name in mentioned}  # the types of functions that backends are asked for
    print(f"{'header':16}{'functions':>10}{'wrapped':>10}{'left out':>10}{'missing':>10}")
    for header in HEADERS:
        names = [name for name in have if have[name] == header]
        n_ours, n_out = sum(name in ours for name in names), sum(name in reasons for name in names)
        n_missing = sum(name not in ours and name not in reasons for name in names)
        print(f"{header:16}{len(names):10}{n_ours:10}{n_out:10}{n_missing:10}")
    missing = [f"{name}  ({have[name]})" for name in have if name not in ours and name not in reasons]
    both = [f"{name}  ({ours[name].relative_to(ROOT)}; {reasons[name]})" for name in reasons if name in ours]
    bad = [
        complain("neither wrapped nor left out for a reason", missing),
        complain(f"in {LEFT_OUT.name}, but wrapped", both),
        complain(f"in {LEFT_OUT.name}, but not in the headers", (name for name in reasons if name not in have)),
        complain("in a `Wraps:` line, but not in the headers",
                 (f"{name}  ({path.relative_to(ROOT)})" for name, path in ours.items() if name not in mentioned)),
        complain("declared, but never called",
                 (f"{name}  ({path.relative_to(ROOT)})" for name, path in uncalled().items())),
    ]  # fmt: skip
    return int(any(bad))


if __name__ == "__main__":
    sys.exit(main())
