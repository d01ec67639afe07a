"""What is kept in a tier on somebody's word: pins and retentions. The store's lock guards every call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol

PIN_SHARE, RETAIN_SHARE = 1 / 2, 1 / 4  # of a tier's capacity, at most; the rest is there for everybody else
FEW_ENDED = 64  # so many keeps that are over are not worth looking for


class Sized(Protocol):
    """A tier, as far as its size is concerned."""

    @property
    def capacity(self) -> int:
        """Bytes of all its slots, at most."""


class Account:
    """The blocks that are kept in one tier under one bound, in bytes of their slots."""

    def __init__(self, tier: str, limit: int) -> None:
        self.tier, self.limit, self.bytes = tier, limit, 0
        self.sizes: dict[int, int] = {}  # by block
        self._times: dict[int, int] = {}  # how many keeps each has

    def fits(self, number: int, size: int) -> bool:
        """Whether a block of this size can be kept, too."""
        return number in self.sizes or self.bytes + size <= self.limit

    def take(self, number: int, size: int) -> None:
        """One keep more for a block."""
        self._times[number] = self._times.get(number, 0) + 1
        if number not in self.sizes:
            self.sizes[number] = size
            self.bytes += size

    def drop(self, number: int) -> None:
        """One keep less for a block."""
        self._times[number] -= 1
        if not self._times[number]:
            del self._times[number]
            self.bytes -= self.sizes.pop(number)


class Keep:
    """One pin or one retention: until when (Unix seconds) each of its blocks is kept, root first, the root longest."""

    __slots__ = ("accounts", "last", "period", "until")

    def __init__(self, accounts: Sequence[Account], last: float, period: float = 0.0) -> None:
        """``period``: seconds that each use of a block adds, up to ``last``; 0: uses add nothing."""
        self.accounts, self.last, self.period = accounts, last, period
        self.until: dict[int, float] = {}


class Keeping:
    """Which blocks stay where they are, and how long. A block that leaves the store is kept no more."""

    def __init__(self, tiers: Mapping[str, Sized | None]) -> None:
        """``tiers``: "host", and "disk" and "device" where there is one."""
        capacities = {name: tier.capacity for name, tier in tiers.items() if tier is not None}
        self.last = "disk" if "disk" in capacities else "host"  # the tier below which there is none
        self.pins = {tier: Account(tier, int(size * PIN_SHARE)) for tier, size in capacities.items()}
        self.retained = Account(self.last, int(capacities[self.last] * RETAIN_SHARE))
        self._of: dict[int, list[Keep]] = {}  # by block
        self._heap: list[tuple[float, int, Keep]] = []  # when to look at each again
        self._tie = count()
        self._over = 0  # keeps that ended since the heap was last without such

    def resize(self, tier: str, capacity: int) -> int:
        """A tier gets another capacity, unless too much is kept there for it; then returns how many bytes."""
        accounts = {self.pins[tier]: int(capacity * PIN_SHARE)}
        if tier == self.last:
            accounts[self.retained] = int(capacity * RETAIN_SHARE)
        if any(account.bytes > limit for account, limit in accounts.items()):
            return sum(account.bytes for account in accounts)
        for account, limit in accounts.items():
            account.limit = limit
        return 0

    def stays(self, tier: str, number: int) -> bool:
        """Whether a block is not to be evicted from a tier. O(1)."""
        return number in self.pins[tier].sizes or (tier == self.last and number in self.retained.sizes)

    def kept(self, tier: str) -> Set[int]:
        """All blocks that are not to be evicted from a tier."""
        pinned = self.pins[tier].sizes.keys()
        return pinned | self.retained.sizes.keys() if tier == self.last else pinned

    def add(self, keep: Keep, number: int, size: int, until: float) -> Account | None:
        """A block of this size joins a keep, behind those that did before. Returns the account that has no room for it;
        then nothing has changed."""
        for account in keep.accounts:
            if not account.fits(number, size):
                return account
        keep.until[number] = until
        self._of.setdefault(number, []).append(keep)
        for account in keep.accounts:
            account.take(number, size)
        return None

    def begin(self, keep: Keep) -> None:
        """A keep has all its blocks: its time runs."""
        if keep.until:
            heappush(self._heap, (next(reversed(keep.until.values())), next(self._tie), keep))

    def use(self, chain: Iterable[int], now: float) -> None:
        """A match found these blocks, root first: pins on them live on."""
        if not self._of:
            return
        for number in chain:
            for keep in self._of.get(number, ()):
                if keep.period:
                    keep.until[number] = max(keep.until[number], min(now + keep.period, keep.last))

    def expire(self, now: float) -> int:
        """Ends what is over by now; returns how many pins ended whole."""
        ended = 0
        while self._heap and self._heap[0][0] <= now:
            keep = heappop(self._heap)[2]
            over = [number for number, until in keep.until.items() if until <= now]
            for number in over:
                self.drop(keep, number)
            if over and not keep.until and keep.period:
                ended += 1
            self.begin(keep)
        return ended

    def drop(self, keep: Keep, number: int) -> None:
        """A block leaves a keep."""
        del keep.until[number]
        keeps = self._of[number]
        keeps.remove(keep)
        if not keeps:
            del self._of[number]
        for account in keep.accounts:
            account.drop(number)
        self._over += not keep.until
        if self._over > len(self._heap) // 2 + FEW_ENDED:
            self._over = 0
            self._heap = [entry for entry in self._heap if entry[2].until]
            heapify(self._heap)

    def end(self, keep: Keep) -> None:
        """A keep is over before its time; again is no error."""
        for number in list(keep.until):
            self.drop(keep, number)

    def gone(self, number: int) -> None:
        """A block left the store."""
        for keep in list(self._of.get(number, ())):
            self.drop(keep, number)

    def let_go(self, number: int, tiers: Set[str]) -> None:
        """Nothing keeps a block in these tiers any more."""
        for keep in list(self._of.get(number, ())):
            if any(account.tier in tiers for account in keep.accounts):
                self.drop(keep, number)

    def pass_on(self, number: int, successor: int) -> None:
        """A block takes the place of another that is about to leave the store: it is kept as that was."""
        for keep in self._of.get(number, ()):
            keep.until[successor] = keep.until[number]
            self._of.setdefault(successor, []).append(keep)
            for account in keep.accounts:
                account.take(successor, account.sizes[number])
