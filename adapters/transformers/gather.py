"""What the store gives for a batch, as runs for the kernel: which tokens of which block go to which columns.

Columns are what the model's cache counts. Where no span of a row says what they hold, they are zero: padding, which
the attention mask hides, or tokens that the model is about to compute.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kvstore.adapters.transformers.buffers import LayerSpec, Pair
from kvstore.adapters.transformers.rotated import Stretch, stretches
from kvstore.adapters.transformers.rotation import Form, Rotation
from kvstore.tensors.carrier import Carried, Carrier
from kvstore.tensors.memory import empty
from kvstore.tensors.plain import at
from kvstore.tensors.rope import Turn
from kvstore.tensors.runs import POSITION, Blocks, Target, runs_of
from kvstore.tensors.streams import Event, current
from kvstore.tensors.transfer import transfer

CPU = torch.device("cpu")

log = logging.getLogger("kvstore")


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
    stored: int | None = None  # the position that its key is turned for as it is stored; None: keys are before rotation

    def cut(self, low: int, high: int) -> Span:
        """Its tokens ``low`` to ``high``."""
        stored = None if self.stored is None else self.stored + low
        return Span(self.source, self.first + low, high - low, self.position + low, self.column + low, stored)

    def apart(self, rotated: Sequence[Stretch]) -> list[Span]:
        """The same in spans whose keys are all before rotation, or all turned."""
        found, done = [], 0
        for stretch in rotated:
            low, high = max(stretch.first - self.first, 0), min(stretch.stop - self.first, self.tokens)
            if low < high:
                stored = stretch.position + self.first + low - stretch.first
                found += [self.cut(done, low), self.cut(low, high)._replace(stored=stored)]
                done = high
        return [span for span in (*found, self.cut(done, self.tokens)) if span.tokens]


class Part(NamedTuple):
    """What one row's sequence takes of a layer."""

    place: int  # of the sequence in the batch
    holes: list[tuple[int, int]]  # columns that nothing is brought to
    spans: list[Span]
    runs: list[np.ndarray]  # of each span


