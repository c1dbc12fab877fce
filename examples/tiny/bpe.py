"""A byte-level BPE vocabulary in which a quoted word stays a row of letters.

Merges are learnt by frequency as usual, but only where the left part begins with a space: the
words of the framing become one token each, and the letters of the words in quotes stay single.
"""

import re
from collections import Counter
from itertools import pairwise

BOS, EOS = "<|begin|>", "<|end|>"
# The split of llama.cpp's `llama-bpe`, narrowed to ASCII, which is all that the text contains.
SPLIT = re.compile(
    r"'(?:[sdmt]|re|ve|ll)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.IGNORECASE,
)


def byte_chars():
    """Return GPT-2's 256 printable stand-ins, indexed by byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


BYTE_CHARS = byte_chars()
SPACE = BYTE_CHARS[ord(" ")]


def split(text):
    """Return the pieces of `text` as tuples of byte stand-ins; merges never cross a piece."""
    return [tuple(BYTE_CHARS[b] for b in piece.encode()) for piece in SPLIT.findall(text)]


def merge(parts, pair):
    """Return `parts` with each occurrence of `pair` joined, left to right."""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def learn_merges(texts, min_count):
    """Return the merges in order, each the most frequent allowed pair that is left."""
    pieces = Counter(piece for text in texts for piece in split(text))
    merges = []
    while True:
        pairs = Counter()
        for parts, count in pieces.items():
            for pair in pairwise(parts):
                if pair[0].startswith(SPACE):
                    pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < min_count:
            return merges
        merges.append(best)
        joined = Counter()
        for parts, count in pieces.items():
            joined[merge(parts, best)] += count
        pieces = joined


class Vocab:
    """Tokens in id order and the merges that make them."""

    def __init__(self, merges):
        self.merges = merges
        self.tokens = [*BYTE_CHARS, *("".join(pair) for pair in merges), BOS, EOS]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.bos, self.eos = self.ids[BOS], self.ids[EOS]

    def encode(self, text):
        """Return the token ids of `text`, without begin and end."""
        ids = []
        for parts in split(text):
            for pair in self.merges:
                parts = merge(parts, pair)
            ids += [self.ids[part] for part in parts]
        return ids
