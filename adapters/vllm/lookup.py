"""What of a request's prompt is stored: its longest prefix, or segments of it, wherever each was read."""

from __future__ import annotations

from kvstore.adapters.vllm.model import Model
from kvstore.adapters.vllm.request import Tracked
from kvstore.adapters.vllm.step import Part
from kvstore.keys import TOKEN_BYTES
from kvstore.match import Match
from kvstore.store import Store


class Lookup:
    """Looks prompts up in one store. Belongs to the scheduler's thread."""

    def __init__(self, model: Model, store: Store) -> None:
        self._model, self._store = model, store

    def find(self, tracked: Tracked, computed: int) -> int:
        """How many leading tokens can be had. Leases hold those behind ``computed`` until the request lets go.

        May be asked again for a request that has to wait; nothing is looked up twice."""
        if tracked.parts and tracked.computed == computed and all(match.lease.active for match in tracked.matches):
            return tracked.parts[-1].column + tracked.parts[-1].stop - tracked.parts[-1].first
        tracked.release()
        tracked.computed = computed
        tokens = tracked.tokens
        found = self._prefix(tracked, tokens, computed)
        tracked.saved = found
        if tracked.modular:
            found = max(found, self._segments(tracked, tokens, found))
        return found

    def _prefix(self, tracked: Tracked, tokens: bytes, computed: int) -> int:
        """The longest stored prefix, of blocks with all heads, or else of each worker's."""
        model = self._model
        match = self._store.match(model.namespace(tracked.scope), model.layout, tokens, first=computed)
        matches = [match]
        if model.ranks > 1:
            shards = [
                self._store.match(model.namespace(tracked.scope, rank), model.shard, tokens, first=computed)
                for rank in range(model.ranks)
            ]
            better = min(shard.tokens for shard in shards) > match.tokens
            for other in [match] if better else shards:
                other.release()
            tracked.sharded, matches = better, shards if better else matches
        found = min(match.tokens for match in matches)
        tracked.matches = matches
        tracked.parts = (Part(tokens[: found * TOKEN_BYTES], 0, found, 0),) if found else ()
        return found

    def _segments(self, tracked: Tracked, tokens: bytes, exact: int) -> int:
        """As many of its segments as are stored, and a part of the next; if that is more than ``exact``."""
        model, parts, matches, end = self._model, list[Part](), list[Match](), 0
        last = len(tokens) // TOKEN_BYTES - 1  # is computed
        for start, stop in tracked.wishes.segments:
            chain = tokens[start * TOKEN_BYTES : min(stop, last) * TOKEN_BYTES]
            if not chain:
                break
            match = self._store.match(model.namespace(tracked.scope), model.layout, chain, whole=True)
            matches.append(match)
            if match.tokens:
                parts.append(Part(chain[: match.tokens * TOKEN_BYTES], 0, match.tokens, start))
                end = start + match.tokens
            if start + match.tokens < stop:
                break
        if end <= exact:
            for match in matches:
                match.release()
            return exact
        tracked.release()
        tracked.matches, tracked.parts, tracked.sharded = matches, tuple(parts), False
        tracked.approximate = True
        return end

    def parts(self, tracked: Tracked, first: int, stop: int) -> tuple[Part, ...]:
        """What is to be loaded of columns ``first`` to ``stop``."""
        cut = []
        for part in tracked.parts:
            low, high = max(first, part.column), min(stop, part.column + part.stop - part.first)
            if low < high:
                begin = part.first + low - part.column
                end = begin + high - low
                cut.append(Part(part.token_ids[: end * TOKEN_BYTES], begin, end, low))
        return tuple(cut)

    def tiers(self, tracked: Tracked, first: int, stop: int) -> dict[str, int]:
        """Where the tokens of columns ``first`` to ``stop`` are."""
        found: dict[str, int] = {}
        for part, match in zip(tracked.parts, tracked.matches, strict=False):
            column = part.column + match.skipped
            for tier, (_, tokens) in zip(match.tiers, match.blocks, strict=True):
                used = min(stop, column + tokens) - max(first, column)
                if used > 0:
                    found[tier] = found.get(tier, 0) + used
                column += tokens
        return found
