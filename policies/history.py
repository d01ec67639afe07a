"""What requests left behind, in stretches of blocks, and when they came back for it: what ``Pace`` learns from.

A request leaves up to four *stretches* of its chain: the *trunk* that many chains share, what of the rest had been
there before, what was new, and the last block, which is seldom whole. The next request that goes on from there takes
the blocks over, and what it leaves of a stretch is *left over*. Blocks that no tier holds any more are remembered by
name.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import count, islice
from typing import Protocol

from kvstore.policies.hazard import BINS, EDGES, FOUND, LEFT, PRIVATE, TRUNK, Class, Hazards, bin_of
from kvstore.policy import Arrival

GHOSTS = 1 << 18  # names of blocks that are gone
_FAN = 6  # a block with so many children that went on is part of a trunk
_TURNS = 8  # later turns are all alike
_NEW_TOKENS = (1024, 2048, 4096, 8192, 32768)
_GAPS = (30.0, 60.0, 120.0, 300.0)  # seconds
_NEW, _TAIL = 0, 1 + len(_GAPS) + 1  # in place of the gap, for what was not there before
_EVERY = 32  # requests from one fit to the next, at least
_STEPS = 4  # of a fit, with each request
_BEFORE = 64  # requests that are seen before anything is believed


class Stretch:
    """Blocks that one request left, of one class."""

    __slots__ = ("at", "blocks", "closed", "kind", "time", "turn")

    def __init__(self, kind: Class, time: float, turn: int) -> None:
        self.kind, self.time, self.turn = kind, time, turn
        self.at = 0  # bin of its age
        self.blocks = 0  # known ones, and remembered ones
        self.closed = False  # somebody came back for it


_NO_GHOST: tuple[Stretch | None, int, int] = (None, 0, 0)


class Follower(Protocol):
    """A policy that orders blocks by what the history says of their stretches."""

    def moved(self, stretch: Stretch) -> None:
        """The stretch has another class or another age now."""

    def fitted(self) -> None:
        """Everything has another worth now."""


class History:
    """One for all tiers of a store. The store's lock guards every call."""

    def __init__(self, ghosts: int = GHOSTS) -> None:
        self.hazards = Hazards()
        self.learned = False  # enough was seen to be believed
        self.followers: list[Follower] = []
        self._limit = ghosts
        self._ghosts: OrderedDict[Hashable, tuple[Stretch, int, int]] = OrderedDict()  # longest gone first
        self._served = 0
        self._fitting: Iterator[None] | None = None
        # Columns by block.
        self._room = 0
        self._stretch: list[Stretch | None] = []
        self._name: list[Hashable] = []
        self._tokens, self._parent, self._fan = array("q"), array("q"), array("q")
        self._inner, self._users = bytearray(), bytearray()  # it has had a child; how many tiers hold it
        # Stretches by class and bin, in the order in which they leave it, and when the first one does.
        self._ages: dict[tuple[Class, int], deque[tuple[float, Stretch]]] = {}
        self._due: list[tuple[float, int, tuple[Class, int]]] = []
        self._tie = count()
        self._before: tuple[int, Stretch] = (-1, Stretch((FOUND,), 0.0, 0))  # the parent of what came last, its stretch

    # -- which blocks there are ------------------------------------------------------------------------------------

    def know(self, block: int, arrival: Arrival, now: float) -> None:
        """A tier takes a block in. One that nothing is known of hangs together with what came just before it, its
        child or its parent, until a request says better."""
        _, tokens, name, parent = arrival
        if block >= self._room or parent >= self._room:
            self._grow(max(block, parent) + 1)
        users = self._users
        users[block] += 1
        if users[block] > 1:
            return
        self._name[block], self._tokens[block], self._parent[block] = name, tokens, parent
        stretch, fan, inner = self._ghosts.pop(name, _NO_GHOST) if self._ghosts else _NO_GHOST
        if stretch is None:
            below, stretch = self._before
            together = below == block or (parent >= 0 and self._stretch[parent] is stretch)
            if not together or stretch.closed or stretch.kind != (FOUND,):
                stretch = self._open((FOUND,), now, 0)
            stretch.blocks += 1
        self._before = parent, stretch
        self._stretch[block] = stretch
        if parent >= 0 and not self._inner[parent]:
            self._inner[parent] = 1
            if users[parent] and (above := self._parent[parent]) >= 0:
                self._fan[above] += 1
        if fan:
            self._fan[block] += fan
        if inner:
            self._inner[block] = 1
        elif self._inner[block] and parent >= 0:  # its child came first
            self._fan[parent] += 1

    def leave(self, block: int) -> None:
        """A tier lets a block go; when it was the last that had it, its name is remembered."""
        self._users[block] -= 1
        stretch = self._stretch[block]
        if self._users[block] or stretch is None:
            return
        self._ghosts[self._name[block]] = (stretch, self._fan[block], self._inner[block])
        self._stretch[block], self._name[block] = None, None
        self._fan[block] = self._inner[block] = 0
        while len(self._ghosts) > self._limit:
            _, (stretch, _, _) = self._ghosts.popitem(last=False)
            stretch.blocks -= 1

    def of(self, block: int) -> Stretch:
        """The stretch of a block that a tier holds."""
        stretch = self._stretch[block]
        assert stretch is not None
        return stretch

    def _grow(self, room: int) -> None:
        more = max(room - self._room, self._room // 4, 1024)
        self._room += more
        self._stretch.extend([None] * more)
        self._name.extend([None] * more)
        for column in (self._tokens, self._parent, self._fan):
            column.frombytes(bytes(column.itemsize * more))
        self._inner.extend(bytes(more))
        self._users.extend(bytes(more))

    # -- what requests do ------------------------------------------------------------------------------------------

    def serve(self, chain: Sequence[int], now: float) -> None:
        """A request is over; these blocks are its chain, root first. O(blocks)."""
        users = self._users
        chain = [block for block in chain if block < len(users) and users[block]]
        if not chain:
            return
        trunk = 1 + max((at for at, block in enumerate(chain) if self._fan[block] >= _FAN), default=-1)
        last = len(chain) - 1 if len(chain) > trunk else len(chain)
        seen = trunk
        while seen < len(chain) and self.of(chain[seen]).kind != (FOUND,):
            seen += 1
        turn, gap = 0, _NEW
        if seen > trunk:
            before = self.of(chain[seen - 1])
            turn = min(before.turn + 1, _TURNS)
            gap = 1 + sum(now - before.time >= edge for edge in _GAPS)
        size = sum(map(self._tokens.__getitem__, chain[max(seen, trunk) :]))
        news = sum(size > edge for edge in _NEW_TOKENS)
        left = self._close(chain, now)
        self._take(chain[:trunk], (TRUNK,), now, turn)
        self._take(chain[trunk : min(seen, last)], (PRIVATE, turn, news, gap), now, turn)
        self._take(chain[max(trunk, min(seen, last)) : last], (PRIVATE, turn, news, _NEW), now, turn)
        self._take(chain[last:], (PRIVATE, turn, news, _TAIL), now, turn)
        for stretch in left:
            if stretch.blocks:  # the chain went on elsewhere
                stretch.kind, stretch.time, stretch.closed, stretch.at = (LEFT,), now, False, 0
                self._count(stretch, (0,))
                self._queue(stretch)
                self._tell(stretch)
        self._served += 1
        if self._fitting is None and self._served % _EVERY == 0:
            self._fitting = self.hazards.fitting()
        if self._fitting is not None:
            self._fit_on(self._fitting)

    def _fit_on(self, fitting: Iterator[None]) -> None:
        """A few steps: a request must not wait for all of them."""
        if len(list(islice(fitting, _STEPS))) == _STEPS:
            return
        self._fitting = None
        self.learned = self.learned or self._served >= _BEFORE
        for follower in self.followers:
            follower.fitted()

    def _close(self, chain: Sequence[int], now: float) -> list[Stretch]:
        """Somebody came back for the stretches of these blocks."""
        found = dict.fromkeys(map(self.of, chain))
        for stretch in found:
            if not stretch.closed:
                self._move(stretch, bin_of(now - stretch.time))
                stretch.closed = True
                if stretch.kind != (FOUND,):
                    self.hazards.come_back(stretch.kind, stretch.at)
        return list(found)

    def _take(self, blocks: Sequence[int], kind: Class, now: float, turn: int) -> None:
        if not blocks:
            return
        stretch = self._open(kind, now, turn)
        for block in blocks:
            self.of(block).blocks -= 1
            self._stretch[block] = stretch
        stretch.blocks = len(blocks)

    # -- ages ------------------------------------------------------------------------------------------------------

    def _open(self, kind: Class, now: float, turn: int) -> Stretch:
        stretch = Stretch(kind, now, turn)
        self._count(stretch, (0,))
        self._queue(stretch)
        return stretch

    def _count(self, stretch: Stretch, bins: Iterable[int]) -> None:
        if stretch.kind != (FOUND,):
            self.hazards.enter(stretch.kind, bins)

    def _queue(self, stretch: Stretch) -> None:
        if stretch.at < BINS - 1:
            key = stretch.kind, stretch.at
            queue = self._ages.setdefault(key, deque())
            if not queue:
                heappush(self._due, (stretch.time + EDGES[stretch.at + 1], next(self._tie), key))
            queue.append((stretch.time, stretch))

    def _move(self, stretch: Stretch, at: int) -> None:
        if at > stretch.at:
            self._count(stretch, range(stretch.at + 1, at + 1))
            stretch.at = at

    def advance(self, now: float) -> None:
        """Stretches grow older. O(log classes) for each that comes into another bin."""
        due = self._due
        while due and due[0][0] <= now:
            _, _, (kind, at) = key = heappop(due)
            queue = self._ages[key[2]]
            while queue:
                time, stretch = queue[0]
                current = (stretch.time, stretch.kind, stretch.at) == (time, kind, at)
                if current and time + EDGES[at + 1] > now:
                    heappush(due, (time + EDGES[at + 1], next(self._tie), key[2]))
                    break
                queue.popleft()
                if current and stretch.blocks and not stretch.closed:
                    self._move(stretch, max(at + 1, bin_of(now - time)))
                    self._queue(stretch)
                    self._tell(stretch)

    def _tell(self, stretch: Stretch) -> None:
        for follower in self.followers:
            follower.moved(stretch)
