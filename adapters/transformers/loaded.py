"""The cached part of a batch: turned into tensors layer by layer, a little before attention asks for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from kvstore.adapters.transformers.ahead import Ahead, Worker
from kvstore.adapters.transformers.buffers import LayerSpec, Pair
from kvstore.adapters.transformers.choice import Choice
from kvstore.adapters.transformers.gather import Brought, Gather
from kvstore.adapters.transformers.pace import Pace, Work
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.seeding import Seeding
from kvstore.adapters.transformers.stopwatch import Stopwatch, stopwatch
from kvstore.adapters.transformers.timeline import COMPUTE, FETCH, LOAD, Timeline
from kvstore.tensors.streams import current

log = logging.getLogger("kvstore")

ASKED = 2  # layers, at most, that a device is asked for when the model takes one


class Aim(NamedTuple):
    """What a layer is wanted for: the row that each sequence continues, columns to load, new ones behind them."""

    places: tuple[int, ...]
    columns: int
    room: int


class Made(NamedTuple):
    """A layer as it was aimed for, and the seconds it took."""

    aim: Aim
    brought: Brought
    seconds: float
    copying: float = 0.0  # of them, after all bytes were there


class Loaded:
    """What the store gives for each row of a batch, and what to do when it does not. Layers are slots.

    ``room`` is the number of new columns that the first forward pass is expected to bring. When another number comes,
    or other sequences (beams), the layers that were brought for it are no use; those after the first are aimed anew.
    """

    def __init__(
        self,
        gather: Gather,
        room: int,
        specs: Sequence[LayerSpec],
        recorder: Recorder,
        recompute: Callable[[], list[Pair]],  # all slots of the cached columns, keys turned as the model holds them
        patience: float,
        worker: Worker | None = None,  # brings layers ahead of the model; None: they come when they are asked for
        pace: Pace | None = None,
        whole: bool = False,  # all columns of every layer are wanted, also those that a window would drop
        choice: Choice | None = None,  # what was decided of the load
    ) -> None:
        self.recorder = recorder
        self.timeline = Timeline()
        self.recomputed = 0  # layers that the model had to compute again
        self.brought_ahead = 0  # layers that the model found as it wanted them
        self.columns, self.rows = gather.columns, len(gather.rows)
        self._whole = whole
        self._gather, self._specs = gather, specs
        self._aim = Aim(tuple(range(self.rows)), self.columns, room)  # replaced in one step; the worker reads it
        self._recompute = recompute
        self._instead: list[Pair] | None = None
        self._deadline: float | None = None  # of the model, from the moment it first asks
        self._deadline_ahead: float | None = None  # of the worker, until then
        self._patience = patience
        self._pace = pace or Pace()
        self._choice = choice
        self._untaken = len(specs)
        self._loading = self._copying = 0.0  # seconds that bringing the layers took which the model has taken
        self._copied = 0  # bytes of them
        self._watch: Stopwatch | None = None  # of the model's work, while the pass runs that the load is for
        self._computing: tuple[int, float] | None = None  # the layer that the model works on, and since when
        self._new = (0, 0)  # sequences and columns that the model computes
        self._ahead: Ahead | None = None
        self._made: dict[int, Made] = {}  # layers that were asked of a device before the model wanted them
        self._next = 0  # the one that is asked for next
        self._seeding = Seeding(gather, recorder, len(specs))
        if worker is not None and self.columns:
            depth = self._pace.depth(self.columns, room, len(specs))
            self._ahead = Ahead(self._bring, len(specs), depth, worker)
            self._ahead.start()

    def take(self, layer: int, places: Sequence[int], columns: int, room: int, like: torch.Tensor) -> Pair:
        """What a cache holds of the first ``columns`` (or what a window leaves of them), with ``room`` for more behind.

        ``places`` says which row each sequence of the batch continues, ``like`` gives dtype and device.
        """
        if self._deadline is None:
            self._deadline = time.perf_counter() + self._patience
        aim = self._aim = Aim(tuple(places), columns, room if self._specs[layer].window is None else self._aim.room)
        made = self._made.pop(layer, None) if self._ahead is None else self._ahead.take(layer)
        if made is not None and self._instead is None and made.aim._replace(room=aim.room) == aim <= made.aim:
            self.brought_ahead += 1
        else:
            made = self._now(layer, aim)
        self._loading += made.seconds
        self._copying += made.copying
        self._copied += self._bytes(layer, aim)
        self._ask_ahead(layer)
        if self._instead is None:
            self._seeding.bring(layer)
        self._untaken -= 1
        if not self._untaken:
            self._note_fetches()
            self.release()
        keys, values = _handed_over(made.brought, like)
        left = made.aim.room - aim.room  # what was brought for a forward pass is wanted without one
        if left and self._specs[layer].window is None:
            keys, values = (states.narrow(2, 0, states.shape[2] - left) for states in (keys, values))
        return self._specs[layer].exchanged(keys, values)

    def release(self) -> None:
        """End the leases; what was taken is the model's."""
        self._instead = None
        self._made.clear()
        if self._ahead is not None:
            self._ahead.close(self._gather.release)
        else:
            self._gather.release()

    # -- what the model is doing --------------------------------------------------------------------------------------

    def begun(self) -> None:
        """The model begins the forward pass that the load is for."""
        self._watch = stopwatch(self._specs[0].device)
        self._watch.start()

    def reached(self, layer: int) -> None:
        """The model asks for a layer: what it did since the one before is over."""
        if self._watch is not None:
            self._watch.stop()
        if self._computing is not None:
            before, since = self._computing
            self.timeline.add(COMPUTE, before, since, time.perf_counter())
            self._computing = None

    def passed(self, layer: int, rows: int, new: int) -> None:
        """The model has what it asked for, and computes ``new`` columns of so many sequences."""
        self._computing, self._new = (layer, time.perf_counter()), (rows, new)
        if self._watch is not None:
            self._watch.start()
        if self._ahead is not None:
            self._ahead.reached(layer)

    def finished(self) -> bool:
        """The forward pass that the load was for is over; whether it was one."""
        watch = self._watch
        if self._computing is None:
            self._watch = None
            return False
        whole = self._computing[0] == len(self._specs) - 1
        self.reached(len(self._specs))
        self._watch = None
        if whole and watch is not None:  # else it failed half way
            self._pace.computed(watch, Work(*self._new, self.columns))
            if not (self._untaken or self.recomputed):
                self._pace.loaded(self._loading, self.columns)
                self._pace.brought(self._copying, self._copied)
                if self._choice is not None:
                    self._choice.came()
        return True

    # -- how a layer is had -------------------------------------------------------------------------------------------

    def _bring(self, layer: int) -> Made | None:
        """A layer as the first forward pass will want it; runs in the worker's thread."""
        if self._deadline_ahead is None:
            self._deadline_ahead = time.perf_counter() + self._patience
        return self._stored(layer, self._aim, self._deadline or self._deadline_ahead)

    def _ask_ahead(self, layer: int) -> None:
        """A device is asked for layers before the model wants them, as far as it has room: by the model's own thread,
        because asking is quick, and two threads of Python would only wait for each other."""
        self._next = max(self._next, layer + 1)
        for _ in range(ASKED if self._gather.asks_only and self._ahead is None and self._instead is None else 0):
            if self._next >= len(self._specs) or not self._gather.free(self._next):
                return
            made = self._tried(self._next, self._aim)
            if made is None:
                return
            self._made[self._next] = made
            self._next += 1

    def _now(self, layer: int, aim: Aim) -> Made:
        """A layer as it is wanted, out of the store or, where that fails, out of the model itself."""
        if self._instead is None:
            made = self._tried(layer, aim)
            if made is not None:
                return made
            self._note_waiting(time.perf_counter())
            # Inside the forward pass the cut is out of reach: masks and positions count on these tokens.
            self.recorder.stop(f"layer {layer} could not be loaded and was computed again")
            self._instead = self._recompute()
        self.recomputed += 1
        rows, start = torch.as_tensor(aim.places), self._start(layer, aim)
        taken = []
        for source in self._instead[layer]:
            kept = source[rows.to(source.device), :, start : aim.columns]
            taken.append(torch.nn.functional.pad(kept, (0, 0, 0, self._room(layer, aim))))
        return Made(aim, Brought(taken[0], taken[1]), 0.0)

    def _tried(self, layer: int, aim: Aim) -> Made | None:
        assert self._deadline is not None
        try:
            return self._stored(layer, aim, self._deadline)
        except Exception as error:  # no memory, a kernel that fails: whatever it is, the model can do without
            log.warning("layer %d could not be loaded: %s: %s", layer, type(error).__name__, str(error))
            return None

    def _stored(self, layer: int, aim: Aim, deadline: float) -> Made | None:
        begin = time.perf_counter()
        if not self._gather.wait(layer, timeout=max(0.0, deadline - begin)):
            return None
        there = time.perf_counter()
        brought = self._gather.layer(layer, aim.places, self._start(layer, aim), aim.columns, self._room(layer, aim))
        if not self._gather.intact(brought.event):
            return None
        now = time.perf_counter()
        self.timeline.add(LOAD, layer, there, now)
        return Made(aim, brought, now - begin, now - there if brought.event is None else 0.0)

    def _start(self, layer: int, aim: Aim) -> int:
        window = self._specs[layer].window
        return 0 if window is None or self._whole else max(0, aim.columns - window + 1)

    def _room(self, layer: int, aim: Aim) -> int:
        return aim.room if self._specs[layer].window is None else 0

    def _bytes(self, layer: int, aim: Aim) -> int:
        """What is brought of a layer for the model."""
        spec, columns = self._specs[layer], len(aim.places) * (aim.columns - self._start(layer, aim))
        return columns * spec.heads * (spec.key_dim + spec.value_dim) * self._gather.dtype.itemsize

    def _note_fetches(self) -> None:
        last = 0.0
        for layer in range(len(self._specs)):
            fetched = self._gather.fetched(layer)
            if fetched is not None:
                self.timeline.add(FETCH, layer, *fetched)
                last = max(last, fetched[1])
        if last and self._instead is None:
            self._note_waiting(last)

    def _note_waiting(self, until: float) -> None:
        """What was decided to be loaded had come by then, or was given up."""
        if self._choice is not None and self._choice.decision.disk_seconds:
            self._pace.fetched(self._choice.decision, until - self._choice.at)


def _handed_over(brought: Brought, like: torch.Tensor) -> Pair:
    """To the stream that the model computes in, in the model's dtype and on its device."""
    if brought.event is not None:
        current(like.device).wait(brought.event)
        if like.device.type == "cuda":
            for tensor in (brought.keys, brought.values):
                tensor.record_stream(torch.cuda.current_stream(like.device))
    return brought.keys.to(like.device, like.dtype), brought.values.to(like.device, like.dtype)
