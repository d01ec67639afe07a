"""Finds what is stored of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.families import NONE
from kvstore.index import Found, Index
from kvstore.keys import APART, TOKEN_BYTES, Namespace, links
from kvstore.kinds import Kind, Origin
from kvstore.known import Known
from kvstore.layout import Layout
from kvstore.lease import Lease
from kvstore.match import Match, Miss, without
from kvstore.remote.block import RemoteBlock
from kvstore.remote.tier import RemoteTier
from kvstore.residency import Residency
from kvstore.room import tier_of

Link = tuple[bytes, bytes, bytes]  # see ``links``


class Finder:
    """Makes matches. One per store."""

    def __init__(self, residency: Residency, known: Known, remote: RemoteTier | None = None) -> None:
        self._residency, self._known, self._remote = residency, known, remote

    def match(self, namespace: Namespace, layout: Layout, tokens: bytes, root: bytes, first: int, whole: bool) -> Match:
        """See ``Store.match``."""
        residency = self._residency
        limit = max(len(tokens) // TOKEN_BYTES - (not whole), 0)
        chain, elsewhere, size = list[Link](), list[RemoteBlock](), layout.block_tokens * TOKEN_BYTES
        lacking, asks = list[int](), self._remote is not None and len(tokens) >= size and self._remote.seeker.asks()
        if asks or root == APART:
            chain = list(links(namespace, root, tokens[: len(tokens) // size * size], size))
        if asks and self._remote is not None:
            elsewhere = self._elsewhere(self._remote, namespace, layout, chain)
        with residency.lock:
            residency.settle()
            now = residency.wall()
            index = residency.index
            added = self._add(elsewhere, now)
            if root == APART:
                found, lacking = _apart(index, layout, chain, now)
            else:
                found = index.find(namespace, root, layout, tokens, limit, now, [key for _, key, _ in chain])
            blocks = [(number, layout.block_tokens) for number in found.blocks]
            if found.partial != NONE:
                blocks.append((found.partial, found.partial_tokens))
            residency.keeping.use((number for number, _ in blocks), now)
            skipped = min(first // layout.block_tokens, len(blocks))
            del blocks[:skipped]
            numbers = [number for number, _ in blocks]
            residency.hold(numbers)
            for number in added:
                if number not in index.leases:
                    residency.drop_remote(number)
            residency.host_policy.touch(numbers)
            residency.disk_policy.touch(numbers)
            residency.uses.use(numbers, now)
            tiers = [tier_of(residency, number) for number in numbers]
            origins = [index.kind_of(number).origin for number in numbers]
            if residency.disk is not None:
                used = [n for n in numbers if n not in residency.residents and n not in index.remote]
                residency.disk.touch([index.sequence[n] for n in used], now)
            if root == APART:
                miss = _miss_apart(len(chain), lacking)
            else:
                miss = self._known.explain(namespace, found.tokens, limit, index.chains(root))
        residency.counters.add("matched_tokens", found.tokens)
        residency.counters.add("asked_tokens", limit)
        lease = Lease(numbers, residency.lease_ended)
        skipped *= layout.block_tokens
        held = without(tokens, size, lacking)[skipped * TOKEN_BYTES : found.tokens * TOKEN_BYTES]
        match = Match(layout, blocks, lease, found.tokens, tiers, miss, held, skipped, lacking, origins)
        for tier, hits in match.tokens_by_tier.items():
            if hits:
                residency.counters.add(f"{tier}_hit_tokens", hits)
        return match

    def _elsewhere(
        self,
        remote: RemoteTier,
        namespace: Namespace,
        layout: Layout,
        chain: Sequence[Link],
    ) -> list[RemoteBlock]:
        """What the remote tier has of the blocks that are missing here, up to the first that it has not. Not locked."""
        residency, keys = self._residency, [key for _, key, _ in chain]
        missing, found = list[int](), dict[bytes, RemoteBlock]()
        with residency.lock:
            index = residency.index
            for at, key in enumerate(keys):
                number = index.number.get(key, NONE)
                if number in index.remote:  # as long as others hold it
                    found[key] = index.remote[number]
                if number == NONE or number in index.remote or not index.present(number):
                    missing.append(at)
        asked = [keys[at] for at in missing if keys[at] not in found]
        found |= remote.seeker.leading(asked) if asked else {}
        blocks = list[RemoteBlock]()
        for at in missing:
            above, key, piece = chain[at]
            block = found.get(key)
            place = at * layout.block_tokens
            if block is None or remote.hides(block) or not block.is_of(namespace, layout, above, piece, place):
                break
            blocks.append(block)
        return blocks

    def _add(self, blocks: Sequence[RemoteBlock], now: float) -> list[int]:
        """Makes blocks of the remote tier known, behind each other or behind what is stored here, as far as they are
        not by now; the caller takes leases. Their numbers, the last one first. Locked."""
        residency, index, added = self._residency, self._residency.index, list[int]()
        for block in blocks:
            header = block.header
            number, parent = index.number.get(header.key, NONE), index.number.get(header.parent, NONE)
            if header.root:
                parent = index.root(header.parent)
            if parent == NONE or (header.expires and header.expires <= now):
                break
            if number != NONE and index.present(number):
                continue
            if number != NONE and not index.same(number, parent, header.tokens):
                break  # cannot be, unless the hash is broken
            origin = Origin(header.form, header.writer)
            kind = index.intern(
                Kind(header.namespace, header.fingerprint, header.tenant, header.owner, header.layout, origin)
            )
            sequence = next(residency.sequences)
            if number == NONE:
                count = header.token_count
                number = index.insert(header.key, parent, kind, count, sequence, header.created, header.expires)
            else:  # absent, kept for its children
                index.renew(number, kind, sequence, header.created, header.expires)
            residency.put_remote(number, block)
            added.insert(0, number)
        return added


def _apart(index: Index, layout: Layout, chain: Sequence[Link], now: float) -> tuple[Found, list[int]]:
    """Of blocks that are chains of their own, those that are stored; and the numbers, here, of those that are not."""
    blocks, lacking = list[int](), list[int]()
    for at, (above, key, piece) in enumerate(chain):
        number = index.number.get(key, NONE)
        if (
            number != NONE
            and index.serves(number, now)
            and index.same_layout(number, layout)
            and index.tokens.get(number, piece) == piece
            and index.parent[number] == index.root(above)
        ):
            blocks.append(number)
        else:
            lacking.append(at)
    return Found(blocks, NONE, 0, len(blocks) * layout.block_tokens), lacking


def _miss_apart(asked: int, lacking: Sequence[int]) -> Miss:
    if not lacking:
        return Miss("complete", asked, f"all {asked} blocks are cached")
    return Miss("parts", lacking[0], f"{len(lacking)} of {asked} blocks are not cached, block {lacking[0]} the first")
