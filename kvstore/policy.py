"""Port of eviction policies: pure Python, no I/O; the same objects run in the store and in a simulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """Orders the blocks of one tier. Called under the store's lock: never blocks, never calls back.

    Blocks are small ints. The order must be leaf-first: as long as ``touch`` is given chains, no block comes out of
    ``victims`` before a block that stands behind it in a chain.
    """

    def insert(self, block: int, size: int) -> None:
        """A block came in. Its chain is touched right afterwards. A block already known is only resized."""

    def touch(self, chain: Sequence[int]) -> None:
        """The blocks of a chain, root first, were used. Blocks that are not known are skipped."""

    def remove(self, block: int) -> None:
        """A block went away. Unknown blocks are no error."""

    def victims(self) -> Iterator[int]:
        """Blocks in the order in which to evict them. The caller may stop anywhere; it removes what it evicts
        through ``remove`` after it has stopped iterating."""

    def __len__(self) -> int:
        """Number of blocks known."""
