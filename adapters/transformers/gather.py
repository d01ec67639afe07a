"""What the store gives for a batch, as runs for the kernel: which tokens of which block go to which columns.

Columns are what the model's cache counts. Where no span of a row says what they hold, they are zero: padding, which
the attention mask hides, or tokens that the model is about to compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kvstore.adapters.transformers.buffers import LayerSpec, Pair
from kvstore.adapters.transformers.rotation import Rotation
from kvstore.tensors.carrier import Carried, Carrier
from kvstore.tensors.memory import empty
from kvstore.tensors.plain import at
from kvstore.tensors.runs import Target, runs_of
from kvstore.tensors.streams import Event, current
from kvstore.tensors.transfer import transfer

CPU = torch.device("cpu")


class Brought(NamedTuple):
    """Keys and values of a layer, [sequences, heads, columns, dim]; on a device, not before ``event``."""

    keys: torch.Tensor
    values: torch.Tensor
    event: Event | None = None


class Span(NamedTuple):
    """Stored tokens that stand one behind the other: where they come from, and where they go."""

    source: int  # which load
    first: int  # token of it
    tokens: int
    position: int  # of the first
    column: int


class Part(NamedTuple):
    """What one row's sequence takes of a layer."""

    place: int  # of the sequence in the batch
    holes: list[tuple[int, int]]  # columns that nothing is brought to
    pieces: list[tuple[int, int, int]]  # columns that something is brought to, first and behind the last; its position
    runs: np.ndarray


