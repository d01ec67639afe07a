"""How a block's payload is cut for a remote tier: groups of layers that travel together, each in one part or more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Group(NamedTuple):
    """Layers ``first`` to ``last - 1``, in parts numbered from ``part``: bytes (begin, end) of the payload."""

    first: int
    last: int
    part: int
    ranges: tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def cut(offsets: Sequence[int], part_bytes: int) -> tuple[Group, ...]:
    """Groups of layers of at most ``part_bytes``; a larger layer is a group of its own, in several parts.

    ``offsets``: where each layer begins, and the payload's size. Where there is more than one group, the first is layer
    0 alone: an engine can begin when it has come.
    """
    layers = len(offsets) - 1
    ends, first = list[int](), 0
    for last in range(1, layers + 1):
        alone = first == 0 and offsets[-1] > part_bytes
        if last == layers or alone or offsets[last + 1] - offsets[first] > part_bytes:
            ends.append(last)
            first = last
    groups, first, part = list[Group](), 0, 0
    for last in ends:
        begin, end = offsets[first], offsets[last]
        ranges = tuple((at, min(at + part_bytes, end)) for at in range(begin, end, part_bytes))
        groups.append(Group(first, last, part, ranges))
        first, part = last, part + len(ranges)
    return tuple(groups)


def parts_of(groups: Sequence[Group]) -> int:
    """How many parts there are."""
    return groups[-1].part + len(groups[-1].ranges)
