"""Device tiers for tests, of every kind, with streams that work on them and readers that are held up."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from blocks import NS, WIDE, found, marks, recount, rows
from gates import PATIENCE

import kvstore
from kvstore import Layout, Namespace
from kvstore.hot import Hot
from kvstore.load import Load
from kvstore.local import LocalStore
from kvstore.tensors.streams import CudaStream, Stream, ThreadStream, current
from kvstore.tiers.base import DeviceSlots
from kvstore.tiers.device import DeviceTier
from kvstore.tiers.naive import NaiveDevice

KIB, MIB = 1 << 10, 1 << 20
HERE = current("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
TIERS: dict[str, Callable[[int], DeviceSlots]] = {
    "naive": NaiveDevice,
    "cpu": lambda capacity: DeviceTier(capacity, "cpu"),
    "cuda": lambda capacity: DeviceTier(capacity, "cuda"),
}


def stream_for(tier: DeviceSlots) -> Stream:
    device = tier.device if isinstance(tier, DeviceTier) else torch.device("cpu")
    return CudaStream(device) if device.type == "cuda" else ThreadStream("kvstore-test")


def tensor(memory: torch.Tensor | memoryview) -> torch.Tensor:
    return memory if isinstance(memory, torch.Tensor) else torch.frombuffer(memory, dtype=torch.uint8)


def put(tier: DeviceSlots, address: int, value: int) -> None:
    """At once: nothing else is at work."""
    tensor(tier.memory(address)).fill_(value)


def contents(tier: DeviceSlots, address: int) -> set[int]:
    return set(tensor(tier.memory(address)).tolist())


def fill_up(tier: DeviceSlots, size: int) -> list[int]:
    addresses = []
    while (address := tier.reserve(size)) is not None:
        addresses.append(address)
    return addresses


class Reader:
    """A stream that is about to read slots, and is held up before it does."""

    def __init__(self, tier: DeviceSlots) -> None:
        self.tier, self.stream, self._gate = tier, stream_for(tier), threading.Event()
        self.read: list[torch.Tensor] = []
        if isinstance(self.stream, CudaStream):
            self.stream.run(slow_kernel)
        else:
            self.stream.run(self._wait)

    def _wait(self) -> None:
        self._gate.wait(PATIENCE)

    def reads(self, address: int) -> None:
        memory = tensor(self.tier.memory(address))
        self.read.append(torch.empty_like(memory))
        target = self.read[-1]
        self.tier.ready(address, self.stream)
        self.stream.run(lambda: none(target.copy_(memory)))
        self.tier.note(address, self.stream.record())

    def go_on(self) -> None:
        self._gate.set()

    def saw(self) -> list[set[int]]:
        self._gate.set()
        self.stream.close()
        return [set(target.tolist()) for target in self.read]


def slow_kernel(cycles: int = 200_000_000) -> None:
    """Holds the current stream up, by default for a tenth of a second or so."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def none(_: object) -> None:
    """What work gives back."""


def write(tier: DeviceSlots, stream: Stream, address: int, value: int) -> None:
    memory = tensor(tier.memory(address))
    tier.ready(address, stream)
    stream.run(lambda: none(memory.fill_(value)))
    tier.note(address, stream.record())


# -- what an engine does with a load ---------------------------------------------------------------------------------


def bring(load: Load, stream: Stream) -> bool:
    """Fills the load's slots in a stream, as an adapter does; whether every layer came."""
    load.ready(stream)
    layout, whole = load.layout, True
    for layer in range(len(layout.layers)):
        whole = whole and load.wait(layer)
        for place in load.places(layer) if whole else ():
            if place.slot is not None and not place.hot:
                size = layout.key_bytes(layer, place.stride) + layout.value_bytes(layer, place.stride)
                start = place.slot.keys(layer) - place.slot.pointer
                stream.run(partial(_copy, tensor(place.slot.memory)[start : start + size], place.keys, size))
    load.used(stream.record())
    if whole:
        load.filled()
    return whole


def asked(store: LocalStore, tokens: Sequence[int], layout: Layout = WIDE) -> Load:
    """A load for the device."""
    return store.load(found(store, tokens, layout=layout), device=True)


def heat(store: LocalStore, tokens: Sequence[int], layout: Layout = WIDE) -> None:
    """Has a chain on the device, as far as there is room."""
    made = asked(store, tokens, layout)
    assert bring(made, HERE)
    made.release()


def device(store: LocalStore) -> Hot:
    """What is on the device, once the store has taken in what loads have handed back."""
    assert store._residency.hot is not None
    store.stats()
    return store._residency.hot


def _copy(target: torch.Tensor, address: int, size: int) -> None:
    source = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)
    target.copy_(source, non_blocking=True)


def wrong_on_device(load: Load, tokens: Sequence[int], space: Namespace = NS, writer: int = 0) -> list[str]:
    """Where the bytes of a load's slots are not what was saved; every stream has come to rest."""
    layout, every, faults = load.layout, marks(space, tokens, writer), list[str]()
    for layer, shape in enumerate(layout.layers):
        start = 0
        for place in load.places(layer):
            part = every[start : start + place.tokens]
            if place.slot is not None:
                memory = bytes(tensor(place.slot.memory).cpu().numpy())
                offset = place.slot.keys(layer) - place.slot.pointer
                sizes = (layout.key_bytes(layer, place.stride), layout.value_bytes(layer, place.stride))
                for kind, begin in enumerate((offset, offset + sizes[0])):
                    for head in range(shape.heads):
                        expected = rows(layout, layer, kind, head, part)
                        at = begin + head * sizes[kind] // shape.heads
                        if memory[at : at + len(expected)] != expected:
                            faults.append(f"layer {layer} kind {kind} head {head} tokens {start}+{place.tokens}")
            start += place.tokens
    return faults


def recount_device(store: LocalStore) -> list[str]:
    """Where the device's accounts differ from what is there; call when nothing is held."""
    said, residency = store.stats(), store._residency
    hot, faults = residency.hot, []
    assert hot is not None and isinstance(hot.tier, DeviceTier)
    with residency.lock:
        live = {n << 24 | slot for n, extent in hot.tier._slab.extents.items() for slot in extent.live}
        if live != {slot.address for slot in [*hot._slots.values(), *hot._erasable]}:
            faults.append("slots in use are not the blocks")
        if set(hot) != set(hot._slots) or hot._leaving or any(slot.users for slot in hot._slots.values()):
            faults.append("somebody still has slots")
        if not all(residency.index.present(number) for number in hot):
            faults.append("blocks that are nowhere else")
        if said["tiers"]["device"]["bytes"] != sum(map(residency.payload, hot)):
            faults.append("bytes")
        if set(hot._policy.victims()) != set(hot):
            faults.append("policy")
    return faults


def a_store_with_a_device(folder: Path) -> Iterator[LocalStore]:
    """With a disk and a device of five WIDE blocks; its accounts must be right at the end."""
    with kvstore.open(folder, host="8MiB", disk="64MiB", device="1MiB", device_name="cpu") as opened:
        yield opened
        if not opened._closed:
            opened.flush()
            assert recount(opened) == []
            assert recount_device(opened) == []
