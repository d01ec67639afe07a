"""What a client holds of a daemon: leases, answers that are to come, drafts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

from kvstore.daemon.mapped import Mapped
from kvstore.errors import KVStoreError, Unreachable
from kvstore.hot import Hold


class Held(Sequence[int]):
    """What a lease of a client's holds, in words that the daemon knows: blocks from ``start`` on of a match or load."""

    def __init__(self, number: int, count: int, start: int = 0) -> None:
        self.number, self.start, self._count = number, start, count

    def __len__(self) -> int:
        return self._count - self.start

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> Held: ...

    def __getitem__(self, place: int | slice) -> int | Held:
        if isinstance(place, slice):
            first, last, _ = place.indices(len(self))
            return Held(self.number, self.start + last, self.start + first)
        return self.start + range(len(self))[place]


class Coming(Protocol):
    """Layers of a block that are on their way; see ``fetch.Fetch``."""

    def catch_up(self, ready: int) -> None:
        """These layers (bits) are there."""

    def fail(self) -> object:
        """The rest will not come."""

    def cancel(self) -> None:
        """Nor will it be known whether it could have come."""


def progress(coming: Coming, state: int) -> None:
    """What the daemon says of them: layers that are there, as bits, or below 0 that it failed."""
    if state < 0:
        coming.fail()
    else:
        coming.catch_up(state)


class Ended:
    """Loads that are over: their leases end when devices are done with what they read."""

    def __init__(self) -> None:
        self._holds = deque[Hold]()

    def add(self, hold: Hold) -> None:
        """Any thread, a finalizer's too; takes no lock."""
        self._holds.append(hold)

    def settle(self) -> bool:
        """Ends the leases of those that nothing reads any more; whether there are others. One thread."""
        for _ in range(len(self._holds)):
            hold = self._holds.popleft()
            hold.events = [event for event in hold.events if not event.done()]
            if hold.events:
                self._holds.append(hold)
            else:
                hold.lease.release()
        return bool(self._holds)

    def release(self) -> None:
        """Ends all of them."""
        while self._holds:
            self._holds.popleft().lease.release()


class Ticket:
    """An answer that comes when it comes."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._value: Any = None
        self._error: KVStoreError | None = None

    def settle(self, value: Any = None, error: KVStoreError | None = None) -> None:
        """It has come; what comes later means nothing."""
        if self._over.is_set():
            return
        self._value, self._error = value, error
        self._over.set()

    def wait(self, timeout: float | None) -> Any:
        """The answer. Raises what the daemon raised, or ``Unreachable``."""
        if not self._over.wait(timeout):
            raise Unreachable("the daemon did not finish in time")
        if self._error is not None:
            raise self._error
        return self._value


class Staging:
    """Slots that this client fills: the store that its drafts are of."""

    def __init__(
        self, arena: Callable[[int], Mapped], abandoned: Callable[[int], None], filled: Callable[[int], None]
    ) -> None:
        """``abandoned`` is told of dropped drafts, by finalizers; ``filled`` of those that hold a whole block."""
        self._arena, self.slot_abandoned, self.filled = arena, abandoned, filled
        self.places: dict[int, tuple[int, int, int]] = {}  # by number: arena, offset, bytes

    @property
    def host(self) -> Staging:
        """Where the drafts are."""
        return self

    def view(self, address: int) -> memoryview:
        """The slot's bytes."""
        number, offset, size = self.places[address]
        return self._arena(number).view[offset : offset + size]

    def pointer(self, address: int) -> int:
        """Where they begin."""
        number, offset, _ = self.places[address]
        return self._arena(number).base + offset
