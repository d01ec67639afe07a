"""Pins that keep books, clients that have them, and long chains on their way from a daemon to a device."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from blocks import NS, ids
from daemons import PATIENCE, TIMEOUT, until

from kvstore import LayerShape, Layout
from kvstore.daemon.client import Client
from kvstore.daemon.mapped import base_of
from kvstore.daemon.pinning import Both, Pinning
from kvstore.load import Load
from kvstore.store import Store
from kvstore.tensors.streams import CudaStream, ThreadStream
from kvstore.tiers.device import CudaPins

LARGE = Layout((LayerShape(8, 128, 128),) * 8, "bfloat16", block_tokens=256)  # 8 MiB each, 1 MiB a layer
BLOCKS = 16
LONG = ids(3, BLOCKS * LARGE.block_tokens)


class Ledger:
    """``Pins`` that only keep the books: refuse at the calls given, and stand still while ``gate`` is closed."""

    def __init__(self, *failing: int) -> None:
        self.failing, self.gate, self.reached = failing, threading.Event(), threading.Event()
        self.gate.set()
        self.calls, self.pinned = list[str](), dict[int, int]()  # rights of the memory; what is pinned
        self.faults, self.threads = list[str](), set[str]()

    def pin(self, address: int, size: int) -> bool:
        self.reached.set()
        assert self.gate.wait(PATIENCE)
        self.threads.add(threading.current_thread().name)
        self.calls.append(rights(address, size))
        if len(self.calls) in self.failing:
            return False
        self.pinned[address] = size
        return True

    def unpin(self, address: int) -> None:
        self.threads.add(threading.current_thread().name)
        if not rights(address, self.pinned.pop(address)):
            self.faults.append("the memory went first")


def rights(address: int, size: int) -> str:
    """What this process may do with memory, "r--s" or "rw-s"; "" when not all of it is one mapping of its own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address and address + size <= high:
            return line.split()[1]
    return ""


def client_of(place: Path, ledger: Ledger, own: Ledger | None = None) -> Client:
    """A client whose memory they pin: the daemon's, and its ``own``."""
    return Client(place, TIMEOUT, None, Pinning(lambda: Both(ledger, own or ledger)))


def gauges(store: Store) -> tuple[int, int]:
    """Bytes that are pinned, and that are not."""
    said = store.stats()["gauges"]
    return said["host_pinned_bytes"], said["host_pageable_bytes"]


def pinned(store: Store) -> int:
    """Waits until all that is mapped is pinned; its bytes."""
    until(lambda: gauges(store)[1] == 0 < gauges(store)[0], f"not pinned: {gauges(store)}")
    return gauges(store)[0]


def saved_by(store: Store) -> torch.Tensor:
    """Saves a chain of random bytes; [blocks, bytes] of payload."""
    made = payloads()
    drafts = dict(enumerate(store.drafts(LARGE, BLOCKS)))
    assert len(drafts) == BLOCKS
    for block, draft in drafts.items():
        draft.fill(made[block].numpy().data)
    assert store.save(NS, LARGE, LONG, drafts).tokens == len(LONG)
    return made


def payloads() -> torch.Tensor:
    """Random bytes for a chain, [blocks, bytes]."""
    shape = BLOCKS, LARGE.payload_bytes(LARGE.block_tokens)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def hosts(load: Load) -> list[torch.Tensor]:
    """A load's payloads, where they are in host memory; good as long as the load."""
    size = LARGE.payload_bytes(LARGE.block_tokens)
    addresses = [base_of(piece.keys) for piece in load.pieces(0)]
    return [torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=torch.uint8) for at in addresses]


def brought(load: Load, device: torch.device) -> torch.Tensor:
    """[blocks, bytes] on the device, copied layer by layer beside the engine's stream, as adapters do."""
    stream = CudaStream(device) if device.type == "cuda" else ThreadStream("kvstore-test")
    target = torch.zeros((BLOCKS, LARGE.payload_bytes(LARGE.block_tokens)), dtype=torch.uint8, device=device)
    settle(device)
    load.ready(stream)
    sources, offsets = hosts(load), LARGE.layer_offsets(LARGE.block_tokens)
    for layer in range(len(LARGE.layers)):
        assert load.wait(layer, PATIENCE)
        stream.run(partial(copy, target, sources, offsets[layer], offsets[layer + 1]))
    event = stream.record()
    load.used(event)
    event.wait()
    stream.close()
    assert load.intact()
    return target


def copy(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor], start: int, end: int) -> None:
    """These bytes of each, in the current stream."""
    for target, source in zip(targets, sources, strict=True):
        target[start:end].copy_(source[start:end], non_blocking=True)


def settle(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(targets: list[torch.Tensor], sources: list[torch.Tensor], device: torch.device) -> float:
    """Gigabytes per second, at best, that are copied so."""
    seconds = []
    for _ in range(6):
        settle(device)
        begin = time.perf_counter()
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        settle(device)
        seconds.append(time.perf_counter() - begin)
    return sum(source.nbytes for source in sources) / min(seconds) / 1e9


def pins_plainly(memory: torch.Tensor) -> bool:
    """Whether CUDA pins it without being told that it is read-only. In a thread of its own: see ``CudaPins``."""
    pins = CudaPins("cuda:0")
    done = pins.pin(memory.data_ptr(), memory.nbytes)
    if done:
        pins.unpin(memory.data_ptr())
    return done
