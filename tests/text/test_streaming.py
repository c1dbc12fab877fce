"""StopStrings: text that comes in pieces, up to the first stop string."""

import itertools

import pytest

from pyggml_adapt.text import StopStrings


def fed(stops, pieces):
    """Return what comes out, and whether a stop string was found."""
    finder, out = StopStrings(stops), ""
    for piece in pieces:
        out += finder.feed(piece)
        if finder.found:
            return out, True
    return out + finder.flush(), False


@pytest.mark.parametrize(("stops", "text", "want"), [
    (["END"], "abENcENDxyz", "abENc"),
    (["aab"], "aaaab", "aa"),
    (["abab", "c"], "ababab", ""),
    (["xx", "x"], "axx", "a"),
    (["\n\n"], "a\nb\n\nc", "a\nb"),
    (["never"], "neve", "neve"),
    ([], "abc", "abc"),
])  # fmt: skip
def test_however_it_is_cut(stops, text, want):
    for n in range(min(len(text), 5)):
        for cuts in itertools.combinations(range(1, len(text)), n):
            pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
            assert fed(stops, pieces) == (want, want != text)


def test_no_more_is_held_back_than_must_be():
    finder = StopStrings(["stop", "halt"])
    assert [finder.feed(piece) for piece in ("a s", "t", "ha", "lo", " stop")] == ["a ", "", "st", "halo", " "]
    assert finder.found
