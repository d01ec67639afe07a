"""A cache of blocks without their bytes: the policy sees what it would see in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.bench.simulate.requests import Request
from kvstore.policies.look_ahead import LookAhead
from kvstore.policies.shadow import Shadow
from kvstore.policy import Clock, EvictionPolicy


class Cache:
    """Holds ``capacity`` blocks between requests, all of one size, with a policy that runs on the trace's time.

    What a request brings has room beside them while it is served, as in the store, which keeps some slots free for
    that (``kvstore.room.KEEP_FREE``); then everything may go, what just came too.
    """

    def __init__(self, make: Callable[[Clock], EvictionPolicy], capacity: int, block_tokens: int) -> None:
        self._time = 0.0
        self._block_tokens = block_tokens
        self._policy = LookAhead(make(lambda: self._time))
        self._shadow = Shadow(self._policy, capacity)

    @property
    def evictions(self) -> int:
        """Blocks that went."""
        return self._shadow.evictions

    @property
    def stored(self) -> int:
        """Blocks that came in."""
        return self._shadow.stored

    def serve(self, request: Request, queue: Sequence[Request] = ()) -> int:
        """How many leading blocks are there; all of the prompt's are stored then, as far as there is room.

        ``queue``: requests that are known to come, the nearest first, this one among them; what they will find goes
        last.
        """
        self._time = request.time
        if queue:
            self._policy.schedule([self._shadow.present(waiting.blocks) for waiting in queue])
        return self._shadow.request(request.blocks, list(request.sizes(self._block_tokens)))
