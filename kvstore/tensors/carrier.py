"""Loads on their way to a device: host slots are copied layer by layer in one stream, and turned from there in another.

A block that has a slot on the device is copied into it and stays; a hot one is there already. What finds no slot goes
through memory of the moment. One stream copies while the other turns, so loading takes as long as the copy.

The host must ask for copies faster than the link makes them, a mebibyte in 20 microseconds, and must not hold up the
engine's thread meanwhile: so a layer's copies are one call, and nothing is done block by block.

One race is worth telling. Memory of the moment belongs to the stream that copies: torch gives it to that stream's next
copy as soon as nobody refers to it, and knows nothing of the stream that turns. So it is referred to until an event
says that it has been read: by who carries, and by what the load leaves behind when it is over before. (No lock but
reentrant ones on that way: a cache that is collected ends its load in whatever thread, in the middle of whatever.)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from kvstore.layout import Layout
from kvstore.tensors.copies import copy, copy_to_device
from kvstore.tensors.runs import Blocks
from kvstore.tensors.streams import CudaStream, Event, Stream, ThreadStream
from kvstore.tensors.transfer import DTYPES, GPU

COPY_BYTES = 1 << 20  # of one block in one copy, at least: layers that are smaller are copied together
FIRST_BYTES, MOST_BYTES = 64 << 20, 256 << 20  # of all blocks, that are copied together at first, and later on
AHEAD_BYTES = 768 << 20  # that are copied before anybody asks: what the link does while a hit is put together
PASSING_BYTES = 1 << 30  # of memory of the moment, at most, for one load

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

    def two(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        """Memory that ``turns`` may write at once, as ``empty``."""
        with torch.inference_mode(False):
            if isinstance(self.turns, CudaStream):
                with torch.cuda.stream(self.turns.stream):
                    return [torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes]
            return [torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes]

    def sent(self, runs: np.ndarray, dtype: torch.dtype) -> Any:
        """``runs`` as ``turns`` can have them soonest, for ``transfer``. The device takes what it is sent in the order
        in which it may begin: what waits for a layer to be copied would come behind all later ones."""
        kernel = GPU.get() if isinstance(self.copies, CudaStream) and dtype in DTYPES else None
        if kernel is None or not isinstance(self.copies, CudaStream) or not isinstance(self.turns, CudaStream):
            return runs
        from kvstore.tensors import rope_gpu

        with torch.cuda.stream(self.copies.stream):
            ready = rope_gpu.prepare(runs, self.device)
        self.turns.wait(self.copies.record())
        ready.table.record_stream(self.turns.stream)
        return ready

    def copy(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
        """``copies`` brings so many bytes each from host memory, at ``sources``, to addresses on the device."""
        stream = self.copies
        if isinstance(stream, CudaStream):
            return copy_to_device(targets, sources, sizes, stream.stream.cuda_stream)
        stream.run(partial(copy, targets, sources, sizes))

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

    @property
    def asked_for(self) -> bool:
        """Whether somebody was told, and all who were have asked for their reading."""
        return 0 < self.asked == len(self.reads)


class Carried:
    """One load, which must have been asked for with ``device=True``, and its places on the device. Any thread.

    What is known of all blocks is in arrays, [blocks], so that a layer costs some calls and no loop over blocks.
    """

    def __init__(self, carrier: Carrier, load: Loading) -> None:
        self._carrier, self._load = carrier, load
        self._layout: Layout = load.layout
        places = load.places(0)
        self._groups = groups(self._layout, len(places))
        self._group_of = [group for group in self._groups for _ in range(*group)]
        blocks = Blocks.of(places)
        self._strides, self._tokens = blocks.strides, blocks.tokens
        strides, of = np.unique(blocks.strides, return_inverse=True)
        kinds, layers = strides.tolist(), range(len(self._layout.layers))
        # Where layers begin in a payload, the end behind the last; how long their keys are: [layers (+ 1), blocks].
        self._begins = _table([self._layout.layer_offsets(stride) for stride in kinds], of, len(layers) + 1)
        keys = [[self._layout.key_bytes(layer, stride) for layer in layers] for stride in kinds]
        self._sizes = _table(keys, of, len(layers))
        self.hot = hot = np.array([place.hot for place in places], dtype=bool)  # what is on the device already
        slots = [None if place.hot else place.slot for place in places]
        # Payloads: in host memory (or on the device, where ``hot``), and on the device but for what passes through.
        self._payloads = blocks.keys - self._begins[0]
        given = np.array([0 if slot is None else slot.pointer for slot in slots], dtype=np.int64)
        self._homes = np.where(hot, self._payloads, given)
        self._fills = np.array([slot is not None for slot in slots], dtype=bool)
        self._passes = ~(hot | self._fills)
        self._lock = threading.RLock()  # guards the fields below, and the load
        self._carried: dict[Group, np.ndarray] = {}  # where a group's first layer is, block by block
        self._passing: dict[Group, Passing] = {}  # oldest first
        self._filled: set[Group] = set()  # slots have these layers
        self._readied: set[Any] = set()  # streams of others that have waited for who had the slots before
        load.ready(carrier.copies)
        load.ready(carrier.turns)

    def wait(self, layer: int, timeout: float) -> bool:
        """Whether the layer, and those that are copied with it, are in host memory and checked, or on the device."""
        group = self._group_of[layer]
        return group in self._carried or all(self._load.wait(each, timeout=timeout) for each in range(*group))

    def begin(self) -> None:
        """Has the first layers copied, as far as they are in memory, before anybody asks for them."""
        with self._lock:
            begun, cold = 0, self._passes | self._fills
            for group in self._groups if cold.any() else ():
                begun += int((self._begins[group[1]] - self._begins[group[0]])[cold].sum())
                if begun > AHEAD_BYTES or not self.wait(group[0], timeout=0.0):
                    return
                self._carried[group] = self._carry(group)

    def places(self, layer: int) -> Blocks:
        """Where the layer is on the device, once ``turns`` has come so far.

        Only after ``wait`` has said yes; ``used`` must follow. Waits, where too much would pass through at a time.
        """
        group = self._group_of[layer]
        while True:
            with self._lock:
                before = () if group in self._carried else self._in_the_way(group)
                if not before:
                    if group not in self._carried:
                        self._carried[group] = self._carry(group)
                    if group in self._passing:
                        self._passing[group].asked += 1
                    keys = self._carried[group] + (self._begins[layer] - self._begins[group[0]])
                    return Blocks(keys, keys + self._sizes[layer], self._strides, self._tokens)
            for read in before:  # without the lock: the engine's thread may want it
                read.wait()

    def free(self, layer: int) -> bool:
        """Whether ``places`` would wait for nothing, after ``wait`` has said yes."""
        group = self._group_of[layer]
        with self._lock:
            return group in self._carried or not self._in_the_way(group)

    def stored(self, layer: int) -> Blocks:
        """Where the layer is in host memory, or on the device of what is ``hot``, after ``wait`` has said yes."""
        keys = self._payloads + self._begins[layer]
        return Blocks(keys, keys + self._sizes[layer], self._strides, self._tokens)

    def block(self, first: int, stop: int) -> tuple[int, int, bool] | None:
        """All layers of the one full block that begins with token ``first`` and holds those before ``stop``: address,
        bytes, and whether that is ``hot``. None: there is no such block, or not all of it is in memory yet."""
        used, low, _ = self.stored(0).within(first, stop)
        full = len(used) == 1 and not low[0] and self._strides[used[0]] == self._layout.block_tokens
        if not full or not all(self._load.wait(layer, timeout=0.0) for layer in range(len(self._layout.layers))):
            return None
        number = int(used[0])
        return int(self._payloads[number]), int(self._begins[-1][number]), bool(self.hot[number])

    def ready(self, stream: Stream) -> None:
        """Before ``stream`` reads what is ``hot``; once is enough for a CUDA stream."""
        key = stream.stream if isinstance(stream, CudaStream) else None
        with self._lock:
            if key is None or key not in self._readied:
                self._load.ready(stream)
            self._readied.add(key)

    def used(self, layer: int, event: Event) -> None:
        """``turns`` has read the layer when it reaches ``event``."""
        group = self._group_of[layer]
        with self._lock:
            self._load.used(event)
            if group in self._passing:
                self._passing[group].reads.append(event)
            self._let_go(group)

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

    def _carry(self, group: Group) -> np.ndarray:
        """Has a group of layers copied; where its first layer will be, block by block. Locked."""
        carrier, begins = self._carrier, self._begins[group[0]]
        sizes = self._begins[group[1]] - begins
        passing = np.where(self._passes, sizes, 0)  # in memory of the moment
        room = int(passing.sum())
        memory = carrier.empty(carrier.copies, (room,), torch.uint8)
        addresses = np.where(self._passes, memory.data_ptr() + passing.cumsum() - passing, self._homes + begins)
        copied = self._passes if group in self._filled else self._passes | self._fills
        self._filled.add(group)
        if copied.any():
            carrier.copy(addresses[copied], (self._payloads + begins)[copied], sizes[copied])
            event = carrier.copies.record()
            carrier.turns.wait(event)
            self._load.used(event)
        if room:
            self._passing[group] = Passing(memory)
        return addresses

    def _let_go(self, but: Group) -> None:
        """Of memory of the moment that has been read, all but that of one group: who asks again has it copied again.
        Locked."""
        for group, passing in list(self._passing.items()):
            if group != but and passing.asked_for and all(read.done() for read in passing.reads):
                del self._passing[group], self._carried[group]

    def _in_the_way(self, group: Group) -> Sequence[Event]:
        """Which reads must be over before a group may pass through. Locked."""
        self._let_go(group)
        wanted = int((self._begins[group[1]] - self._begins[group[0]])[self._passes].sum())
        if wanted and wanted + sum(each.memory.numel() for each in self._passing.values()) > PASSING_BYTES:
            for passing in self._passing.values():
                if passing.asked_for:
                    return tuple(passing.reads)
        return ()


def _table(of_kinds: Sequence[Sequence[int]], kinds: np.ndarray, numbers: int) -> np.ndarray:
    """[numbers, blocks] from [kinds, numbers], given the kind of each block."""
    return np.ascontiguousarray(np.array(of_kinds, dtype=np.int64).reshape(-1, numbers)[kinds].T)


def groups(layout: Layout, blocks: int = 1) -> list[Group]:
    """Runs of layers (first, last + 1) that are copied together: but for the last, each at least ``COPY_BYTES`` of a
    block, and so much of all ``blocks`` that asking for it takes the host less than the link. The first is small,
    because somebody waits for it, and each may be twice as large as the one before.
    """
    offsets = layout.layer_offsets(layout.block_tokens)
    found, first, wanted = [], 0, FIRST_BYTES
    for layer in range(1, len(offsets)):
        size = offsets[layer] - offsets[first]
        if (size >= COPY_BYTES and size * blocks >= wanted) or layer == len(offsets) - 1:
            found.append((first, layer))
            first, wanted = layer, min(2 * wanted, MOST_BYTES)
    return found
