"""Reads parts of blocks from the remote tier, in worker threads of its own: small ones together in one exchange."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Sequence
from itertools import count
from typing import Protocol

from kvstore.errors import TierError
from kvstore.metrics import Counters
from kvstore.mover import Mover, Priority
from kvstore.remote.breaker import Breaker
from kvstore.remote.options import RemoteOptions
from kvstore.tiers.base import Remote, Wanted

log = logging.getLogger("kvstore")

TOGETHER = 64  # parts that are read in one exchange, at most


class Order(Protocol):
    """Parts of one block that somebody wants."""

    @property
    def wanted(self) -> Sequence[Wanted]:
        """The parts."""

    @property
    def size(self) -> int:
        """Their bytes."""

    def begin(self) -> bool:
        """Whether they are still wanted, and nobody else has begun to read them."""

    def over(self, error: TierError | None, begin: float) -> bool:
        """They are where they were wanted, or not; the read began at ``begin`` (``time.perf_counter``). Whether they
        are what they should be, as far as they came."""


class Courier:
    """One per store with a remote tier. Any thread."""

    def __init__(
        self, remote: Remote, options: RemoteOptions, breaker: Breaker, mover: Mover, counters: Counters
    ) -> None:
        self._remote, self._options, self._breaker = remote, options, breaker
        self._mover, self._counters = mover, counters
        self._lock = threading.Lock()  # guards the fields below
        self._orders: list[tuple[Priority, tuple[int, ...], int, Order]] = []
        self._tie = count()

    def submit(self, priority: Priority, turn: tuple[int, ...], order: Order) -> bool:
        """Asks for parts; False once the store closes."""
        with self._lock:
            heapq.heappush(self._orders, (priority, turn, next(self._tie), order))
        return self._mover.submit(priority, turn, self._run)

    def _run(self) -> None:
        """Reads what is to come next: each order asked for one run, and each run takes as many orders as it can."""
        begun = [order for order in self._next() if order.begin()]
        if not begun:
            return
        begin, wanted = time.perf_counter(), [each for order in begun for each in order.wanted]
        errors: list[TierError | None] = [TierError("the read was given up")] * len(wanted)
        answered = False
        try:
            errors = self._read(wanted, sum(order.size for order in begun))
            answered = True
        except TierError as error:
            errors = [error] * len(wanted)
        finally:
            sound = self._hand_over(begun, errors, begin)
        if answered and sound:
            self._breaker.succeeded()
        elif answered:
            self._breaker.failed()

    def _hand_over(self, orders: Sequence[Order], errors: Sequence[TierError | None], begin: float) -> bool:
        """Tells all orders how it went, each even if one before it raises; whether all are what they should be."""
        if not orders:
            return True
        parts = len(orders[0].wanted)
        try:
            sound = orders[0].over(next((error for error in errors[:parts] if error is not None), None), begin)
        finally:
            others = self._hand_over(orders[1:], errors[parts:], begin)
        return sound and others

    def _next(self) -> list[Order]:
        taken, size = list[Order](), 0
        with self._lock:
            while self._orders and len(taken) < TOGETHER:
                order = self._orders[0][3]
                if taken and size + order.size > self._options.part_bytes:
                    break
                size += order.size
                taken.append(heapq.heappop(self._orders)[3])
        return taken

    def _read(self, wanted: Sequence[Wanted], size: int) -> list[TierError | None]:
        if not self._breaker.closed:
            raise TierError("the remote tier fails, and is left alone for a while")
        exchanges = max(1, -(-size // self._options.part_bytes))
        try:
            with self._mover.rates.moving("read", size):
                return self._remote.read(wanted, self._options.timeout * exchanges)
        except TierError as error:
            log.warning("blocks do not come from the remote tier: %s", error)
            self._counters.add("remote_failures")
            self._breaker.failed()
            raise
