"""``python -m kvstore.bench.simulate.look_ahead``: what the queue of waiting requests is worth to memory and disk.

Memory and a disk ten times as large, each block in one of both, in the order of a trace. The policies and windows are
the store's own objects. Before a request is served, up to so many blocks are moved from disk to memory for those that
wait, nearest first; what is on disk all the same when a request starts, it waits for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, product, takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvstore.bench.command import run_command
from kvstore.bench.simulate.readers import read
from kvstore.errors import BadInput
from kvstore.loader import LEASE_SHARE
from kvstore.policies.look_ahead import LookAhead
from kvstore.policies.lru import LRU
from kvstore.policies.windows import Windows
from kvstore.policy import Arrival

DISK = 10  # times the memory
MEMORY, DISKS = 0, 1  # where a block is
Chain = Sequence[int]

HELP = """
Replay the order of a trace's requests against memory and a disk ten times as large, with and without looking ahead in
the queue.

Prints which share of the prompts' blocks is found, and which share of those is in memory when a request starts.
"""


@dataclass(frozen=True, slots=True)
class Served:
    """What one request found: ``hit`` leading blocks, of which ``waited`` were still on disk."""

    blocks: int
    hit: int
    waited: int


@dataclass(frozen=True)
class Outcome:
    """A trace served. ``bandwidth``: blocks moved from disk to memory per request that is served, at most; 0: any."""

    memory_blocks: int
    look_ahead: int
    bandwidth: int
    served: Sequence[Served] = field(repr=False)

    @property
    def hit(self) -> float:
        """Share of all blocks that were found."""
        return sum(one.hit for one in self.served) / sum(one.blocks for one in self.served)

    @property
    def waited(self) -> int:
        """Blocks that requests waited for."""
        return sum(one.waited for one in self.served)

    @property
    def in_memory(self) -> float:
        """Share of the found blocks that were in memory when their request started."""
        return 1 - self.waited / max(sum(one.hit for one in self.served), 1)

    def slower_than(self, other: Outcome) -> int:
        """Requests that find less than in the other, or wait for more of the same."""
        pairs = zip(self.served, other.served, strict=True)
        return sum(one.hit < two.hit or (one.hit == two.hit and one.waited > two.waited) for one, two in pairs)


class Tiers:
    """Memory of ``memory`` blocks and a disk of ``DISK`` times as many."""

    def __init__(self, memory: int) -> None:
        self.where: dict[int, int] = {}
        self._tiers = (LookAhead(LRU()), LookAhead(LRU()))
        self._capacity = (memory, DISK * memory)
        self._windows = Windows()

    def found(self, blocks: Chain) -> list[int]:
        """The leading blocks that are anywhere."""
        return list(takewhile(self.where.__contains__, blocks))

    def look(self, queue: Sequence[Chain], bandwidth: int) -> None:
        """Moves what the queue will read to memory, as far as the window reaches; 0: at any speed."""
        chains = [self.found(blocks) for blocks in queue]
        self._windows.saw(len(set(chains[-1]).difference(*chains[:-1])))
        window = self._windows.prefetch(int(self._capacity[MEMORY] * LEASE_SHARE))
        for tier in self._tiers:
            tier.schedule(chains)
        self._tiers[MEMORY].protect(window)
        moved = 0
        for block in chain.from_iterable(chains[:window]):
            if self.where[block] == DISKS:
                if (bandwidth and moved == bandwidth) or not self._bring(block):
                    break
                moved += 1
        self._tiers[MEMORY].protect(0)

    def serve(self, blocks: Chain) -> Served:
        """A request reads what is found of it, and leaves all of it in memory."""
        found = self.found(blocks)
        waited = sum(self.where[block] for block in found)
        for tier in self._tiers:
            tier.touch(found)
        for block in blocks:
            if self.where.get(block) != MEMORY:
                self._bring(block)
        self._tiers[MEMORY].arrange(blocks, served=True)
        return Served(len(blocks), len(found), waited)

    def _bring(self, block: int) -> bool:
        """Puts a block into memory; False: it is full of what is kept for the queue."""
        memory, disk = self._tiers
        full = len(memory) >= self._capacity[MEMORY]
        victim = next(iter(memory.victims()), None) if full else None
        if full and victim is None:
            return False
        if self.where.pop(block, None) == DISKS:
            disk.remove(block)
        if victim is not None:
            memory.remove(victim)
            del self.where[victim]
            self._write(victim)
        self._put(block, MEMORY)
        return True

    def _write(self, block: int) -> None:
        """What leaves memory goes to disk."""
        disk = self._tiers[DISKS]
        if len(disk) >= self._capacity[DISKS]:
            gone = next(iter(disk.victims()))
            disk.remove(gone)
            del self.where[gone]
        self._put(block, DISKS)

    def _put(self, block: int, tier: int) -> None:
        self.where[block] = tier
        self._tiers[tier].insert(block, Arrival(1, 1, block, -1))


def simulate(requests: Sequence[Chain], memory: int, look_ahead: int = 0, bandwidth: int = 0) -> Outcome:
    """Serves requests (their blocks, root first, equal numbers for equal ones) from ``memory`` blocks and the disk.

    ``look_ahead``: how many requests the queue shows, that which is served next among them; 0: no hints.
    """
    tiers, served = Tiers(memory), list[Served]()
    for number, blocks in enumerate(requests):
        if look_ahead:
            tiers.look(requests[number : number + look_ahead], bandwidth)
        served.append(tiers.serve(blocks))
    return Outcome(memory, look_ahead, bandwidth, served)


def figures(outcome: Outcome, without: Outcome) -> dict[str, float]:
    """What is reported of an outcome, beside that without hints."""
    return {
        "memory_blocks": outcome.memory_blocks,
        "look_ahead": outcome.look_ahead,
        "bandwidth": outcome.bandwidth,
        "hit": round(outcome.hit, 6),
        "in_memory": round(outcome.in_memory, 6),
        "waited_blocks": outcome.waited,
        "waits_spared": round(1 - outcome.waited / max(without.waited, 1), 6),
        "slower_requests": outcome.slower_than(without),
    }


def main(
    trace: Annotated[Path, typer.Argument(help="A trace or a chat log, of any kind that can be simulated.")],
    memory: Annotated[
        list[float] | None, typer.Option(help="Memory, as a share of all different blocks (default: 0.01 and 0.02).")
    ] = None,
    look_ahead: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests that the queue shows (default: 8 and 32).")
    ] = None,
    bandwidth: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Blocks moved per request that is served; 0: as many as wait (default: 12)."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    memory, settings = memory or [0.01, 0.02], product(look_ahead or [8, 32], bandwidth or [12])
    found = read(trace)
    requests, unique = [request.blocks for request in found.requests], found.unique_blocks
    if min(memory) * unique < 1:
        raise BadInput(f"--memory {min(memory)} is less than one of {unique} blocks; give a larger share")
    every = [(0, 0), *settings]
    rows: list[dict[str, float]] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("serving", total=len(memory) * len(every))
        for share in memory:
            blocks = int(share * unique)
            without = simulate(requests, blocks)
            for setting in every:
                outcome = simulate(requests, blocks, *setting) if setting[0] else without
                rows.append({"memory": share, **figures(outcome, without)})
                bar.advance(task)
    show(rows)
    if json_path is not None:
        told = {"trace": found.name, "requests": len(requests), "unique_blocks": unique, "results": rows}
        json_path.write_text(json.dumps(told, indent=2) + "\n")


def show(rows: Sequence[dict[str, float]]) -> None:
    """One line for each setting."""
    table = Table("memory", "queue", "moved per request", "found", "of that in memory", "waits spared", "slower")
    for row in rows:
        queue = f"{row['look_ahead']:.0f}" if row["look_ahead"] else "not seen"
        moved = "" if not row["look_ahead"] else f"{row['bandwidth']:.0f}" if row["bandwidth"] else "any"
        shares = [f"{row[name]:.2%}" for name in ("hit", "in_memory", "waits_spared")]
        table.add_row(f"{row['memory']:.2%}", queue, moved, *shares, f"{row['slower_requests']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(main, HELP, "look_ahead")
