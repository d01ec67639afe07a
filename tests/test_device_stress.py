"""A slow engine reads slots through streams while later loads evict and refill them: never a wrong byte.

The engine's stream is held up at every round until a few later loads have asked for their copies. So what keeps bytes
apart are the events alone, and with either wait taken out the same run must find wrong bytes.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from blocks import NS, WIDE, found, ids, marks, recount, rows, save
from devices import CUDA, bring, recount_device, slow_kernel, tensor
from gates import PATIENCE

import kvstore
from kvstore.hot import Hold
from kvstore.local import LocalStore
from kvstore.residency import Residency
from kvstore.tensors.streams import CudaStream, Stream, ThreadStream
from kvstore.tiers.device import DeviceTier

SIZE, BLOCKS, CHAINS = WIDE.block_tokens, 3, 10
AHEAD = 6  # rounds that are asked for before the engine comes to the first of them
KINDS = ["cpu", pytest.param("cuda", marks=CUDA)]


class Engine:
    """Loads chains at random and compares every slot in its own stream; ``wrong`` counts the slots that differ."""

    def __init__(self, store: LocalStore, device: str, seed: int) -> None:
        self.store, self.draw = store, random.Random(seed)
        self.chains = [ids(seed + n, BLOCKS * SIZE) for n in range(CHAINS)]
        self.expected = [[block.to(device) for block in payloads(tokens)] for tokens in self.chains]
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.checked = self.found = 0
        self._cuda = device == "cuda"
        self._gates: list[threading.Event] = []
        self.copies, self.compute = self._stream(), self._stream()

    def _stream(self) -> Stream:
        return CudaStream("cuda") if self._cuda else ThreadStream("kvstore-test")

    def run(self, rounds: int) -> None:
        for tokens in self.chains:
            save(self.store, tokens, layout=WIDE).wait()
        try:
            for _ in range(rounds):
                self._round()
                for gate in self._gates[:-AHEAD]:
                    gate.set()
        finally:
            for gate in self._gates:
                gate.set()
            self.copies.close()
            self.compute.close()

    def _round(self) -> None:
        chain = self.draw.randrange(CHAINS)
        tokens = self.chains[chain][: self.draw.randint(1, BLOCKS) * SIZE]
        load = self.store.load(found(self.store, tokens, layout=WIDE), device=True)
        whole = bring(load, self.copies)
        self.compute.wait(self.copies.record())
        self.compute.run(self._held_up())
        load.ready(self.compute)
        for place, expected in zip(load.places(0), self.expected[chain], strict=False):
            if place.slot is not None and (place.hot or whole):
                self.checked += 1
                self.found += place.hot
                self.compute.run(partial(self._compare, tensor(place.slot.memory)[: len(expected)], expected))
        load.used(self.compute.record())
        load.release()

    def _compare(self, memory: torch.Tensor, expected: torch.Tensor) -> None:
        self.wrong += (memory != expected).any()

    def _held_up(self) -> Callable[[], None]:
        if self._cuda:
            return partial(slow_kernel, 5_000_000)
        gate = threading.Event()
        self._gates.append(gate)

        def wait() -> None:
            assert gate.wait(PATIENCE), "nobody let the engine go on"

        return wait


def payloads(tokens: list[int]) -> list[torch.Tensor]:
    """What the slots of a chain's blocks are to hold."""
    every, found = marks(NS, tokens), []
    for start in range(0, len(tokens), SIZE):
        block = every[start : start + SIZE]
        data = b"".join(
            rows(WIDE, layer, kind, head, block)
            for layer, shape in enumerate(WIDE.layers)
            for kind in (0, 1)
            for head in range(shape.heads)
        )
        found.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return found


def stress(folder: Path, device: str, seed: int, rounds: int) -> Engine:
    """With a device for five blocks and memory for ten, of the thirty that are asked for."""
    with kvstore.open(folder / "cache", host="2MiB", disk="64MiB", device="1MiB", device_name=device) as store:
        engine = Engine(store, device, seed)
        engine.run(rounds)
        store.flush()
        assert recount(store) == [] and recount_device(store) == []
        assert store.stats()["counters"]["device_evicted_blocks"] > rounds // 4
        assert store.stats()["counters"]["host_evicted_blocks"] > 0
        return engine


@pytest.mark.parametrize("device", KINDS)
def test_no_slot_is_written_before_it_was_read(device: str, tmp_path: Path, seed: int) -> None:
    engine = stress(tmp_path, device, seed, rounds=800)
    assert engine.checked > 500 and engine.found > 50
    assert int(engine.wrong) == 0


def _does_not_wait(tier: DeviceTier, address: int, stream: Stream) -> None:
    return None


def _holds_no_memory(residency: Residency, hold: Hold) -> None:
    hold.lease.release()
    residency._ended_loads.append(hold)


@pytest.mark.parametrize("device", KINDS)
def test_where_streams_do_not_wait_the_same_run_fails(
    device: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceTier, "ready", _does_not_wait)
    assert int(stress(tmp_path, device, seed, rounds=200).wrong) > 0


def test_where_memory_is_not_held_until_it_was_copied_the_same_run_fails(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plain memory: CUDA itself waits where memory could not be pinned."""
    monkeypatch.setattr(Residency, "load_ended", _holds_no_memory)
    assert int(stress(tmp_path, "cpu", seed, rounds=200).wrong) > 0
