"""Measured memory: what the kernel says of the process and of its mapped files.

Source: proc(5), /proc/self/smaps
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


@dataclass(frozen=True, slots=True)
class Pages:
    """Bytes of mapped memory: in all, resident, shared with other processes, private, and the proportional share."""

    mapped: int = 0
    resident: int = 0
    shared: int = 0
    private: int = 0
    pss: int = 0

    def __add__(self, other: Pages) -> Pages:
        return Pages(*(getattr(self, name) + getattr(other, name) for name in Pages.__slots__))


@dataclass(frozen=True, slots=True)
class Memory:
    """What a host uses, in bytes.

    foundation, adaptors: pages of the mapped files.  kv: of all sessions' caches, as allocated; pages that were never
    written take no memory.  boundary: of the hidden states that sessions keep for forks, likewise.
    compute: of graphs and their compute buffers.  process: the whole process.
    """

    foundation: Pages
    adaptors: Mapping[str, Pages]
    kv: int
    boundary: int
    compute: int
    process: Pages


def pages_of(ranges: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Pages], Pages]:
    """Return the pages of each named address range, and of the whole process; zeros where there is no /proc."""
    found = dict.fromkeys(ranges, Pages())
    total = Pages()
    if not os.path.exists("/proc/self/smaps"):
        return found, total
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
        for start, pages in _mappings(smaps.read()):
            total += pages
            for name, (low, high) in ranges.items():
                if low <= start < high:
                    found[name] += pages
    return found, total


def _mappings(text: str) -> list[tuple[int, Pages]]:
    """Return (start address, pages) of every mapping in the text of smaps."""
    mappings: list[tuple[int, Pages]] = []
    start, values = 0, dict[str, int]()
    for line in [*text.splitlines(), "0-0 "]:
        header = _RANGE.match(line)
        if header is None:
            key, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                values[key] = int(rest[:-3]) * 1024
            continue
        if values:
            mappings.append(
                (
                    start,
                    Pages(
                        mapped=values.get("Size", 0),
                        resident=values.get("Rss", 0),
                        shared=values.get("Shared_Clean", 0) + values.get("Shared_Dirty", 0),
                        private=values.get("Private_Clean", 0) + values.get("Private_Dirty", 0),
                        pss=values.get("Pss", 0),
                    ),
                )
            )
        start, values = int(header[1], 16), {}
    return mappings