class Gather:
    """The loads of a batch, and how their bytes become tensors. Its leases end with ``release``.

    ``rows``: of each row its spans, in order of columns; of loads that are None there are none.

    What another engine has stored with its keys turned is given as it is at the positions that they are turned for, and
    elsewhere, where the layer's rotation has a form, turned by the difference.

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
        self.loads, self.columns = list(loads), columns
        self._rotated = [stretches(load) for load in loads]
        self.rows = [[part for span in row for part in span.apart(self._rotated[span.source])] for row in rows]
        self._between: dict[tuple[Form, int, int, int], Turn] = {}
        self._specs, self._rotations, self.dtype = specs, rotations, dtype
        self._carrier = carrier
        self._source = device
        self._device = device if carrier is None else carrier.device
        self._carried = [None if load is None or carrier is None else Carried(carrier, load) for load in loads]

    def begin(self) -> Gather:
        """Has the device's first layers copied, as far as they are in memory, before anybody asks for them."""
        for carried in self._carried:
            if carried is not None:
                try:
                    carried.begin()
                except RuntimeError as error:  # no memory: whoever asks for the layers tries again, and hears of it
                    log.debug("copies could not be begun: %s", error)
        return self

    @property
    def asks_only(self) -> bool:
        """Whether ``layer`` asks a device for its work and waits for none of it."""
        return self._carrier is not None and not any(load is not None and load.lent for load in self.loads)

    def free(self, layer: int) -> bool:
        """Whether a layer can be asked of the device now: all of it is in memory, and there is room to bring it."""
        return self.wait(layer, 0.0) and all(each is None or each.free(layer) for each in self._carried)

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
        keys, values = self._carrier.two(shapes, self.dtype)
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
        load, carried, spec = self.loads[source], self._carried[source], self._specs[layer]
        if load is None or not tokens:
            return
        blocks = Blocks.of(load.places(layer)) if carried is None else carried.stored(layer)
        for block, low, high in zip(*(part.tolist() for part in blocks.within(first, first + tokens)), strict=True):
            shape, device = (spec.heads, int(blocks.strides[block])), self._source
            if carried is not None and carried.hot[block]:
                device = self._device
                carried.ready(current(device))
            keys, values = (
                at(int(addresses[block]), (*shape, dim), self.dtype, device)[:, low:high]
                for addresses, dim in ((blocks.keys, spec.key_dim), (blocks.values, spec.value_dim))
            )
            yield keys, values

    def has_originals(self, source: int, first: int, tokens: int) -> bool:
        """Whether the keys of these tokens of a load are stored before rotation, all of them."""
        ends = [(max(first, each.first), min(first + tokens, each.stop)) for each in self._rotated[source]]
        return not any(low < high for low, high in ends)

    def whole(self, source: int, first: int, tokens: int) -> torch.Tensor | None:
        """``originals`` of all layers at once, as bytes: the payload of the block that they are the first tokens of.
        None where they are no such thing, or not in memory yet, or no device is to read them."""
        carried = self._carried[source]
        found = None if carried is None else carried.block(first, first + tokens)
        if carried is None or found is None:
            return None
        address, size, hot = found
        if hot:
            carried.ready(current(self._device))
        return at(address, (size,), torch.uint8, self._device if hot else self._source)

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
                cut.append(span.cut(low - span.column, high - span.column)._replace(column=low - start))
        return cut

    def _part(self, layer: int, place: int, row: int, start: int, size: int) -> Part:
        holes, runs, column, spans = [], [], 0, self._within(row, start, size)
        places: dict[int, Any] = {}
        for span in spans:
            if span.source not in places:
                places[span.source] = (self._carried[span.source] or self.loads[span.source]).places(layer)
            stop = span.first + span.tokens
            runs.append(runs_of(places[span.source], span.first, stop, span.position, span.column))
            holes.append((column, span.column))
            column = span.column + span.tokens
        holes = [hole for hole in (*holes, (column, size)) if hole[0] < hole[1]]
        return Part(place, holes, spans, runs)

    def _write(self, layer: int, places: Sequence[int], parts: Sequence[Part], size: int, into: Pair) -> None:
        firsts = {places[part.place]: part.place for part in parts}
        for part in parts:
            keys, values = (tensor[part.place].narrow(1, 0, size) for tensor in into)
            for first, stop in part.holes:
                keys[:, first:stop], values[:, first:stop] = 0, 0
            if part.spans:
                self._turn(layer, part, Target(keys, values))
        for place, row in enumerate(places):
            if firsts[row] != place:
                for tensor in into:
                    tensor[place, :, :size] = tensor[firsts[row], :, :size]

    def _turn(self, layer: int, part: Part, target: Target) -> None:
        rotation, keys, stop = self._rotations[layer], target.keys, 0
        form, still, turning = rotation.form, list[np.ndarray](), list[np.ndarray]()
        for span, runs in zip(part.spans, part.runs, strict=True):
            if rotation.function is None or span.stored == span.position or (form is None and span.stored is None):
                still.append(runs)
            elif span.stored is None:
                turning.append(runs)
                stop = max(stop, span.position + span.tokens)
            else:
                assert form is not None  # else the match was cut before it
                runs[:, POSITION] -= span.position
                transfer(runs, self._moving(form, span, span.stored, keys), target)
        if still:
            transfer(np.concatenate(still), None, target)
        if turning and form is not None:
            transfer(np.concatenate(turning), form.upto(stop, keys.device), target)
        for span in part.spans if form is None and rotation.function is not None else ():
            if span.stored is None:  # the model's own function, where its tables are
                first, last = span.column, span.column + span.tokens
                given = keys[None, :, first:last].to(self._specs[layer].device)
                keys[:, first:last] = rotation.rotate(given, span.position)[0]

    def _moving(self, form: Form, span: Span, stored: int, keys: torch.Tensor) -> Turn:
        """What turns keys of a span from where they stand as stored, the same for all layers of a form."""
        where = form, stored, span.position, span.tokens
        if where not in self._between:
            self._between[where] = form.between(stored, span.position, span.tokens, keys)
        return self._between[where]
