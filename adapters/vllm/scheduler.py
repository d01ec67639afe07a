"""The scheduler's half: what of a request is stored, which pages it goes to, and when computed pages are saved.

Belongs to the engine's thread, and waits for nothing but a look-up. Blocks are saved as they fill up, a step after
they were computed; the rest of a request when it ends, from pages that the engine keeps until they were read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kvstore.adapters.vllm.ahead import Ahead
from kvstore.adapters.vllm.hints import PIN, PREFETCH, RETAIN
from kvstore.adapters.vllm.lookup import Lookup, parts, tiers
from kvstore.adapters.vllm.model import Model
from kvstore.adapters.vllm.options import BETWEEN, Options
from kvstore.adapters.vllm.request import Tracked
from kvstore.adapters.vllm.scope import Scopes
from kvstore.adapters.vllm.step import Load, Save, Step
from kvstore.store import Store


class SchedulerHalf:
    """One per engine."""

    def __init__(self, model: Model, store: Store, options: Options, by_priority: bool) -> None:
        """``by_priority``: requests wait by their priority, and else in the order in which they came."""
        self._model, self._options = model, options
        self._lookup = Lookup(model, store, options.timeout)
        self._ahead = Ahead(model, store, options.timeout, by_priority)
        self._scopes = Scopes(options.require_tenant)
        self._tracked: dict[str, Tracked] = {}  # all; there can be many more that wait than a step can look at
        self._waiting: dict[str, Tracked] = {}  # those that have no pages yet
        self._running: dict[str, Tracked] = {}  # those that have, or had
        self._step = Step()  # what the next step is told
        self._pages: Any = None  # the engine's manager of them

    def bind(self, manager: Any) -> None:
        """The engine tells who knows the pages of requests."""
        self._pages = manager

    # -- a request comes ----------------------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        """A new request. One that may have approximate blocks under its salt, and does not want them, reads none."""
        tracked = self._tracked[request.request_id] = self._scopes.track(request)
        tracked.read()
        self._scopes.admit(tracked)
        if tracked.served:
            self._waiting[request.request_id] = tracked
        for hint in tracked.hints(PREFETCH):
            self._ahead.prefetch(tracked.scope, hint)

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many tokens behind the first ``computed`` can be loaded, and whether that is between steps.

        None: that is not known yet; the engine asks again."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._scopes.track(request)
            self._tracked[request.request_id] = tracked
        if tracked.failed or not tracked.served:
            return 0, False
        found = self._lookup.find(tracked, computed)
        if found is None:
            return None, False
        tracked.found, tracked.saved = found, found.prefix
        if found.tokens - computed < self._options.min_tokens:
            tracked.release()
            return 0, False
        return found.tokens - computed, self._options.load == BETWEEN

    def allocated(self, request: Any, pages: list[int], tokens: int) -> None:
        """The engine has pages for a request, and wants ``tokens`` loaded into them."""
        tracked = self._running[request.request_id] = self._tracked[request.request_id]
        self._waiting.pop(request.request_id, None)
        tracked.jobs = ()
        question = tracked.question
        if not tokens or question is None or tracked.loading:
            if not tracked.loading:
                tracked.release()
            return
        columns = question.computed, question.computed + tokens
        load = Load(
            request=request.request_id,
            scope=tracked.scope,
            parts=parts(tracked.found, *columns),
            pages=tuple(pages),
            within=self._options.load != BETWEEN,
        )
        self._step.loads.append(load)
        tracked.by_tier, tracked.loading = tiers(tracked.found, *columns), not load.within

    def by_tier(self, request: Any) -> dict[str, int]:
        """Tokens that the request was given, by the tier they came from."""
        tracked = self._tracked.get(request.request_id)
        return {} if tracked is None else dict(tracked.by_tier)

    # -- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """What the workers are told of this step."""
        step, self._step = self._step, Step()
        self._ahead.waiting(self._waiting.values())
        loading = {load.request for load in step.loads}
        for name, tracked in self._running.items():
            if tracked.request.num_preemptions != tracked.preemptions:
                tracked.preemptions = tracked.request.num_preemptions
                tracked.saving, tracked.loading = False, name in loading
                if not tracked.loading:
                    tracked.release()
                    tracked.question = None
                step.preempted.add(name)
            elif not tracked.loading:
                step.saves += self._filled(name, tracked)
        return step

    def _filled(self, name: str, tracked: Tracked) -> Iterator[Save]:
        """Blocks that are full and computed. The step that is made now may still be computing the tokens after."""
        if not self._saves(tracked):
            return
        size = self._model.layout.block_tokens
        stop = self._computed(tracked) // size * size
        if stop <= tracked.saved:
            return
        pages = self._pages.get_block_ids(name)[0]
        yield self._save(name, tracked, stop, pages, held=False)

    def _save(self, name: str, tracked: Tracked, stop: int, pages: list[int], held: bool) -> Save:
        size = self._model.layout.block_tokens
        first, tracked.saved, tracked.saving = tracked.saved // size * size, stop, True
        used = -(-stop // self._model.page_tokens)
        return Save(name, tracked.scope, tracked.upto(stop), first, tuple(pages[:used]), held)

    def _saves(self, tracked: Tracked) -> bool:
        """Whether what it computes is stored: not behind what was put together, which no chain of ours stands for."""
        return tracked.served and not tracked.modular

    def _computed(self, tracked: Tracked) -> int:
        """Leading tokens whose keys and values are in its pages, as of the steps before this one."""
        request = tracked.request
        return min(int(request.num_computed_tokens), len(request.all_token_ids))

    def output(self, received: set[str], invalid: set[int]) -> None:
        """What workers said of a step: who has been loaded, and which pages are not what they should be."""
        for name, tracked in self._running.items():
            if invalid and tracked.by_tier and not tracked.failed:
                self._lost(name, tracked, invalid)
            if name in received:
                tracked.loading = False
            if (tracked.by_tier or tracked.failed) and not tracked.loading:
                tracked.release()

    def _lost(self, name: str, tracked: Tracked, invalid: set[int]) -> None:
        """If some of its pages did not come, nothing more is loaded, and what it computes is stored."""
        pages = self._pages.get_block_ids(name)[0]
        come = next((number for number, page in enumerate(pages) if page in invalid), None)
        if come is not None and tracked.question is not None:
            tracked.failed, tracked.saved = True, 0
            tracked.by_tier = tiers(tracked.found, tracked.question.computed, come * self._model.page_tokens)

    # -- a request ends -----------------------------------------------------------------------------------------------

    def finished(self, request: Any, pages: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether we let the engine know when it may have the pages, and what the caller is told."""
        name = request.request_id
        tracked = self._tracked.pop(name, None)
        for some in (self._running, self._waiting):
            some.pop(name, None)
        if tracked is None:
            return False, None
        tracked.release()
        stop = min(self._computed(tracked), len(request.all_token_ids) - 1)
        if tracked.loading:
            return False, tracked.told  # the engine waits for the load, and hears of it from the workers
        last = Save(name, tracked.scope, b"", 0, (), True)  # of nothing, to hear when all is read
        if self._saves(tracked) and stop > tracked.saved:
            last = self._save(name, tracked, stop, pages, held=True)
        retain, pin = tracked.seconds(RETAIN), tracked.seconds(PIN)
        if retain or pin:
            kept = {"prompt": min(stop, request.num_prompt_tokens), "retain": retain, "pin": pin}
            last = replace(last, token_ids=last.token_ids or tracked.upto(stop), first=last.first or stop, **kept)
        if not (tracked.saving or last.token_ids):
            return False, tracked.told
        self._step.saves.append(last)
        return True, tracked.told

    def close(self) -> None:
        """Ends the threads."""
        self._ahead.close()
        self._lookup.close()

    def reset(self) -> None:
        """The engine's weights were replaced: what was stored so far is no more served."""
        self._scopes.generation += 1
