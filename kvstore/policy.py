"""Port of eviction policies: pure Python, no I/O; the same objects run in the store and in a simulator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

Clock = Callable[[], float]  # seconds since any moment; a simulator's runs on its own


class Arrival(NamedTuple):
    """What a policy is told of a block that comes in."""

    size: int  # bytes that it takes
    tokens: int  # that it holds
    name: Hashable  # the same whenever the same tokens come in behind the same ones, however long they were away
    parent: int  # the block before it in its chain, known to the policy or not; below 0: none


class EvictionPolicy(Protocol):
    """Orders the blocks of one tier. Called under the store's lock: never blocks, never calls back.

    Blocks are small ints, which are used again for other blocks after ``remove``. A request is seen as: ``touch`` of
    what it found, an ``insert`` for each block that it brought, and ``arrange`` of its whole chain, ``served``.
    """

    def insert(self, block: int, arrival: Arrival) -> None:
        """A block came in, before or after its parent. One that is known already is only resized."""

    def touch(self, chain: Sequence[int]) -> None:
        """A request used these blocks, root first, each once. Blocks that are not known are skipped."""

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        """These blocks, root first, are one chain; no further use of them. Blocks that are not known are skipped.
        ``served``: this is the whole chain of a request that is over, as it left it."""

    def remove(self, block: int) -> None:
        """A block went away. Unknown blocks are no error."""

    def victims(self) -> Iterator[int]:
        """All blocks in the order in which to evict them, each after those that stand behind it in its chains.

        The caller may stop anywhere, and lets go of the iterator before it calls anything else; it then removes what it
        evicts through ``remove``, and asks again for more.
        """

    def admits(self, block: int) -> bool:
        """Whether a block that is known to this policy deserves a place (a write to disk), when the tier is full."""

    def state(self) -> str:
        """What was learned, for ``learn`` of a later policy of its kind; empty when nothing was."""

    def learn(self, state: str) -> None:
        """Takes in a ``state``. One that it cannot read is ignored."""

    def __len__(self) -> int:
        """Number of blocks known."""
