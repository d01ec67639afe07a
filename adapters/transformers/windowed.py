"""Conversations that may outgrow the context: caches of constant size for a joined model, filled from its store."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.adapters.transformers.batch import Prompts, lay_out
from kvstore.adapters.transformers.gather import Gather, Span
from kvstore.adapters.transformers.hit import Hit
from kvstore.adapters.transformers.joined import Joined
from kvstore.adapters.transformers.rotated import cut, writers_of
from kvstore.adapters.transformers.rotation import Rotation
from kvstore.adapters.transformers.row import Row, Seat
from kvstore.adapters.transformers.timeline import LOAD
from kvstore.adapters.transformers.window import WindowCache
from kvstore.adapters.transformers.window_recorder import WindowRecorder, chains
from kvstore.errors import Unsupported
from kvstore.keys import Namespace
from kvstore.load import Load
from kvstore.match import Miss
from kvstore.policies.overflow import Window


class Part(NamedTuple):
    """What is kept of a chain in one piece, and the column that it begins at."""

    number: int  # of the chain
    first: int
    stop: int
    column: int


class Stored(NamedTuple):
    """The first ``read`` tokens of a history, of which all that is kept is under way from the store."""

    read: int
    parts: list[Part]
    loads: list[Load]
    skipped: list[int]  # leading tokens of the chain that are no part of the load

    @property
    def columns(self) -> int:
        """How many tokens are kept."""
        return sum(part.stop - part.first for part in self.parts)

    def tiers(self) -> dict[str, int]:
        """How many tokens come from which tier."""
        found: dict[str, int] = {}
        for part, load, skipped in zip(self.parts, self.loads, self.skipped, strict=True):
            for tier, tokens in load.tokens_by_tier(part.stop - skipped, part.first - skipped).items():
                found[tier] = found.get(tier, 0) + tokens
        return found

    def release(self) -> None:
        """End the leases."""
        for load in self.loads:
            load.release()


class Windowed:
    """A joined model with a policy for what stays. Raises ``Unsupported`` with the reason where it cannot be.

    What is kept was computed seeing what has been dropped since, so an answer is not that of a model which reads
    only the kept tokens. It does not depend on how the history was cut into turns, but for the last bits.
    """

    def __init__(self, joined: Joined, policy: Window) -> None:
        if joined.windows:
            raise Unsupported(
                "this model has layers with sliding windows of their own, which drop tokens already; "
                "only full attention can be given a window"
            )
        if "shifted" not in joined.attached.supports:
            raise Unsupported("this model's keys are not the same at other positions, so that none can move up")
        self._joined, self._policy = joined, policy

    def cache(self, tenant: str = "", stamp: object = None) -> WindowCache:
        """An empty one, of which nothing is stored; pass it as ``past_key_values`` to the model or to ``generate``."""
        joined = self._joined
        return WindowCache(joined.owner(), joined.decoder, self._policy, joined.attached, tenant, stamp)

    def hit(self, prompts: Prompts, tenant: str, changed: str | None) -> Hit:
        """What is kept of a history, as far as it is stored. ``changed``: why nothing may be reused or recorded."""
        if len(prompts.rows) != 1:
            raise Unsupported(f"a windowed conversation is one sequence, not {len(prompts.rows)}; give them one by one")
        joined, history = self._joined, prompts.rows[0]
        namespace = Namespace(joined.fingerprint, tenant)

        def row(history: Sequence[int], stored: int) -> Row:
            chain = chains(history, self._policy)[-1]
            before = history[: len(history) - len(chain)]
            seat = Seat(before, root=chain.context.root(namespace))
            return joined.row(array("I", chain.token_ids).tolist()[:stored], seat)

        cache = self.cache(tenant, joined.stamp if changed is None else changed)
        stored, miss = self._find(history, namespace) if changed is None else (NONE, Miss("changed", 0, changed))
        tiers, writers = stored.tiers(), writers_of(stored.loads)
        first = row(history[: stored.read], len(history))
        if not self._fill(cache, stored, first):
            stored, first, tiers, writers = NONE, row([], 0), {}, ()
        recorder = WindowRecorder(history[: stored.read], self._policy, first, row)
        cache.record(recorder)
        if changed is not None:
            recorder.end_all(changed)
        plan = lay_out(prompts, stored.read, [stored.read], joined.attached.specs[0].device)
        return Hit(cache, stored.read, miss, tiers, plan, writers=writers)

    def _find(self, history: Sequence[int], namespace: Namespace) -> tuple[Stored, Miss]:
        """The longest part of a history of which all that is kept is stored, and why it ends there."""
        made, read = chains(history, self._policy), len(history) - 1
        miss: Miss | None = None
        while True:
            stored = Stored(read, self._parts(read), [], [])
            for part in stored.parts:
                chain = made[part.number].upto(part.stop)
                good, why = self._load(stored, part, chain.token_ids, chain.context.root(namespace), namespace)
                if good < part.stop:
                    read = part.number * self._policy.context + good
                    parted = Miss("parts", read, f"the histories part at token {read}")
                    miss = miss or (parted if part.number else why)
                    break
            else:
                return stored, miss or Miss("complete", read, f"all {read} tokens but the last are cached")
            stored.release()

    def _load(self, stored: Stored, part: Part, tokens: bytes, root: bytes, namespace: Namespace) -> tuple[int, Miss]:
        """Starts to load a part; up to which token of the chain it can be counted on, and why not further."""
        joined = self._joined
        match = joined.store.match(namespace, joined.layout, tokens, root=root, first=part.first, whole=True)
        cut(match, turnable=False, goes_on=False)  # what stays is turned from originals whenever something is dropped
        if match.tokens < part.stop:
            match.release()
            return match.tokens, match.miss
        if match.skipped:  # what was dropped is not read, but through it the rest is found: it is in use all the same
            joined.store.match(namespace, joined.layout, tokens, root=root, whole=True).release()
        load = joined.store.load(match)
        load.wait(0, timeout=joined.patience)  # what fails at once costs a shorter hit
        stored.loads.append(load)
        stored.skipped.append(match.skipped)
        return match.skipped + min(load.tokens, load.good_tokens(len(joined.layout.layers) - 1)), match.miss

    def _parts(self, read: int) -> list[Part]:
        """What is kept of the first ``read`` tokens, as parts of the two chains."""
        parts, column, border = [], 0, self._policy.context
        for first, stop in self._policy.kept(read):
            for number, (low, high) in enumerate(((0, border), (border, read))):
                start, end = max(first, low), min(stop, high)
                if start < end:
                    parts.append(Part(number, start - low, end - low, column))
                    column += end - start
        return parts

    def _fill(self, cache: WindowCache, stored: Stored, row: Row) -> bool:
        """Brings what is stored into the cache, and to ``row`` what its next block begins with; whether it could."""
        joined, attached, begun = self._joined, self._joined.attached, row.tail()[1]
        spans = [
            Span(source, part.first - skipped, part.stop - part.first, 0, part.column)
            for source, (part, skipped) in enumerate(zip(stored.parts, stored.skipped, strict=True))
        ]
        unturned = [Rotation()] * len(attached.specs)
        gather = Gather(stored.loads, [spans], stored.columns, attached.specs, unturned, attached.dtype)
        deadline = time.perf_counter() + joined.patience
        try:
            for slot, layer in enumerate(cache.stored if spans else ()):
                if not gather.wait(slot, max(0.0, deadline - time.perf_counter())):
                    row.discard()
                    return False
                begin = time.perf_counter()
                brought = gather.layer(slot, [0], 0, stored.columns, 0)
                layer.fill(brought.keys, brought.values)
                if begun:
                    first = row.base - begun - stored.skipped[-1]
                    for originals in gather.originals(slot, len(spans) - 1, first, begun):
                        row.seed(slot, *originals)
                if not gather.intact():
                    row.discard()
                    return False
                cache.timeline.add(LOAD, slot, begin, time.perf_counter())
        finally:
            gather.release()
        cache.filled(stored.read, stored.columns)
        return True


NONE = Stored(0, [], [], [])
