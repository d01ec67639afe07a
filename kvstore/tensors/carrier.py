"""Loads on their way to a device: host slots are copied layer by layer in one stream, and turned from there in another.

A block that has a slot on the device is copied into it and stays; a hot one is there already. What finds no slot goes
through memory of the moment. One stream copies while the other turns, so loading takes as long as the copy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvstore.layout import Layout
from kvstore.tensors.plain import at
from kvstore.tensors.streams import CudaStream, Event, Stream, ThreadStream

CPU = torch.device("cpu")
COPY_BYTES = 1 << 20  # of one block in one copy, at least: layers that are smaller are copied together


class Loading(Protocol):
    """What is needed of a load of the store, ``kvstore.load.Load``."""

    layout: Layout

    def wait(self, layer: int, timeout: float | None = None) -> bool: ...
    def places(self, layer: int) -> Any: ...
    def ready(self, stream: Stream) -> None: ...
    def used(self, event: Event) -> None: ...
    def filled(self, tokens: int | None = None) -> None: ...


class Carrier:
    """The streams of one device: ``copies`` brings bytes from host memory, ``turns`` runs the kernels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self.copies: Stream = CudaStream(device) if cuda else ThreadStream("kvstore-copies")
        self.turns: Stream = CudaStream(device) if cuda else ThreadStream("kvstore-turns")

    def empty(self, stream: Stream, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that ``stream`` may write at once. Whoever else uses it must wait for an event first."""
        with torch.inference_mode(False):  # whoever gets it may write to it in either mode
            if isinstance(stream, CudaStream):
                with torch.cuda.stream(stream.stream):
                    return torch.empty(shape, dtype=dtype, device=self.device)
            return torch.empty(shape, dtype=dtype, device=self.device)

    def close(self) -> None:
        """Waits for what is under way."""
        self.copies.close()
        self.turns.close()


class Carried:
    """One load, which must have been asked for with ``device=True``, and its places on the device. Any thread."""

    def __init__(self, carrier: Carrier, load: Loading) -> None:
        self._carrier, self._load = carrier, load
        self._layout: Layout = load.layout
        self._groups = groups(self._layout)
        self._group_of = [group for group in self._groups for _ in range(*group)]
        self._lock = threading.RLock()  # guards the fields below, and the load
        self._carried: dict[tuple[int, int], list[int]] = {}  # group -> where its first layer is, block by block
        # Memory of the moment by group, and the event behind which nobody reads it.
        self._passing: dict[tuple[int, int], tuple[torch.Tensor, Event | None]] = {}
        load.ready(carrier.copies)
        load.ready(carrier.turns)

    def wait(self, layer: int, timeout: float) -> bool:
        """Whether the layer, and those that are copied with it, are in host memory and checked, or on the device."""
        group = self._group_of[layer]
        return group in self._carried or all(self._load.wait(each, timeout=timeout) for each in range(*group))

    def places(self, layer: int) -> list[Any]:
        """Where the layer is on the device, block by block (``kvstore.load.Place``), once ``turns`` has come so far.

        Only after ``wait`` has said yes.
        """
        group, layout = self._group_of[layer], self._layout
        with self._lock:
            if group not in self._carried:
                self._carried[group] = self._carry(group)
            moved = []
            for place, first in zip(self._load.places(layer), self._carried[group], strict=True):
                offsets = layout.layer_offsets(place.stride)
                keys = first + offsets[layer] - offsets[group[0]]
                moved.append(place._replace(keys=keys, values=keys + layout.key_bytes(layer, place.stride)))
            return moved

    def used(self, layer: int, event: Event) -> None:
        """``turns`` has read the layer when it reaches ``event``."""
        group = self._group_of[layer]
        with self._lock:
            self._load.used(event)
            if group in self._passing:
                self._passing[group] = (self._passing[group][0], event)
            over = [g for g, (_, last) in self._passing.items() if g != group and last is not None and last.done()]
            for each in over:
                del self._passing[each]

    def over(self, tokens: int) -> None:
        """Nothing more is asked for. What was brought whole stays on the device, of the first ``tokens``."""
        with self._lock:
            if len(self._carried) == len(self._groups):
                self._load.filled(tokens)

    def _carry(self, group: tuple[int, int]) -> list[int]:
        """Has a group of layers copied, block by block; where its first layer will be of each."""
        carrier, layout, (first, last) = self._carrier, self._layout, group
        places = self._load.places(first)
        sizes = [layout.layer_offsets(p.stride)[last] - layout.layer_offsets(p.stride)[first] for p in places]
        passing = sum(size for place, size in zip(places, sizes, strict=True) if place.slot is None)
        memory = carrier.empty(carrier.copies, (passing,), torch.uint8)
        addresses, used = [], 0
        for place, size in zip(places, sizes, strict=True):
            if place.hot:
                addresses.append(place.keys)
                continue
            if place.slot is None:
                target, used = memory[used : used + size], used + size
            else:
                start = layout.layer_offsets(place.stride)[first]
                target = place.slot.memory[start : start + size]
            addresses.append(target.data_ptr())
            source = at(place.keys, (size,), torch.uint8, CPU)
            carrier.copies.run(lambda target=target, source=source: target.copy_(source, non_blocking=True))  # type: ignore[misc]
        event = carrier.copies.record()
        carrier.turns.wait(event)
        self._load.used(event)
        if passing:
            self._passing[group] = (memory, None)
        return addresses


def groups(layout: Layout) -> list[tuple[int, int]]:
    """Runs of layers (first, last + 1) that take at least ``COPY_BYTES`` of a full block, but for the last."""
    offsets = layout.layer_offsets(layout.block_tokens)
    found, first = [], 0
    for layer in range(1, len(offsets)):
        if offsets[layer] - offsets[first] >= COPY_BYTES or layer == len(offsets) - 1:
            found.append((first, layer))
            first = layer
    return found
