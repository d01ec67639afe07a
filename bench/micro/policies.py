"""What a decision of each eviction policy costs when a tier is full of blocks: one that goes, one that comes in."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
from rich.table import Table

from kvstore.policies.named import POLICIES
from kvstore.policy import Arrival

CHAIN = 16  # blocks that a request brings
SECONDS = 0.3  # between requests, on the policy's clock
REQUESTS = 1000
LIMIT = 20e-6  # seconds that a decision at a million blocks should take at most


def measure(blocks: int) -> dict[str, Any]:
    """By policy: ``p50``, ``p99`` of a decision; ``request``: all that a request of ``CHAIN`` blocks costs besides, by
    block; ``fill``: what it took to bring in all blocks. Seconds. What has two names is measured once."""
    names = {make: name for name, make in reversed(POLICIES.items())}
    return {name: _measure(name, blocks) for name in POLICIES if name in names.values()}


def _measure(name: str, blocks: int) -> dict[str, float]:
    now, draw = [0.0], random.Random(0)
    policy = POLICIES[name](lambda: now[0])
    chains: list[list[int]] = []
    begin = time.perf_counter()
    for first in range(0, blocks, CHAIN):
        now[0] += SECONDS
        chains.append(list(range(first, first + CHAIN)))
        _bring(policy, chains[-1], first)
    fill = time.perf_counter() - begin
    decisions, rest = [], 0.0
    for number in range(REQUESTS):
        now[0] += SECONDS
        used = draw.choice(chains)
        begin = time.perf_counter()
        policy.touch(used)
        policy.arrange(used, served=True)
        rest += time.perf_counter() - begin
        parent, going, coming = -1, list[float](), list[float]()
        free: list[int] = []
        for _ in range(CHAIN):
            begin = time.perf_counter()
            victim = next(policy.victims())
            policy.remove(victim)
            going.append(time.perf_counter() - begin)
            free.append(victim)
        for block in free:
            begin = time.perf_counter()
            policy.insert(block, Arrival(1 << 20, 256, (number, block), parent))
            coming.append(time.perf_counter() - begin)
            parent = block
        decisions += [one + other for one, other in zip(going, coming, strict=True)]
        begin = time.perf_counter()
        policy.arrange(free, served=True)
        rest += time.perf_counter() - begin
    p50, p99 = (float(one) for one in np.percentile(decisions, (50, 99)))
    return {"p50": p50, "p99": p99, "request": rest / (REQUESTS * CHAIN), "fill": fill, "blocks": float(blocks)}


def _bring(policy: Any, chain: list[int], name: int) -> None:
    for place, block in enumerate(chain):
        policy.insert(block, Arrival(1 << 20, 256, name + place, chain[place - 1] if place else -1))
    policy.arrange(chain, served=True)


def table(results: dict[str, Any]) -> Table:
    """One row for each policy."""
    shown = Table("policy", "p50 µs", "p99 µs", "request, µs a block", "fill s")
    blocks = next(iter(results.values()))["blocks"]
    shown.title = f"One block in and one out at {blocks:,.0f} blocks (p50 at most {LIMIT * 1e6:.0f} µs)"
    for name, row in results.items():
        cells = [f"{row[key] * 1e6:.1f}" for key in ("p50", "p99", "request")]
        shown.add_row(name, *cells, f"{row['fill']:.1f}")
    return shown
