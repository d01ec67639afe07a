"""Slots of the device tier handed from a writing stream to a reading one and back: every read must see its own round.

And the negative control: a tier that does not wait for the slots' events, in which reads must see other rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvstore.bench.gpu.setting import Figure, Setting
from kvstore.tensors.streams import CudaStream, Stream, ThreadStream
from kvstore.tiers.device import DeviceTier

SLOTS = 3


class Unwaiting(DeviceTier):
    """A device tier without the wait for events."""

    def ready(self, address: int, stream: Stream) -> None:
        """Says nothing, waits for nobody."""


def measure(setting: Setting) -> Iterator[Figure]:
    """Reads that were wrong in all rounds, with the waits (must be none) and without (must be some)."""
    with_waits, without = stress(setting, DeviceTier), stress(setting, Unwaiting)
    yield Figure("stress_rounds", float(setting.rounds))
    yield Figure("no_wrong_read_with_waits", with_waits == 0)
    yield Figure("wrong_reads_without_waits", float(without))
    yield Figure("fails_without_waits", without > 0)


def stress(setting: Setting, kind: type[DeviceTier]) -> int:
    """Rounds whose reader did not see what the writer of that round wrote."""
    slot_bytes = 1 << 16 if setting.small else 4 << 20
    side = 256 if setting.small else 3072
    weights = torch.rand((2, side, side), device=setting.device)
    tier = kind((SLOTS + 1) * slot_bytes + (1 << 20), str(setting.device))
    writer, reader = (stream(setting, name) for name in ("kvstore-bench-writer", "kvstore-bench-reader"))
    wrong = torch.zeros(setting.rounds, dtype=torch.int64, device=setting.device)
    slots = [tier.reserve(slot_bytes) for _ in range(SLOTS)]

    def busy(which: int) -> None:
        """Keeps a stream at work, so that whoever does not wait for it comes too early."""
        torch.mm(weights[which], weights[which])

    def write(slot: int, number: int) -> None:
        busy(0)
        tier.memory(slot).fill_(number % 251)

    def read(slot: int, number: int) -> None:
        if number % 2:  # now the writer is the faster one, now the reader
            busy(1)
        wrong[number] = (tier.memory(slot) != number % 251).sum()

    try:
        setting.settle()
        for number in range(setting.rounds):
            slot = slots[number % SLOTS]
            assert slot is not None, "the pool is too small for the stress"
            for one, work in ((writer, write), (reader, read)):
                tier.ready(slot, one)
                one.run(lambda work=work, slot=slot, number=number: work(slot, number))  # type: ignore[misc]
                tier.note(slot, one.record())
    finally:
        writer.close()
        reader.close()
        tier.close()
    return int((wrong > 0).sum())


def stream(setting: Setting, name: str) -> Stream:
    """A stream of the device, or a thread."""
    return CudaStream(setting.device) if setting.cuda else ThreadStream(name)
