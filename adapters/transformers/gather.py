"""What the store gives for a batch, as runs for the kernel: which tokens of which block go to which columns.

Columns are what the model's cache counts: row ``i`` with ``t`` cached tokens has them in the last ``t`` of the
``columns`` that are loaded; what lies before is padding, which the attention mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Part(NamedTuple):
    """What one row's sequence takes of a layer."""

    place: int  # of the sequence in the batch
    hole: int  # columns of padding in front
    token: int  # the first behind them
    runs: np.ndarray


class Gather:
    """The loads of a batch, one per row or None, and how their bytes become tensors. Its leases end with ``release``.

    With a ``carrier`` the tensors are on its device, and the loads were asked for so; without, they are on the CPU.
    Different layers may be asked for by different threads at the same time.
    """

    def __init__(
        self,
        loads: Sequence[Any],
        tokens: Sequence[int],
        columns: int,
        specs: Sequence[LayerSpec],
        rotations: Sequence[Rotation],
        dtype: torch.dtype,
        carrier: Carrier | None = None,
        device: torch.device = CPU,  # where addresses of loads are, without a carrier
    ) -> None:
        self.loads, self.tokens, self.columns = list(loads), list(tokens), columns
        self._specs, self._rotations, self._dtype = specs, rotations, dtype
        self._carrier = carrier
        self._source = device
        self._device = device if carrier is None else carrier.device
        self._carried = [None if load is None or carrier is None else Carried(carrier, load) for load in loads]

    def wait(self, layer: int, timeout: float) -> bool:
        """Whether this layer of every row is in memory and checked, at the latest after ``timeout`` seconds."""
        sources = [carried or load for carried, load in zip(self._carried, self.loads, strict=True)]
        return all(source is None or source.wait(layer, timeout=timeout) for source in sources)

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
            keys, values = (empty(shape, self._dtype, self._device) for shape in shapes)
            self._write(layer, places, parts, size, (keys, values))
            return Brought(keys, values)
        turns = self._carrier.turns
        keys, values = (self._carrier.empty(turns, shape, self._dtype) for shape in shapes)
        turns.run(lambda: self._write(layer, places, parts, size, (keys, values)))
        event = turns.record()
        for part in parts:
            carried = self._carried[places[part.place]]
            if carried is not None and part.hole < size:
                carried.used(layer, event)
        return Brought(keys, values, event)

    def tail(self, layer: int, row: int, block: int, tokens: int) -> Pair | None:
        """Keys before rotation and values of the first ``tokens`` of a row's block, [heads, tokens, dim].

        They are the store's own memory: say ``tail_read`` as soon as the engine's stream has been asked to read them.
        """
        load, spec = self.loads[row], self._specs[layer]
        if load is None:
            return None
        place = load.places(layer)[block]
        if place.hot:
            load.ready(current(self._device))
        device = self._device if place.hot else self._source
        keys, values = (
            at(address, (spec.heads, place.stride, dim), self._dtype, device)[:, :tokens]
            for address, dim in ((place.keys, spec.key_dim), (place.values, spec.value_dim))
        )
        return keys, values

    def tail_read(self, row: int) -> None:
        """The memory stays until the engine's stream, which the host may be far ahead of, has come so far."""
        carried = self._carried[row]
        if carried is not None:
            carried.read(current(self._device).record())

    def release(self) -> None:
        """End the leases; what was given out is the model's."""
        for carried, load, tokens in zip(self._carried, self.loads, self.tokens, strict=True):
            if carried is not None:
                carried.over(tokens)
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

    def _part(self, layer: int, place: int, row: int, start: int, size: int) -> Part:
        first = self.columns - self.tokens[row]  # column of the row's first token
        source = self._carried[row] or self.loads[row]
        hole = size if source is None else min(max(0, first - start), size)
        runs = runs_of(
            source.places(layer) if hole < size else (), self.tokens[row], start - first, start + size - first
        )
        return Part(place, hole, max(0, start - first), runs)

    def _write(self, layer: int, places: Sequence[int], parts: Sequence[Part], size: int, into: Pair) -> None:
        firsts = {places[part.place]: part.place for part in parts}
        for part in parts:
            keys, values = (tensor[part.place].narrow(1, 0, size) for tensor in into)
            keys[:, : part.hole], values[:, : part.hole] = 0, 0
            if part.hole < size:
                self._turn(layer, part, Target(keys, values))
        for place, row in enumerate(places):
            if firsts[row] != place:
                for tensor in into:
                    tensor[place, :, :size] = tensor[firsts[row], :, :size]

    def _turn(self, layer: int, part: Part, target: Target) -> None:
        rotation, keys = self._rotations[layer], target.keys
        if rotation.form is not None:
            stop = part.token + keys.shape[1] - part.hole
            return transfer(part.runs, rotation.form.upto(stop, keys.device), target)
        transfer(part.runs, None, target)
        if rotation.function is not None:
            # The model's own function, where its tables are.
            turning = keys[None, :, part.hole :].to(self._specs[layer].device)
            keys[:, part.hole :] = rotation.rotate(turning, part.token)[0]