class Gather:
    """The loads of a batch, and how their bytes become tensors. Its leases end with ``release``.

    ``rows``: of each row its spans, in order of columns; of loads that are None there are none.

    With a ``carrier`` the tensors are on its device, and the loads were asked for so; without, they are on the CPU.
    Different layers may be asked for by different threads at the same time.
    """

    def __init__(
        self,
        loads: Sequence[Any],
        rows: Sequence[Sequence[Span]],
        columns: int,
        specs: Sequence[LayerSpec],
        rotations: Sequence[Rotation],
        dtype: torch.dtype,
        carrier: Carrier | None = None,
        device: torch.device = CPU,  # where addresses of loads are, without a carrier
    ) -> None:
        self.loads, self.rows, self.columns = list(loads), [list(row) for row in rows], columns
        self._specs, self._rotations, self.dtype = specs, rotations, dtype
        self._carrier = carrier
        self._source = device
        self._device = device if carrier is None else carrier.device
        self._carried = [None if load is None or carrier is None else Carried(carrier, load) for load in loads]

    def wait(self, layer: int, timeout: float) -> bool:
        """Whether this layer of every row is in memory and checked, at the latest after ``timeout`` seconds."""
        sources = [carried or load for carried, load in zip(self._carried, self.loads, strict=True)]
        return all(source is None or source.wait(layer, timeout=timeout) for source in sources)

    def intact(self, event: Event | None = None) -> bool:
        """Whether what was taken so far, the device up to ``event``, is what it should be. Of what others hold."""
        lent = [load for load in self.loads if load is not None and load.lent]
        if lent and event is not None:
            event.wait()
        return all(load.intact() for load in lent)

    def fetched(self, layer: int) -> tuple[float, float] | None:
        """When this layer came from disk, first to last row; None when nothing did."""
        times = [time for load in self.loads if load is not None and (time := load.fetched(layer)) is not None]
        return (min(begin for begin, _ in times), max(end for _, end in times)) if times else None

    def layer(self, layer: int, places: Sequence[int], start: int, stop: int, room: int) -> Brought:
        """Keys and values of columns ``start`` to ``stop``, with ``room`` for more behind them.

        ``places`` says which row each sequence of the batch continues. Only after ``wait`` has said yes.
        """
        spec, size = self._specs[layer], stop - start
        shapes = [(len(places), spec.heads, size + room, dim) for dim in (spec.key_dim, spec.value_dim)]
        parts = [self._part(layer, place, row, start, size) for place, row in self._firsts(places).items()]
        if self._carrier is None:
            keys, values = (empty(shape, self.dtype, self._device) for shape in shapes)
            self._write(layer, places, parts, size, (keys, values))
            return Brought(keys, values)
        turns = self._carrier.turns
        keys, values = (self._carrier.empty(turns, shape, self.dtype) for shape in shapes)
        turns.run(lambda: self._write(layer, places, parts, size, (keys, values)))
        event = turns.record()
        for part in parts:
            for source in {span.source for span in self._within(places[part.place], start, size)}:
                carried = self._carried[source]
                if carried is not None:
                    carried.used(layer, event)
        return Brought(keys, values, event)

    def originals(self, layer: int, source: int, first: int, tokens: int) -> Iterator[Pair]:
        """Keys before rotation and values, [heads, tokens, dim], of a load's tokens from ``first`` on, block by block.

        They are the store's own memory: say ``read`` as soon as the engine's stream has been asked to read them.
        """
        load, spec, stop, start = self.loads[source], self._specs[layer], first + tokens, 0
        for place in load.places(layer) if load is not None and tokens else ():
            low, high = max(first, start) - start, min(stop, start + place.tokens) - start
            start += place.tokens
            if low >= high:
                continue
            if place.hot:
                load.ready(current(self._device))
            device = self._device if place.hot else self._source
            keys, values = (
                at(address, (spec.heads, place.stride, dim), self.dtype, device)[:, low:high]
                for address, dim in ((place.keys, spec.key_dim), (place.values, spec.value_dim))
            )
            yield keys, values

    def read(self, source: int) -> None:
        """The memory stays until the engine's stream, which the host may be far ahead of, has come so far."""
        carried = self._carried[source]
        if carried is not None:
            carried.read(current(self._device).record())

    def release(self) -> None:
        """End the leases; what was given out is the model's."""
        for source, (carried, load) in enumerate(zip(self._carried, self.loads, strict=True)):
            if carried is not None:
                spans = [span for row in self.rows for span in row if span.source == source]
                carried.over(max((span.first + span.tokens for span in spans), default=0))
            if load is not None:
                load.release()
        self.loads = [None] * len(self.loads)
        self._carried = [None] * len(self.loads)

    @staticmethod
    def _firsts(places: Sequence[int]) -> dict[int, int]:
        """The first sequence of each row that is asked for, and the row."""
        rows: dict[int, int] = {}
        for place, row in enumerate(places):
            rows.setdefault(row, place)
        return {place: row for row, place in rows.items()}

    def _within(self, row: int, start: int, size: int) -> list[Span]:
        """A row's spans, cut to the columns that are asked for, and counted from the first of them."""
        cut = []
        for span in self.rows[row]:
            low, high = max(start, span.column), min(start + size, span.column + span.tokens)
            if low < high:
                ahead = low - span.column
                cut.append(Span(span.source, span.first + ahead, high - low, span.position + ahead, low - start))
        return cut

    def _part(self, layer: int, place: int, row: int, start: int, size: int) -> Part:
        holes, pieces, runs, column = [], [], [], 0
        places: dict[int, Sequence[Any]] = {}
        for span in self._within(row, start, size):
            if span.source not in places:
                places[span.source] = (self._carried[span.source] or self.loads[span.source]).places(layer)
            stop = span.first + span.tokens
            runs += runs_of(places[span.source], span.first, stop, span.position, span.column)
            holes.append((column, span.column))
            column = span.column + span.tokens
            pieces.append((span.column, column, span.position))
        holes = [hole for hole in (*holes, (column, size)) if hole[0] < hole[1]]
        return Part(place, holes, pieces, np.array(runs, dtype=np.int64).reshape(-1, 7))

    def _write(self, layer: int, places: Sequence[int], parts: Sequence[Part], size: int, into: Pair) -> None:
        firsts = {places[part.place]: part.place for part in parts}
        for part in parts:
            keys, values = (tensor[part.place].narrow(1, 0, size) for tensor in into)
            for first, stop in part.holes:
                keys[:, first:stop], values[:, first:stop] = 0, 0
            if part.pieces:
                self._turn(layer, part, Target(keys, values))
        for place, row in enumerate(places):
            if firsts[row] != place:
                for tensor in into:
                    tensor[place, :, :size] = tensor[firsts[row], :, :size]

    def _turn(self, layer: int, part: Part, target: Target) -> None:
        rotation, keys = self._rotations[layer], target.keys
        if rotation.form is not None:
            stop = max(position + stop - first for first, stop, position in part.pieces)
            return transfer(part.runs, rotation.form.upto(stop, keys.device), target)
        transfer(part.runs, None, target)
        for first, stop, position in part.pieces if rotation.function is not None else ():
            # The model's own function, where its tables are.
            turning = keys[None, :, first:stop].to(self._specs[layer].device)
            keys[:, first:stop] = rotation.rotate(turning, position)[0]
