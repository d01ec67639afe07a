"""The cached part of a batch: turned into tensors layer by layer, a little before attention asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from kvstore.adapters.transformers.ahead import Ahead, Worker
from kvstore.adapters.transformers.buffers import LayerSpec
from kvstore.adapters.transformers.gather import Brought, Gather, Pair
from kvstore.adapters.transformers.pace import Pace
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.timeline import COMPUTE, FETCH, LOAD, Timeline
from kvstore.tensors.streams import current


class Loaded:
    """What the store gives for each row of a batch, and what to do when it does not.

    ``room`` is the number of new columns that the first forward pass is expected to bring.
    """

    def __init__(
        self,
        gather: Gather,
        room: int,
        specs: Sequence[LayerSpec],
        recorder: Recorder,
        recompute: Callable[[], list[Pair]],  # all layers of the cached columns, as the model would hold them
        patience: float,
        worker: Worker | None = None,  # brings layers ahead of the model; None: they come when they are asked for
        pace: Pace | None = None,
    ) -> None:
        self.recorder = recorder
        self.timeline = Timeline()
        self.recomputed = 0  # layers that the model had to compute again
        self.columns, self.rows = gather.columns, len(gather.tokens)
        self._gather, self._room, self._specs = gather, room, specs
        self._recompute = recompute
        self._instead: list[Pair] | None = None
        self._deadline: float | None = None
        self._patience = patience
        self._pace = pace or Pace()
        self._untaken = len(specs)
        self._loading = 0.0  # seconds spent on bringing layers
        self._computing: tuple[int, float] | None = None  # the layer that the model works on, and since when
        self._computed = 0.0
        self._ahead: Ahead | None = None
        if worker is not None and self.columns:
            depth = self._pace.depth(self.columns, room, len(specs))
            self._ahead = Ahead(self._bring, len(specs), depth, worker)
            self._ahead.start()

    def take(self, layer: int, places: Sequence[int], start: int, stop: int, room: int, like: torch.Tensor) -> Pair:
        """Keys and values of columns ``start`` to ``stop``, with ``room`` for more behind them.

        ``places`` says which row each sequence of the batch continues, ``like`` gives dtype and device.
        """
        brought: Brought | None = None
        if self._ahead is not None:
            expected = (list(range(self.rows)), self._start(layer), self.columns, self._room_of(layer))
            brought = self._ahead.take(layer)
            if (list(places), start, stop, room) != expected or self._instead is not None:
                brought = None
        if brought is None:
            brought = self._now(layer, places, start, stop, room)
        self._seed(layer)
        self._untaken -= 1
        if not self._untaken:
            self._note_fetches()
            self.release()
        return _handed_over(brought, like)

    def release(self) -> None:
        """End the leases; what was taken is the model's."""
        self._instead = None
        if self._ahead is not None:
            self._ahead.close(self._gather.release)
        else:
            self._gather.release()

    # -- what the model is doing --------------------------------------------------------------------------------------

    def reached(self, layer: int) -> None:
        """The model asks for a layer: what it did since the one before is over."""
        if self._computing is not None:
            before, since = self._computing
            now = time.perf_counter()
            self.timeline.add(COMPUTE, before, since, now)
            self._computed += now - since
            self._computing = None

    def passed(self, layer: int) -> None:
        """The model has what it asked for."""
        self._computing = (layer, time.perf_counter())
        if self._ahead is not None:
            self._ahead.reached(layer)

    def finished(self) -> bool:
        """The forward pass that the load was for is over; whether it was one."""
        if self._computing is None:
            return False
        self.reached(len(self._specs))
        if not self._untaken:
            self._pace.loaded(self._loading, self.columns)
        self._pace.computed(self._computed, self._room)
        return True

    # -- how a layer is had -------------------------------------------------------------------------------------------

    def _start(self, layer: int) -> int:
        window = self._specs[layer].window
        return 0 if window is None else max(0, self.columns - window + 1)

    def _room_of(self, layer: int) -> int:
        return self._room if self._specs[layer].window is None else 0

    def _bring(self, layer: int) -> Brought | None:
        """A layer as the first forward pass will want it; runs in the worker's thread."""
        return self._stored(layer, range(self.rows), self._start(layer), self.columns, self._room_of(layer))

    def _now(self, layer: int, places: Sequence[int], start: int, stop: int, room: int) -> Brought:
        """A layer as it is wanted, out of the store or, where that fails, out of the model itself."""
        brought = self._stored(layer, places, start, stop, room) if self._instead is None else None
        if brought is not None:
            return brought
        if self._instead is None:
            # Inside the forward pass the cut is out of reach: masks and positions count on these tokens.
            self.recorder.stop(f"layer {layer} could not be loaded and was computed again")
            self._instead = self._recompute()
        self.recomputed += 1
        rows = torch.as_tensor(list(places))
        taken = []
        for source in self._instead[layer]:
            kept = source[rows.to(source.device), :, start:stop]
            taken.append(torch.nn.functional.pad(kept, (0, 0, 0, room)))
        return Brought(taken[0], taken[1])

    def _stored(self, layer: int, places: Sequence[int], start: int, stop: int, room: int) -> Brought | None:
        begin = time.perf_counter()
        if self._deadline is None:
            self._deadline = begin + self._patience
        if not self._gather.wait(layer, timeout=max(0.0, self._deadline - begin)):
            return None
        there = time.perf_counter()
        brought = self._gather.layer(layer, places, start, stop, room)
        now = time.perf_counter()
        self.timeline.add(LOAD, layer, there, now)
        self._loading += now - begin
        return brought

    def _seed(self, layer: int) -> None:
        """The block that new tokens go into begins with stored ones: the recorder wants their originals."""
        if self._instead is not None:
            return
        for number, row in enumerate(self.recorder.rows):
            block, tokens = row.tail()
            if tokens and row.wants_seed:
                originals = self._gather.tail(layer, number, block, tokens)
                if originals is not None:
                    row.seed(layer, *originals)

    def _note_fetches(self) -> None:
        for layer in range(len(self._specs)):
            fetched = self._gather.fetched(layer)
            if fetched is not None:
                self.timeline.add(FETCH, layer, *fetched)


def _handed_over(brought: Brought, like: torch.Tensor) -> Pair:
    """To the stream that the model computes in, in the model's dtype and on its device."""
    if brought.event is not None:
        current(like.device).wait(brought.event)
        if like.device.type == "cuda":
            for tensor in (brought.keys, brought.values):
                tensor.record_stream(torch.cuda.current_stream(like.device))
    return brought.keys.to(like.device, like.dtype), brought.values.to(like.device, like.dtype)
