"""The remote tier of a store: its parts, and their beginning and end."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from kvstore.mover import Mover, Priority
from kvstore.policies.cost import Line
from kvstore.remote.block import RemoteBlock
from kvstore.remote.breaker import Breaker
from kvstore.remote.courier import Courier
from kvstore.remote.options import RemoteOptions
from kvstore.remote.seeker import Seeker
from kvstore.remote.sender import Sender
from kvstore.remote.withdrawal import SECONDS, Wish, Withdrawal
from kvstore.residency import Residency
from kvstore.tiers.base import Remote

ASKING, MOVING = 2, 4  # threads that look up, and that read and write


class RemoteTier:
    """One per store. Its threads are its own: however slow the other side is, disk and memory work on."""

    def __init__(self, residency: Residency, remote: Remote, options: RemoteOptions) -> None:
        """Returns at once; whether anybody answers is found out beside."""
        self._residency, self._remote, self._options = residency, remote, options
        counters = residency.counters
        self._breaker = Breaker(remote.reset, self._mended)
        self._asking, self._moving = (Mover(workers, self._broken) for workers in (ASKING, MOVING))
        self.seeker = Seeker(remote, options, self._breaker, self._asking, counters)
        self.courier = Courier(remote, options, self._breaker, self._moving, counters)
        self._sender = Sender(residency, remote, options, self._breaker, self._moving, self.seeker)
        self._withdrawal = Withdrawal(remote, counters)
        self.seeker.greet()

    def _broken(self) -> None:
        self._residency.counters.add("failed_jobs")

    def _mended(self) -> None:
        """It answers again."""
        if self._withdrawal.pending:
            self._asking.submit(Priority.PREFETCH, (1,), self._withdraw_again)

    def _withdraw_again(self) -> None:
        self._withdrawal.run()

    @property
    def reads(self) -> Line | None:
        """How quickly it is read; None when that is not known."""
        return self._moving.rates.reads

    def withdraw(self, wish: Wish) -> tuple[int, int]:
        """Has blocks forgotten there, too; what was forgotten here is not written there any more. How many were there,
        and 1 if some may be left. Not locked."""
        self._withdrawal.add(wish)
        self.seeker.clear()
        return self._withdraw(SECONDS)

    def _withdraw(self, seconds: float) -> tuple[int, int]:
        gone, over = [0], threading.Event()

        def job() -> None:
            try:
                gone[0] = self._withdrawal.run(seconds)
            finally:
                over.set()

        # In a thread: the system's own look-up of names keeps to no bounds.
        if not self._asking.submit(Priority.DEMAND, (1,), job) or not over.wait(seconds + 1.0):
            return 0, 1
        return gone[0], min(self._withdrawal.pending, 1)

    def hides(self, block: RemoteBlock) -> bool:
        """Whether a block that is there is to be forgotten."""
        return self._withdrawal.hides(block.header)

    def let_go(self, numbers: set[int]) -> None:
        """These blocks are about to be forgotten. Locked."""
        self._sender.let_go(numbers)

    def account(self) -> dict[str, int]:
        """The tier's part of ``Store.stats``: blocks that this store knows to be there, and their payload; capacity and
        use are of all hosts together, 0 where nobody counts. Locked."""
        blocks, size = self._sender.account()
        said = self._remote.gauges()
        return {"bytes": size, "blocks": blocks, "capacity": said["capacity"], "used": said["used"]}

    def gauges(self) -> Mapping[str, int]:
        """How it is. Locked."""
        said = self._moving.rates.gauges()
        speeds = {
            f"remote_{kind}_bytes_per_second": said[f"disk_{kind}_bytes_per_second"] for kind in ("read", "write")
        }
        state = {"remote_breaker_open": int(not self._breaker.closed), "remote_queued_write_bytes": self._sender.queued}
        return {**speeds, **state, "remote_pending_erases": self._withdrawal.pending}

    def counters(self) -> Mapping[str, int]:
        """What it counts itself."""
        return {"remote_breaker_opens": self._breaker.opens, "remote_refused_parts": self._remote.gauges()["refused"]}

    def flush(self, timeout: float | None) -> bool:
        """Waits until what is to be shared is; False when the time was not enough."""
        return self._sender.flush(timeout)

    def close(self) -> None:
        """Ends the threads. What they were at fails, within moments: nothing comes any more."""
        if self._withdrawal.pending and self._breaker.closed:
            self._withdraw(self._options.timeout)
        self._remote.close()
        self._asking.close()
        self._moving.close()
        self._sender.abort()
