"""One save under way: from the engine's pages to drafts, and, once it is sure what was read, to the store.

1. A request's blocks fill up; a step later the saving thread reads its pages, while the engine goes on.
2. The engine may preempt the request in a step that begins meanwhile, and give the pages to somebody else.
3. So what was read is published only at the end of a step in which the request still had its pages, or, for a request
   that has ended, at once: the engine keeps its pages until it is told that they were read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from kvstore.adapters.vllm.caches import Caches
from kvstore.adapters.vllm.model import Model
from kvstore.adapters.vllm.step import Save
from kvstore.keys import TOKEN_BYTES, Namespace
from kvstore.save import Draft
from kvstore.store import Store

log = logging.getLogger("kvstore")


class Saving:
    """``run`` belongs to the saving thread, the others to the engine's. ``_lock`` guards what both see."""

    def __init__(self, save: Save, model: Model, store: Store, caches: Caches, rank: int, deadline: float) -> None:
        self.save = save
        self._deadline = time.monotonic() + deadline
        self._model, self._store, self._caches, self._rank = model, store, caches, rank
        self._layout = model.part
        self._lock = threading.Lock()
        self._drafts: Mapping[int, Draft] | None = None  # what was read; None: not yet, or given away
        self._read = False  # nothing reads the pages any more
        self._sure = save.held
        self._cancelled = False

    def cancel(self) -> None:
        """Its pages are somebody else's: nothing that was read is published."""
        with self._lock:
            if not self._sure:
                self._cancelled = True

    def keep(self) -> None:
        """Its pages are kept until it is over."""
        with self._lock:
            self._sure = not self._cancelled

    def settle(self) -> bool:
        """At the end of a step: what was read by now is published. Whether its pages are read."""
        with self._lock:
            if self._read and not self._cancelled:
                self._sure = True
                drafts, self._drafts = self._drafts, None
            else:
                drafts = None
            read = self._read
        if drafts is not None:
            self._publish(drafts)
        return read

    # -- in the saving thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Reads the pages, block by block as far as there is memory."""
        drafts: dict[int, Draft] = {}
        try:
            drafts = self._take()
        finally:
            with self._lock:
                publish = self._sure and not self._cancelled
            try:
                if publish:  # first, so that whoever hears that it is read finds it
                    self._publish(drafts)
            finally:
                with self._lock:
                    self._read = True
                    self._drafts = None if publish or self._cancelled else drafts

    def _take(self) -> dict[int, Draft]:
        save, size = self.save, self._layout.block_tokens
        if time.monotonic() > self._deadline:
            return {}  # the engine wants its pages; what is not stored is a miss
        tokens = len(save.token_ids) // TOKEN_BYTES
        numbers = range(save.first // size, -(-tokens // size))
        if save.first >= tokens or not self._model.saves(self._rank):
            return {}
        drafts = dict(zip(numbers, self._store.drafts(self._layout, len(numbers)), strict=False))
        for number, draft in drafts.items():
            with self._lock:
                if self._cancelled:
                    return {}
            first = number * size
            self._caches.take(draft, first, min(size, tokens - first), save.pages)
        return drafts

    def _publish(self, drafts: Mapping[int, Draft]) -> None:
        """What was read, if anything, is found from now on."""
        save, model = self.save, self._model
        namespace = model.namespace(save.scope)
        if drafts:
            whole = (max(drafts) + 1) * self._layout.block_tokens * TOKEN_BYTES
            writer = self._caches.writer
            tokens, shard = save.token_ids[:whole], model.shard(self._rank)
            self._store.save(namespace, model.layout, tokens, drafts, form="rotated", writer=writer, shard=shard)
        if save.prompt:
            self._keep(namespace)

    def _keep(self, namespace: Namespace) -> None:
        """What the request wished for its prompt; of several workers, the last finds all of it."""
        save = self.save
        match = self._store.match(
            namespace, self._model.layout, save.token_ids[: save.prompt * TOKEN_BYTES], whole=True
        )
        try:
            if save.retain:
                log.debug("request %s: %s", save.request, self._store.retain(match, save.retain))
            if save.pin:
                log.debug("request %s: %s", save.request, self._store.pin(match, "host", seconds=save.pin))
        finally:
            match.release()
