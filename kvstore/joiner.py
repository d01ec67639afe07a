"""Blocks whose heads come from several workers: each brings its own, and the last makes the block whole.

1. A worker copies its heads in, block by block in the order of the chain, beside the others: no two have the same.
2. Then, one after the other, each publishes what is whole by now of its chain. Whoever comes last finds all that was
   brought, since a worker that has brought a block has brought those before it.
"""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from kvstore.block import address_of
from kvstore.checksum import digests
from kvstore.keys import TOKEN_BYTES, Namespace, links
from kvstore.layout import Layout, Shard
from kvstore.residency import Residency
from kvstore.save import Draft, Saved, Saver

PATIENCE = 30.0  # seconds that a block waits for the rest of its heads
SHARE = 8  # such blocks take one part of so many of the host tier at most

# The group, the block's key, and its layout: a chain may be saved in two, and what has one is no room for the other.
_Name = tuple[str, bytes, Layout]


class _Joint:
    """A block that is being put together. Guarded by the joiner's lock, but for the bytes of heads."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.since = draft, time.monotonic()
        self.taken: set[int] = set()  # heads that came, or are coming
        self.there = 0  # heads that came
        pieces = draft.layout.pieces(draft.layout.block_tokens)
        draft.checksums = array("Q", bytes(8 * len(pieces)))  # each head's are set by who brings it


class Joiner:
    """One per store. Any thread."""

    def __init__(self, residency: Residency, saver: Saver) -> None:
        self._saver, self._counters = saver, residency.counters
        self._limit = residency.host.capacity // SHARE
        self._turn = threading.Lock()  # one publishes at a time; the store's lock is taken inside it
        self._lock = threading.Lock()  # guards the field below; nothing is taken inside it
        self._joints: dict[_Name, _Joint] = {}  # the oldest first

    def join(
        self,
        namespace: Namespace,
        root: bytes,
        layout: Layout,
        tokens: bytes,
        parts: Mapping[int, memoryview],
        shard: Shard,
    ) -> None:
        """Copies in what a worker has. ``parts``: its payloads, by block number in the chain. Where memory is short,
        the others are left out. Raises ``BadInput`` for a shard that is none of this layout."""
        shard.check(layout)
        self.trim()
        names = self._names(namespace, root, layout, tokens, shard)
        heads = set(range(shard.first_head, shard.first_head + shard.heads))
        for number in self._saver.lacking(namespace, root, layout, tokens, sorted(parts)):
            joint = self._joint(names[number], layout)
            if joint is None:
                break
            with self._lock:
                if joint.taken & heads:  # as of workers that have the same heads
                    continue
                joint.taken |= heads
            _copy(joint.draft, parts[number], shard)
            with self._lock:
                joint.there += len(heads)

    def save(
        self,
        namespace: Namespace,
        root: bytes,
        layout: Layout,
        tokens: bytes,
        drafts: Mapping[int, Draft],
        shard: Shard,
        publish: Callable[[Mapping[int, Draft]], Saved],
    ) -> Saved:
        """Joins what is in ``drafts``, which are taken over, and has what is whole by now of the chain published."""
        self.join(namespace, root, layout, tokens, {number: draft.payload for number, draft in drafts.items()}, shard)
        for draft in drafts.values():
            draft.discard()
        names = self._names(namespace, root, layout, tokens, shard)
        with self._turn:
            return publish(dict(self._whole(names, layout.layers[0].heads)))

    def trim(self) -> None:
        """Gives up blocks whose other heads do not come."""
        given_up = list[_Joint]()  # whose drafts end outside the lock
        with self._lock:
            size = sum(joint.draft.layout.full_slot_bytes for joint in self._joints.values())
            late = time.monotonic() - PATIENCE
            for name, joint in list(self._joints.items()):
                if joint.since > late and size <= self._limit:
                    break
                size -= joint.draft.layout.full_slot_bytes
                given_up.append(self._joints.pop(name))
        if given_up:
            self._counters.add("unjoined_blocks", len(given_up))

    def _joint(self, name: _Name, layout: Layout) -> _Joint | None:
        """The block that is being put together under a name; None when memory is short."""
        with self._lock:
            joint = self._joints.get(name)
        if joint is not None:
            return joint
        drafts = self._saver.drafts(layout, 1)
        if not drafts:
            return None
        with self._lock:
            return self._joints.setdefault(name, _Joint(drafts[0]))

    def _whole(self, names: list[_Name], heads: int) -> Iterator[tuple[int, Draft]]:
        with self._lock:
            for number, name in enumerate(names):
                joint = self._joints.get(name)
                if joint is not None and joint.there == heads:
                    yield number, self._joints.pop(name).draft

    def _names(self, namespace: Namespace, root: bytes, layout: Layout, tokens: bytes, shard: Shard) -> list[_Name]:
        size = layout.block_tokens * TOKEN_BYTES
        return [(shard.group, key, layout) for _, key, _ in links(namespace, root, tokens, size)]


class _Move(NamedTuple):
    """Some heads' keys, or values, of one layer: pieces ``first`` to ``last - 1`` of a whole block."""

    to: int  # offset in the whole block's payload
    of: int  # and in the part's
    size: int
    first: int
    last: int


@lru_cache(maxsize=64)
def _moves(whole: Layout, part: Layout, first_head: int) -> tuple[_Move, ...]:
    stride, heads, all_heads = whole.block_tokens, part.layers[0].heads, whole.layers[0].heads
    theirs, ours, moves = whole.pieces(stride), part.pieces(stride), list[_Move]()
    for run in range(2 * len(whole.layers)):
        first, mine = run * all_heads + first_head, run * heads
        size = heads * ours[mine].length
        moves.append(_Move(theirs[first].offset, ours[mine].offset, size, first, first + heads))
    return tuple(moves)


def _copy(draft: Draft, part: memoryview, shard: Shard) -> None:
    """Copies a worker's heads in, and takes the checksums of what was copied, while it is in the core's cache."""
    layout, payload = draft.layout, draft.payload
    to, of, sums = address_of(payload), address_of(part), draft.checksums
    assert sums is not None
    for move in _moves(layout, shard.layout, shard.first_head):  # a layout for which there is room has few pieces
        ctypes.memmove(to + move.to, of + move.of, move.size)
        sums[move.first : move.last] = digests(layout, layout.block_tokens, payload, to, move.first, move.last)
