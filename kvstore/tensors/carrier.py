"""Loads on their way to a device: host slots are copied layer by layer in one stream, and turned from there in another.

A block that has a slot on the device is copied into it and stays; a hot one is there already. What finds no slot goes
through memory of the moment. One stream copies while the other turns, so loading takes as long as the copy.

The host must ask for copies faster than the link makes them, a mebibyte in 20 microseconds: so a layer's copies are
one work, and what can be known once per load is not asked for again per layer.

One race is worth telling. Memory of the moment belongs to the stream that copies: torch gives it to that stream's next
copy as soon as nobody refers to it, and knows nothing of the stream that turns. So it is referred to until an event
says that it has been read: by who carries, and by what the load leaves behind when it is over before. (No lock but
reentrant ones on that way: a cache that is collected ends its load in whatever thread, in the middle of whatever.)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch

from kvstore.layout import Layout
from kvstore.tensors.plain import at
from kvstore.tensors.streams import CudaStream, Event, Stream, ThreadStream

CPU = torch.device("cpu")
COPY_BYTES = 1 << 20  # of one block in one copy, at least: layers that are smaller are copied together

Group = tuple[int, int]  # layers, first and last + 1


class Loading(Protocol):
    """What is needed of a load of the store, ``kvstore.load.Load``."""

    layout: Layout

    def wait(self, layer: int, timeout: float | None = None) -> bool: ...
    def places(self, layer: int) -> Any: ...
    def ready(self, stream: Stream) -> None: ...
    def used(self, event: Event) -> None: ...
    def keep(self, memory: object) -> None: ...
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


@dataclass(slots=True)
class Passing:
    """Memory of the moment: one group of layers."""

    memory: torch.Tensor
    asked: int = 0  # how often somebody was told where it is
    reads: list[Event] = field(default_factory=list)  # from each of whom one follows


class Carried:
    """One load, which must have been asked for with ``device=True``, and its places on the device. Any thread."""

    def __init__(self, carrier: Carrier, load: Loading) -> None:
        self._carrier, self._load = carrier, load
        self._layout: Layout = load.layout
        self._groups = groups(self._layout)
        self._group_of = [group for group in self._groups for _ in range(*group)]
        # Where each block's payload is: that of a hot one on the device, of others in host memory.
        self._blocks: list[Any] = load.places(0)
        self._offsets = {block.stride: self._layout.layer_offsets(block.stride) for block in self._blocks}
        self._sources: list[torch.Tensor] = []  # the payloads in host memory, once they are copied
        self._lock = threading.RLock()  # guards the fields above and below, and the load
        self._carried: dict[Group, list[int]] = {}  # where a group's first layer is, block by block
        self._passing: dict[Group, Passing] = {}
        self._filled: set[Group] = set()  # slots have these layers
        load.ready(carrier.copies)
        load.ready(carrier.turns)

    def wait(self, layer: int, timeout: float) -> bool:
        """Whether the layer, and those that are copied with it, are in host memory and checked, or on the device."""
        group = self._group_of[layer]
        return group in self._carried or all(self._load.wait(each, timeout=timeout) for each in range(*group))

    def places(self, layer: int) -> list[Any]:
        """Where the layer is on the device, block by block (``kvstore.load.Place``), once ``turns`` has come so far.

        Only after ``wait`` has said yes; ``used`` must follow.
        """
        group = self._group_of[layer]
        with self._lock:
            if group not in self._carried:
                self._carried[group] = self._carry(group)
            if group in self._passing:
                self._passing[group].asked += 1
            moves = {
                stride: (offsets[layer] - offsets[group[0]], self._layout.key_bytes(layer, stride))
                for stride, offsets in self._offsets.items()
            }
            places = []
            for block, first in zip(self._blocks, self._carried[group], strict=True):
                move, size = moves[block.stride]
                places.append(block._make((first + move, first + move + size, *block[2:])))
            return places

    def used(self, layer: int, event: Event) -> None:
        """``turns`` has read the layer when it reaches ``event``."""
        group = self._group_of[layer]
        with self._lock:
            self._load.used(event)
            if group in self._passing:
                self._passing[group].reads.append(event)
            for other, passing in list(self._passing.items()):
                settled = len(passing.reads) == passing.asked and all(read.done() for read in passing.reads)
                if other != group and settled:
                    del self._passing[other], self._carried[other]  # who asks again has it copied again

    def read(self, event: Event) -> None:
        """Another stream has read blocks where they are when it reaches ``event``."""
        with self._lock:
            self._load.used(event)

    def over(self, tokens: int) -> None:
        """Nothing more is asked for. What was brought whole stays on the device, of the first ``tokens``."""
        with self._lock:
            if len(self._filled) == len(self._groups):
                self._load.filled(tokens)
            for each in self._passing.values():
                self._load.keep(each.memory)

    def _carry(self, group: Group) -> list[int]:
        """Has a group of layers copied, block by block; where its first layer will be of each."""
        carrier, blocks = self._carrier, self._blocks
        if not self._sources:
            self._sources = [
                at(block.keys, (0 if block.hot else self._offsets[block.stride][-1],), torch.uint8, CPU)
                for block in blocks
            ]
        spans = {stride: (offsets[group[0]], offsets[group[1]]) for stride, offsets in self._offsets.items()}
        sizes = [
            spans[block.stride][1] - spans[block.stride][0] if block.slot is None else 0 for block in blocks
        ]  # in memory of the moment
        memory = carrier.empty(carrier.copies, (sum(sizes),), torch.uint8)
        starts = accumulate(sizes, initial=memory.data_ptr())
        addresses, copies = [], []
        for block, source, passing, address in zip(blocks, self._sources, memory.split(sizes), starts, strict=False):
            start, end = spans[block.stride]
            if block.hot:
                addresses.append(block.keys + start)
            elif block.slot is None:
                addresses.append(address)
                copies.append((passing, source[start:end]))
            else:
                addresses.append(block.slot.pointer + start)
                if group not in self._filled:
                    copies.append((block.slot.memory[start:end], source[start:end]))
        carrier.copies.run(lambda: _copy(copies))
        event = carrier.copies.record()
        carrier.turns.wait(event)
        self._load.used(event)
        self._filled.add(group)
        if any(sizes):
            self._passing[group] = Passing(memory)
        return addresses


def _copy(copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in copies:
        target.copy_(source, non_blocking=True)


def groups(layout: Layout) -> list[Group]:
    """Runs of layers (first, last + 1) that take at least ``COPY_BYTES`` of a full block, but for the last."""
    offsets = layout.layer_offsets(layout.block_tokens)
    found, first = [], 0
    for layer in range(1, len(offsets)):
        if offsets[layer] - offsets[first] >= COPY_BYTES or layer == len(offsets) - 1:
            found.append((first, layer))
            first = layer
    return found
