"""Finds what is stored of a prompt."""

from __future__ import annotations

from kvstore.families import NONE
from kvstore.keys import TOKEN_BYTES, Namespace
from kvstore.known import Known
from kvstore.layout import Layout
from kvstore.lease import Lease
from kvstore.match import Match
from kvstore.residency import Residency
from kvstore.room import tier_of


class Finder:
    """Makes matches. One per store."""

    def __init__(self, residency: Residency, known: Known) -> None:
        self._residency, self._known = residency, known

    def match(self, namespace: Namespace, layout: Layout, tokens: bytes, root: bytes, first: int, whole: bool) -> Match:
        """See ``Store.match``."""
        residency = self._residency
        limit = max(len(tokens) // TOKEN_BYTES - (not whole), 0)
        with residency.lock:
            residency.settle()
            now = residency.wall()
            index = residency.index
            found = index.find(namespace, root, layout, tokens, limit, now)
            blocks = [(number, layout.block_tokens) for number in found.blocks]
            if found.partial != NONE:
                blocks.append((found.partial, found.partial_tokens))
            residency.keeping.use((number for number, _ in blocks), now)
            skipped = min(first // layout.block_tokens, len(blocks))
            del blocks[:skipped]
            numbers = [number for number, _ in blocks]
            residency.hold(numbers)
            residency.host_policy.touch(numbers)
            residency.disk_policy.touch(numbers)
            tiers = [tier_of(residency, number) for number in numbers]
            if residency.disk is not None:
                residency.disk.touch([index.sequence[n] for n in numbers if n not in residency.residents], now)
            miss = self._known.explain(namespace, found.tokens, limit, index.chains(root))
        residency.counters.add("matched_tokens", found.tokens)
        residency.counters.add("asked_tokens", limit)
        lease = Lease(numbers, residency.lease_ended)
        skipped *= layout.block_tokens
        held = tokens[skipped * TOKEN_BYTES : found.tokens * TOKEN_BYTES]
        return Match(layout, blocks, lease, found.tokens, tiers, miss, held, skipped)
