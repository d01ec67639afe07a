"""What of a request's prompt is stored: its longest prefix, or segments of it, wherever each was read."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvstore.adapters.vllm.model import Model
from kvstore.adapters.vllm.question import Found, Question
from kvstore.adapters.vllm.request import Tracked
from kvstore.adapters.vllm.step import Part, Scope
from kvstore.adapters.vllm.thread import Worker
from kvstore.keys import TOKEN_BYTES
from kvstore.match import Match
from kvstore.store import Store

PATIENCE = 0.02  # seconds that the engine's thread waits for an answer, before it goes on with other requests


class Lookup:
    """Looks prompts up in one store, in a thread: a daemon that is stuck stops no request. Belongs to the scheduler."""

    def __init__(self, model: Model, store: Store, timeout: float) -> None:
        self._model, self._store, self._timeout = model, store, timeout
        self._thread = Worker("kvstore-vllm-look-up")

    def close(self) -> None:
        """Ends the thread."""
        self._thread.close(self._timeout)

    def find(self, tracked: Tracked, computed: int) -> Found | None:
        """What can be had of a request, of which the engine has ``computed`` tokens; None while that is not known.

        Leases hold what stands behind those until the request lets go. May be asked again; it is looked up once. After
        the timeout, nothing is there.
        """
        question, patience = tracked.question, 0.0
        if question is None or question.computed != computed:
            tracked.release()
            prompt, scope, segments = tracked.tokens, tracked.scope, tracked.segments

            def ask() -> Found:
                return self._ask(scope, prompt, computed, segments)

            question, patience = Question(ask, computed, time.monotonic() + self._timeout), PATIENCE
            tracked.question = question
            self._thread.do(question.run)
        found = question.answer(patience)
        if found is None and time.monotonic() > question.deadline:
            tracked.failed = True
            tracked.release()
            return Found()
        return found

    # -- in the look-up thread ----------------------------------------------------------------------------------------

    def _ask(self, scope: Scope, prompt: bytes, computed: int, segments: Sequence[tuple[int, int]]) -> Found:
        exact = self._prefix(scope, prompt, computed)
        if not segments:
            return exact
        found = self._segments(scope, prompt, segments, exact.prefix)
        worse = exact if found.tokens > exact.tokens else found
        worse.release()
        return found if worse is exact else exact

    def _prefix(self, scope: Scope, prompt: bytes, computed: int) -> Found:
        """The longest stored prefix."""
        match = self._store.match(self._model.namespace(scope), self._model.layout, prompt, first=computed)
        parts = (Part(prompt[: match.tokens * TOKEN_BYTES], 0, match.tokens, 0),) if match.tokens else ()
        return Found(match.tokens, match.tokens, parts, (match,))

    def _segments(self, scope: Scope, prompt: bytes, segments: Sequence[tuple[int, int]], prefix: int) -> Found:
        """As many of the segments as are stored, and a part of the next."""
        model, parts, matches, end = self._model, list[Part](), list[Match](), 0
        last = len(prompt) // TOKEN_BYTES - 1  # is computed
        for start, stop in segments:
            chain = prompt[start * TOKEN_BYTES : min(stop, last) * TOKEN_BYTES]
            if not chain:
                break
            match = self._store.match(model.namespace(scope), model.layout, chain, whole=True)
            matches.append(match)
            if match.tokens:
                parts.append(Part(chain[: match.tokens * TOKEN_BYTES], 0, match.tokens, start))
                end = start + match.tokens
            if start + match.tokens < stop:
                break
        return Found(prefix, end, tuple(parts), tuple(matches), approximate=True)


def parts(found: Found, first: int, stop: int) -> tuple[Part, ...]:
    """What is to be loaded of columns ``first`` to ``stop``."""
    cut = []
    for part in found.parts:
        low, high = max(first, part.column), min(stop, part.column + part.stop - part.first)
        if low < high:
            begin = part.first + low - part.column
            end = begin + high - low
            cut.append(Part(part.token_ids[: end * TOKEN_BYTES], begin, end, low))
    return tuple(cut)


def tiers(found: Found, first: int, stop: int) -> dict[str, int]:
    """Where the tokens of columns ``first`` to ``stop`` are."""
    counted: dict[str, int] = {}
    for part, match in zip(found.parts, found.matches, strict=False):
        column = part.column + match.skipped
        for tier, (_, tokens) in zip(match.tiers, match.blocks, strict=True):
            used = min(stop, column + tokens) - max(first, column)
            if used > 0:
                counted[tier] = counted.get(tier, 0) + used
            column += tokens
    return counted
