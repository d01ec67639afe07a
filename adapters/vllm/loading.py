"""One load under way: from the store to the engine's pages, a layer at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np

from kvstore.adapters.vllm.caches import Caches
from kvstore.adapters.vllm.model import Model
from kvstore.adapters.vllm.step import Load, Part
from kvstore.load import Load as Bringing
from kvstore.store import Store
from kvstore.tensors.rope import Turn


class Loading:
    """``run`` belongs to the loading thread, the other methods to the engine's. ``_changed`` guards what both see."""

    def __init__(self, load: Load, model: Model, store: Store, caches: Caches, rank: int, deadline: float) -> None:
        self.load = load
        self._model, self._store, self._caches, self._rank = model, store, caches, rank
        self._deadline = time.monotonic() + deadline
        self._changed = threading.Condition()
        self._layers = 0  # that are in their pages, but for what failed
        self._failed: int | None = None  # the first column that did not come
        self._over = False

    @property
    def over(self) -> bool:
        """Whether nothing is written any more."""
        with self._changed:
            return self._over

    def wait(self, layer: int) -> None:
        """Until a layer is where it should be, or will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._layers > layer)

    def invalid(self) -> set[int]:
        """Pages with tokens that did not come, when it is over."""
        if self._failed is None:
            return set()
        last = self.load.parts[-1]
        size = self._model.page_tokens
        return set(self.load.pages[self._failed // size : -(-(last.column + last.stop - last.first) // size)])

    # -- in the loading thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Brings all parts, one behind the other; after the first that fails none is begun."""
        try:
            self._bring()
        except BaseException:
            self._fail(self.load.parts[0].column)
            raise
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _fail(self, column: int) -> None:
        self._failed = column if self._failed is None else min(column, self._failed)

    def _bring(self) -> None:
        brought = []
        try:
            for part in self.load.parts:
                found = self._open(part)
                if found is None:
                    self._fail(part.column)
                    break
                brought.append((part, found))
            for layer in range(len(self._model.layers)):
                for part, bringing in brought:
                    if self._failed is None or part.column < self._failed:
                        self._layer(layer, part, bringing)
                with self._changed:
                    self._layers = layer + 1
                    self._changed.notify_all()
        finally:
            for _, bringing in brought:
                bringing.release()

    def _open(self, part: Part) -> Bringing | None:
        """A load of what holds a part; None when some of it is gone, or it is too late."""
        if time.monotonic() >= self._deadline:
            return None
        namespace, layout = self._model.namespace(self.load.scope), self._model.layout
        match = self._store.match(namespace, layout, part.token_ids, first=part.first, whole=True)
        if match.tokens < part.stop:
            match.release()
            return None
        return self._store.load(match)

    def _layer(self, layer: int, part: Part, bringing: Bringing) -> None:
        """One layer of one part."""
        skipped = bringing.skipped
        stop = min(part.stop, skipped + bringing.tokens)  # a load may be shorter than its match, or empty
        if not bringing.wait(layer, max(0.0, self._deadline - time.monotonic())):
            good = bringing.good_tokens(layer)
            # Up to a block that failed all is there. Where none did, it is too late, or the session is over.
            lost = good >= bringing.tokens or time.monotonic() >= self._deadline
            stop = part.first if lost else min(stop, skipped + good)
        if stop < part.stop:
            self._fail(part.column + max(0, stop - part.first))
        if stop <= part.first:
            return
        first_head = self._model.first_head(self._rank)
        for runs, turn in self._runs(layer, part, bringing, skipped, stop):
            self._caches.put(layer, runs, turn, self.load.pages, first_head)
        if not bringing.intact():
            self._fail(part.column)

    def _runs(
        self, layer: int, part: Part, bringing: Bringing, skipped: int, stop: int
    ) -> Iterator[tuple[np.ndarray, Turn | None]]:
        """Runs of a layer with how their keys are turned: those of one kind together."""
        here: dict[bool, list[tuple[int, ...]]] = {}
        token, moved = skipped, part.column - part.first
        for place in bringing.places(layer):
            low, high = max(token, part.first), min(token + place.tokens, stop)
            if low < high:
                column = low + moved
                position = 0 if place.rotated else column
                run = (place.keys, place.values, place.stride, low - token, high - low, position, column)
                here.setdefault(place.rotated, []).append(run)
            token += place.tokens
        for rotated, rows in here.items():
            runs = np.array(rows, dtype=np.int64)
            if not rotated:
                yield runs, self._caches.placed()
            else:
                yield runs, self._caches.moved(moved) if moved else None
