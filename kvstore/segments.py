"""What is stored, as people look at it: stretches of blocks that are used together, those that served most first.

A million blocks are looked at in slices, so that nobody waits long for the store's lock. What changes meanwhile may be
seen before or after; a stretch never goes from one tenant's or owner's blocks to another's.
"""

from __future__ import annotations

import heapq
import threading
from array import array
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.errors import BadInput
from kvstore.families import NONE
from kvstore.lease import Lease
from kvstore.match import Match, Miss
from kvstore.residency import Residency
from kvstore.room import tier_of

SLICE = 2048  # blocks that are looked at before others get the lock: a few milliseconds
PAUSE = 0.0005  # seconds that they have to take it
ID_DIGITS = 16
SHOWN = 5  # ids, where one is not enough to tell
TIERS = ("host", "disk", "device", "remote")  # bit by bit, where a block is
PINNED = 1 << len(TIERS)
ABSENT = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks in a row of one tenant and owner that no other chain goes on from, but from the last: a conversation, or
    what several start with. It says nothing of what the tokens are.

    ``id``: leading hex digits of the last block's key. ``start``: tokens of the chain before it. ``bytes``: payload of
    its ``tokens``. ``blocks``: how many are in each tier; one may be in several. ``uses``: matches that found its most
    used block; ``served``: tokens of all blocks times uses of each; both since the store was opened. ``last_use``,
    ``created``: of its youngest block, the latter of its oldest; ``expires``: of the block that goes first, 0 for
    never (all in Unix seconds). ``pinned``: something keeps one of its blocks.
    """

    id: str
    tenant: str
    owner: str
    start: int
    tokens: int
    bytes: int
    blocks: Mapping[str, int]
    uses: int
    served: int
    last_use: float
    created: float
    expires: float
    pinned: bool


class _Rank(NamedTuple):
    """By what segments are put in order; those that served most come first, then those that were used last."""

    served: int
    last_use: float
    tokens: int
    end: int  # number of its last block


class _Owners:
    """Small ints for namespace, tenant and owner together, as kinds of blocks come up."""

    def __init__(self) -> None:
        self.of_kind: list[int] = []
        self.names: list[tuple[str, str]] = []  # tenant and owner
        self._known: dict[tuple[bytes, str, str], int] = {}

    def learn(self, residency: Residency) -> None:
        """Takes in kinds that are new. Locked."""
        for kind in residency.index.kinds[len(self.of_kind) :]:
            shared = (kind.namespace, kind.tenant, kind.owner)
            owner = self._known.setdefault(shared, len(self.names))
            if owner == len(self.names):
                self.names.append((kind.tenant, kind.owner))
            self.of_kind.append(owner)


class _Picture:
    """The blocks as they were when they were looked at: columns by number."""

    def __init__(self, residency: Residency, tenant: str | None) -> None:
        self._residency, self._tenant = residency, tenant
        self.owners = _Owners()
        self.owner = array("q")  # ABSENT where no such block is there
        self.parent, self.count, self.times = array("q"), array("L"), array("I")
        self.sequence = array("Q")
        self.last, self.created, self.expires = array("d"), array("d"), array("d")
        self.where = bytearray()
        pause = threading.Event()
        while self._look():
            pause.wait(PAUSE)  # a lock that is taken again at once is never free for those who wait for it
        self._join()

    def _look(self) -> bool:
        """Looks at the next slice; False when there is none."""
        residency = self._residency
        with residency.lock:
            residency.settle()
            index, begin = residency.index, len(self.owner)
            end = min(begin + SLICE, len(index.key))
            self.owners.learn(residency)
            self.parent.extend(index.parent[begin:end])
            self.count.extend(index.count[begin:end])
            self.sequence.extend(index.sequence[begin:end])
            self.created.extend(index.created[begin:end])
            self.expires.extend(index.expires[begin:end])
            accounts = (*residency.keeping.pins.values(), residency.keeping.retained)
            kept = [account.sizes for account in accounts if account.sizes]
            for number in range(begin, end):
                self._add(number, kept)
            return end < len(index.key)

    def _add(self, number: int, kept: Sequence[Container[int]]) -> None:
        """What the index does not have in columns of its own. ``kept``: by pins and retentions. Locked."""
        residency, index, uses = self._residency, self._residency.index, self._residency.uses
        owner, where = ABSENT, 0
        if index.present(number):
            owner = self.owners.of_kind[index.kind[number]]
            if self._tenant not in (None, self.owners.names[owner][0]):
                owner = ABSENT
        if owner != ABSENT:
            where = (number in residency.residents) | (index.disk[number] != NONE) << 1
            where |= (residency.hot is not None and number in residency.hot) << 2
            where |= (not where) << 3
            if kept and any(number in blocks for blocks in kept):
                where |= PINNED
        self.owner.append(owner)
        self.where.append(where)
        self.last.append(uses.last(number))
        self.times.append(uses.times(number))

    def _join(self) -> None:
        """Finds which blocks go on from the one before them, and which are the last of their segment."""
        size = len(self.owner)
        children = array("L", [0]) * size
        for number in range(size):
            parent = self.parent[number]
            if self.owner[number] != ABSENT and 0 <= parent < size:
                children[parent] += 1
        self._ends = bytearray(b"\1") * size
        self._goes_on = bytearray(size)
        for number in range(size):
            parent = self.parent[number]
            if self.owner[number] == ABSENT:
                self._ends[number] = 0
            elif 0 <= parent < size and self.owner[parent] == self.owner[number] and children[parent] == 1:
                self._goes_on[number], self._ends[parent] = 1, 0

    def ranks(self) -> Iterator[_Rank]:
        """All segments."""
        times, count, last = self.times, self.count, self.last
        for end, is_end in enumerate(self._ends):
            if is_end:
                served, latest, tokens = 0, 0.0, 0
                for number in self.blocks(end):
                    served += times[number] * count[number]
                    tokens += count[number]
                    if last[number] > latest:
                        latest = last[number]
                yield _Rank(served, latest, tokens, end)

    def blocks(self, end: int) -> Iterator[int]:
        """The blocks of the segment that ends with this one, from there."""
        number = end
        yield number
        while self._goes_on[number]:
            number = self.parent[number]
            yield number

    def start(self, end: int) -> int:
        """Tokens of the chain before the segment that ends with this block."""
        *_, number = self.blocks(end)
        tokens, seen = 0, 0
        while 0 <= (number := self.parent[number]) < len(self.count) and seen < len(self.count):
            tokens += self.count[number]
            seen += 1  # a number that stands for another block by now may lead in a circle
        return tokens

    def ends(self) -> Iterator[tuple[str, int]]:
        """The id of each segment, and the number of its last block."""
        residency, numbers = self._residency, [number for number, is_end in enumerate(self._ends) if is_end]
        for begin in range(0, len(numbers), SLICE):
            with residency.lock:
                index = residency.index
                some = [number for number in numbers[begin : begin + SLICE] if self._same(number)]
                ids = [index.key[number].hex()[:ID_DIGITS] for number in some]
            yield from zip(ids, some, strict=True)

    def match(self, end: int) -> Match | None:
        """The blocks of a segment, leased; None when one of them has left since."""
        residency, blocks = self._residency, [*self.blocks(end)][::-1]
        with residency.lock:
            index = residency.index
            if not all(self._same(number) and index.present(number) for number in blocks):
                return None
            residency.hold(blocks)
            layout, tiers = index.kind_of(end).layout, [tier_of(residency, number) for number in blocks]
            counts = [index.count[number] for number in blocks]
            origins = [index.kind_of(number).origin for number in blocks]
        skipped, lease = self.start(end), Lease(blocks, residency.lease_ended)
        tokens = skipped + sum(counts)
        why = Miss("complete", tokens, "this is all of the segment")
        pairs = list(zip(blocks, counts, strict=True))
        return Match(layout, pairs, lease, tokens, tiers, why, b"", skipped, origins=origins)

    def _same(self, number: int) -> bool:
        """Whether a number still stands for the block that was looked at. Locked."""
        index = self._residency.index
        return bool(index.key[number]) and index.sequence[number] == self.sequence[number]

    def segment(self, rank: _Rank) -> Segment | None:
        """One in full; None when its last block has left since."""
        residency, blocks = self._residency, list(self.blocks(rank.end))
        with residency.lock:
            index = residency.index
            if not self._same(rank.end):
                return None
            key, token_payload = index.key[rank.end], index.kind_of(rank.end).layout.token_payload
        tenant, owner = self.owners.names[self.owner[rank.end]]
        places = [self.where[number] for number in blocks]
        tiers = {tier: sum(place >> bit & 1 for place in places) for bit, tier in enumerate(TIERS)}
        return Segment(
            id=key.hex()[:ID_DIGITS],
            tenant=tenant,
            owner=owner,
            start=self.start(rank.end),
            tokens=rank.tokens,
            bytes=rank.tokens * token_payload,
            blocks={tier: blocks for tier, blocks in tiers.items() if blocks},
            uses=max(self.times[number] for number in blocks),
            served=rank.served,
            last_use=rank.last_use,
            created=min(self.created[number] for number in blocks),
            expires=min((self.expires[number] for number in blocks if self.expires[number]), default=0.0),
            pinned=any(place & PINNED for place in places),
        )


def segments(residency: Residency, limit: int, tenant: str | None) -> list[Segment]:
    """See ``Store.segments``."""
    number: object = limit
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BadInput(f"limit={number!r} is no number of segments; give 1 or more")
    picture = _Picture(residency, tenant)
    best = heapq.nlargest(limit, picture.ranks())
    return [segment for rank in best if (segment := picture.segment(rank)) is not None]


def segment_match(residency: Residency, id: str) -> Match:
    """See ``LocalStore.segment``."""
    wanted = id.strip().lower()[:ID_DIGITS]
    picture = _Picture(residency, None)
    found = [(known, end) for known, end in picture.ends() if wanted and known.startswith(wanted)]
    if len(found) > 1:
        shown = ", ".join([known for known, _ in found[:SHOWN]] + ["…"] * (len(found) > SHOWN))
        raise BadInput(f"{len(found)} segments begin with {id!r}; give more digits of one of them: {shown}")
    match = picture.match(found[0][1]) if found else None
    if match is None:
        raise BadInput(f"no segment begins with {id!r}; kvstore ls shows those that are stored")
    return match
