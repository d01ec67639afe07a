"""Disk tier: durable saves and cold loads, beside plain O_DIRECT transfers of the same bytes, 1 and 4 in flight."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import kvstore
from kvstore import Store
from kvstore.bench.micro.host import LAYOUTS, NAMESPACE, prompt
from kvstore.bench.micro.limits import PlainFile, Timing, compare, memory
from kvstore.checksum import KERNELS
from kvstore.save import Draft

TOTAL = 1 << 30  # payload bytes per measurement
ROUNDS = 8  # measurements whose bytes the disk budget holds: 8 GiB, the default, and it is full


def measure(size: str, folder: Path, repeats: int) -> dict[str, dict[str, Timing]]:
    """``disk_save`` and ``disk_load_cold``, each beside one and four plain transfers in flight (keys "1" and "4").

    Memory and disk slots are recycled, as in a store that has run for a while: three chains, of which the host tier
    holds little more than one, are loaded in turns, and the disk budget holds a few chains.
    """
    KERNELS.wait()  # as in a store that has run for a while
    layout = LAYOUTS[size]
    block = layout.payload_bytes(layout.block_tokens)
    count = TOTAL // block
    tokens = count * layout.block_tokens
    slots = count * layout.full_slot_bytes
    buffers = [memory(block) for _ in range(count)]
    plain = PlainFile(folder / "plain", TOTAL, ROUNDS)
    for _ in range(ROUNDS):
        plain.write(buffers, 4)  # so that there is something to read, and no first touch of the disk later
    result: dict[str, dict[str, Timing]] = {"disk_save": {}, "disk_load_cold": {}}
    try:
        with kvstore.open(folder / f"save-{size}", host=int(slots * 2.6), disk=int(slots * ROUNDS * 1.05)) as store:
            source = memory(TOTAL)
            ready: list[tuple[array[int], dict[int, Draft]]] = []

            def draft_new() -> None:
                ready[:] = [(prompt(random.randrange(1 << 60), tokens), _drafts(store, size, source, count))]

            def save() -> None:
                ids, drafts = ready.pop()
                durable = store.save(NAMESPACE, layout, ids, drafts).wait()
                assert durable.blocks == count, f"only {durable.blocks} of {count} blocks became durable"

            for _ in range(ROUNDS + 1):
                draft_new()
                save()
            for flight in (1, 4):

                def write(flight: int = flight) -> None:
                    plain.write(buffers, flight)

                result["disk_save"][str(flight)] = compare(write, save, repeats, prepare=draft_new)
        with kvstore.open(folder / f"cold-{size}", host=int(slots / 0.7), disk=int(slots * 3.5) + (64 << 20)) as store:
            chains = [prompt(i, tokens) for i in range(3)]
            for ids in chains:
                store.save(NAMESPACE, layout, ids, _drafts(store, size, source, count)).wait()
            turn = iter(range(1 << 30))

            def load() -> None:
                _load_cold(store, size, chains[next(turn) % 3])

            for flight in (1, 4):

                def read(flight: int = flight) -> None:
                    plain.read(buffers, flight)

                result["disk_load_cold"][str(flight)] = compare(read, load, repeats)
    finally:
        plain.close()
    return result


def _drafts(store: Store, size: str, source: memoryview, count: int) -> dict[int, Draft]:
    layout = LAYOUTS[size]
    block = layout.payload_bytes(layout.block_tokens)
    drafts = store.drafts(layout, count)
    assert len(drafts) == count, "the host tier is too small for the benchmark"
    for i, draft in enumerate(drafts):
        draft.fill(source[i * block : (i + 1) * block])
    return dict(enumerate(drafts))


def _load_cold(store: Store, size: str, ids: array[int]) -> Any:
    layout = LAYOUTS[size]
    match = store.match(NAMESPACE, layout, ids + array("I", [0]))
    assert match.tokens_by_tier["host"] == 0, "the load is not cold"
    load = store.load(match)
    assert load.tokens == len(ids), f"only {load.tokens} of {len(ids)} tokens could be started"
    assert all(load.wait(layer) for layer in range(len(layout.layers)))
    load.release()
