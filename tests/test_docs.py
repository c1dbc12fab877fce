"""The Python sessions of the pages about ggml, run as they stand."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
SESSIONS = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["guide/ggml.md", "reference/ggml.md", "howto/add-op.md"])
def test_sessions(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text()
    found = list(SESSIONS.finditer(text))
    assert found
    source = "\n".join(match[1] for match in found)
    test = doctest.DocTestParser().get_doctest(source, {}, page, str(DOCS / page), 0)
    out: list[str] = []
    failed, n_run = doctest.DocTestRunner().run(test, out=out.append)
    assert n_run
    assert not failed, "".join(out)
