"""PACE, prefix-aware conditional expectation: what is least likely to come back soon goes first, as was learned."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from kvstore.policies.heap import Heap
from kvstore.policies.history import History, Stretch
from kvstore.policies.leaves import NONE, Leaves
from kvstore.policy import Arrival, Clock

_PATIENCE = 300.0  # seconds in which a request is expected to be over
Key = tuple[tuple[int, ...], int]  # class and bin of age
Ranked = tuple[tuple[float, int], int]  # worth and stamp of a block
_UNLEARNED: Key = ((), 0)


class Pace:
    """Evicts the leaf with the lowest worth (``hazard.gittins``); of those of one class and age, the oldest.

    Leaves lie in buckets by class and bin of age, and the buckets in order of worth; so a change of worth, or of age,
    costs what it moves. Until enough was seen, all lie in one bucket, and the policy is LRU. Policies of several tiers
    share one ``history``, which the one that sees every request ``leads``.
    """

    def __init__(self, clock: Clock, history: History | None = None, leads: bool = True) -> None:
        self._clock, self._leads = clock, leads
        self.history = history or History()
        self.history.followers.append(self)
        self._leaves = Leaves()
        self._stamps: array[int] = self._leaves.integers()  # of the last use; of a chain, the root's is the latest
        self._stamp = 0
        self._keys: list[Key] = [_UNLEARNED]
        self._numbers = {_UNLEARNED: 0}
        self._buckets = [Heap()]
        self._order = Heap()  # buckets that are not empty, by worth
        self._place: dict[int, tuple[int, Stretch]] = {}  # bucket and stretch of each leaf
        self._of: dict[Stretch, set[int]] = {}  # leaves of each stretch
        self._fresh: list[int] = []  # blocks that may be leaves and have no place yet
        self._learned = False
        self._unserved: OrderedDict[int, tuple[float, Sequence[int]]] = OrderedDict()  # used chains, by last block

    @classmethod
    def pair(cls, clock: Clock) -> tuple[Pace, Pace]:
        """Those of memory, which sees every request, and of the disk behind it."""
        history = History()
        return cls(clock, history), cls(clock, history, leads=False)

    def insert(self, block: int, arrival: Arrival) -> None:
        """See ``EvictionPolicy``. O(log n)."""
        if not self._leaves.add(block, arrival.parent):
            return
        self.history.know(block, arrival, self._clock())
        if arrival.parent in self._place:
            self._take_out(arrival.parent)
        self._stamp += 1
        self._stamps[block] = self._stamp
        self._fresh.append(block)  # it will have a place when its chain is arranged; most have children by then

    def touch(self, chain: Sequence[int]) -> None:
        """See ``EvictionPolicy``. O(len(chain))."""
        for block in reversed(chain):
            if block in self._leaves:
                self._use(block)
        if self._leads and chain:
            self._unserved[chain[-1]] = self._clock(), chain

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        """See ``EvictionPolicy``. O(len(chain))."""
        if served and self._leads:
            for block in chain:
                self._unserved.pop(block, None)
            self._serve(chain, self._clock())
        for block in reversed(chain):
            if block in self._leaves:
                self._use(block)
        self._settle()

    def _settle(self) -> None:
        """Gives a place to those that have none."""
        fresh, self._fresh = self._fresh, []
        for block in fresh:
            if block in self._leaves and self._leaves.is_leaf(block) and block not in self._place:
                self._put(block)

    def _serve(self, chain: Sequence[int], now: float) -> None:
        self.history.advance(now)
        self.history.serve(chain, now)

    def remove(self, block: int) -> None:
        """See ``EvictionPolicy``. O(log n)."""
        if block not in self._leaves:
            return
        self._take_out(block)
        self._unserved.pop(block, None)  # the number may soon be another's
        self.history.leave(block)
        parent = self._leaves.discard(block)
        if parent != NONE:
            self._put(parent)

    def victims(self) -> Iterator[int]:
        """See ``EvictionPolicy``. O(log n) for each."""
        self._settle()
        now = self._clock()
        while self._unserved and (first := next(iter(self._unserved.values())))[0] < now - _PATIENCE:
            self._unserved.popitem(last=False)
            self._serve(first[1], first[0])  # its request only read
        self.history.advance(now)
        return self._walk()

    def _walk(self) -> Iterator[int]:
        gone: dict[int, int] = {}
        later: list[Ranked] = []  # blocks that are leaves for this walk only
        leaves, head = self._in_order(), None
        while (head := head or next(leaves, None)) or later:
            if later and (head is None or later[0] < head):
                block = heappop(later)[1]
            else:
                assert head is not None
                block, head = head[1], None
            yield block
            parent = self._leaves.uncovered(block, gone)
            if parent != NONE:
                heappush(later, ((self._worth_of(parent), self._stamps[parent]), parent))

    def _in_order(self) -> Iterator[Ranked]:
        buckets = self._order.walk()
        while (number := buckets.next()) != NONE:
            worth, bucket = self._worth(self._keys[number]), self._buckets[number].walk()
            while (block := bucket.next()) != NONE:
                yield (worth, self._stamps[block]), block

    def admits(self, block: int) -> bool:
        """See ``EvictionPolicy``: it is worth more than what would go for it."""
        if not self._learned:
            return True
        first = next(self.victims(), NONE)
        return first == NONE or self._worth_of(block) > self._worth_of(first)

    def state(self) -> str:
        """See ``EvictionPolicy``."""
        return self.history.hazards.state() if self._learned and self._leads else ""

    def learn(self, state: str) -> None:
        """See ``EvictionPolicy``."""
        if self.history.hazards.learn(state):
            self.history.learned = True
            for follower in self.history.followers:
                follower.fitted()

    def __len__(self) -> int:
        return len(self._leaves)

    # -- a follower of the history -----------------------------------------------------------------------------------

    def moved(self, stretch: Stretch) -> None:
        """See ``Follower``. O(leaves of the stretch)."""
        for block in list(self._of.get(stretch, ())):
            self._put(block)

    def fitted(self) -> None:
        """See ``Follower``. O(buckets); once O(leaves)."""
        if self.history.learned and not self._learned:
            self._learned = True
            self._settle()
            for block in list(self._place):
                self._put(block)
        for number, bucket in enumerate(self._buckets):
            if bucket:
                self._order.put(number, self._worth(self._keys[number]))

    # -- leaves in their buckets -------------------------------------------------------------------------------------

    def _use(self, block: int) -> None:
        self._stamp += 1
        self._stamps[block] = self._stamp
        if self._leaves.is_leaf(block):
            self._put(block)

    def _put(self, block: int) -> None:
        """A leaf lies where it belongs, from now on."""
        stretch = self.history.of(block)
        key = self._key(stretch)
        number = self._numbers.get(key, NONE)
        if number == NONE:
            number = self._numbers[key] = len(self._keys)
            self._keys.append(key)
            self._buckets.append(Heap())
        if self._place.get(block) != (number, stretch):
            self._take_out(block)
            self._place[block] = number, stretch
            self._of.setdefault(stretch, set()).add(block)
        bucket = self._buckets[number]
        if not bucket:
            self._order.put(number, self._worth(key))
        bucket.put(block, self._stamps[block])

    def _take_out(self, block: int) -> None:
        number, stretch = self._place.pop(block, (NONE, None))
        if stretch is None:
            return
        bucket, leaves = self._buckets[number], self._of[stretch]
        bucket.drop(block)
        if not bucket:
            self._order.drop(number)
        leaves.remove(block)
        if not leaves:
            del self._of[stretch]

    def _key(self, stretch: Stretch) -> Key:
        return (stretch.kind, stretch.at) if self._learned else _UNLEARNED

    def _worth_of(self, block: int) -> float:
        return self._worth(self._key(self.history.of(block)))

    def _worth(self, key: Key) -> float:
        return self.history.hazards.worth(*key) if self._learned else 0.0
