"""Which blocks go when a tier needs a slot: the policy's order, and whole extents where slot classes differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from kvstore.families import NONE
from kvstore.policy import EvictionPolicy


class Slots(Protocol):
    """What both tiers tell about their slots."""

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """Whether freeing ``address`` makes room for ``slot_bytes``."""

    def neighbours(self, address: int) -> Sequence[int]:
        """Addresses in use in the same extent."""


def victims(
    slot_bytes: int,
    tier: Slots,
    policy: EvictionPolicy,
    address_of: Callable[[int], int],
    known: Iterable[int],
) -> Iterator[list[int]]:
    """Sets of blocks whose going together makes room for a slot of class ``slot_bytes``, best victims first.

    ``address_of`` gives the slot of a block that may go, NONE for one that has to stay; ``known`` are all blocks that
    may have a slot in the tier. The caller evicts each set, children first as given, before it asks for the next.
    """
    tried: set[int] = set()
    while True:
        group: list[int] = []
        for number in policy.victims():
            if number in tried:
                continue
            tried.add(number)
            address = address_of(number)
            if address == NONE:
                continue
            same = tier.same_class(address, slot_bytes)
            group = [number] if same else _around(tier.neighbours(address), address_of, known)
            if group:
                break
        if not group:
            return
        yield group


def _around(addresses: Sequence[int], address_of: Callable[[int], int], known: Iterable[int]) -> list[int]:
    """The blocks at ``addresses``, children first; empty when one of them has to stay."""
    wanted = set(addresses)
    group = [number for number in known if address_of(number) in wanted]
    return sorted(group, reverse=True) if len(group) == len(wanted) else []
