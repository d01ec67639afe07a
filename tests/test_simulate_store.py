"""A trace through the simulator and through the real store: the same hits, request by request."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from blocks import namespace

from kvstore import LayerShape, Layout
from kvstore.local import LocalStore
from kvstore.policies.named import POLICIES
from kvstore.policies.shadow import Shadow
from kvstore.policy import Clock, EvictionPolicy
from kvstore.room import KEEP_FREE
from kvstore.tiers.host import HostTier

TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "conversation_trace.jsonl"
BLOCK = 16  # tokens that stand for a block of the trace
LAYOUT = Layout((LayerShape(1, 1, 1),), "uint8", block_tokens=BLOCK, alignment=512)  # two bytes a token
SPACE = namespace("")
MEMORY = 4 << 20


class Asked(NamedTuple):
    """One request: seconds, ids of its blocks, tokens of each."""

    time: float
    names: list[int]
    sizes: list[int]


def drawn(seed: int, requests: int) -> Iterator[Asked]:
    """Sessions that grow by turns, behind one of a few system prompts; some part from an older turn."""
    draw, fresh, time = random.Random(seed), iter(range(1 << 30)), 0.0
    trunks = [[next(fresh) for _ in range(draw.randrange(1, 6))] for _ in range(4)]
    open_ends = [list(draw.choice(trunks)) for _ in range(40)]
    for _ in range(requests):
        time += draw.expovariate(2.0)
        at = draw.randrange(len(open_ends))
        if draw.random() < 0.15:
            open_ends[at] = list(draw.choice(trunks))
        chain = open_ends[at][: draw.randrange(1, len(open_ends[at]) + 1)] if draw.random() < 0.1 else open_ends[at]
        chain = [*chain, *(next(fresh) for _ in range(draw.randrange(1, 12)))]
        open_ends[at] = chain if len(chain) < 80 else list(trunks[0])
        names = [*chain, next(fresh)] if (partial := draw.random() < 0.7) else chain
        yield Asked(time, names, [BLOCK] * (len(names) - partial) + [draw.randrange(2, BLOCK)] * partial)


def traced(requests: int) -> Iterator[Asked]:
    """The beginning of the public trace, its blocks of 512 tokens as blocks of 16."""
    with TRACE.open() as lines:
        for line, _ in zip(lines, range(requests), strict=False):
            record = json.loads(line)
            names, rest = record["hash_ids"], record["input_length"] - 512 * (len(record["hash_ids"]) - 1)
            last = max(2, -(-rest * BLOCK // 512))  # of one token nothing is left to find
            yield Asked(record["timestamp"] / 1000, names, [BLOCK] * (len(names) - 1) + [last])


class Both:
    """The two of them, with policies of one kind, and one clock."""

    def __init__(self, make: Callable[[Clock], EvictionPolicy], mend: int = 0) -> None:
        self.now = 0.0
        slots = self.slots()
        spare = int(MEMORY * KEEP_FREE) // LAYOUT.full_slot_bytes
        self.shadow = Shadow(make(self.clock), slots - spare + mend, spare)
        self.store = LocalStore(HostTier(MEMORY), None, make(self.clock), make(self.clock))
        self._tokens: dict[int, bytes] = {}

    def clock(self) -> float:
        return self.now

    @staticmethod
    def slots() -> int:
        host, count = HostTier(MEMORY), 0
        while host.reserve(LAYOUT.full_slot_bytes) is not None:
            count += 1
        host.close()
        return count

    def tokens(self, asked: Asked) -> bytes:
        for name in asked.names:
            if name not in self._tokens:
                drawn = random.Random(name)
                self._tokens[name] = array("I", (drawn.randrange(1 << 31) for _ in range(BLOCK))).tobytes()
        pieces = zip(asked.names, asked.sizes, strict=True)
        return b"".join(self._tokens[name][: 4 * size] for name, size in pieces)

    def serve(self, asked: Asked) -> tuple[int, int]:
        """Tokens that the simulator and the store had of a request."""
        self.now = asked.time
        total = sum(asked.sizes)
        simulated = min(sum(asked.sizes[: self.shadow.request(asked.names, asked.sizes)]), total - 1)
        tokens = self.tokens(asked)
        match = self.store.match(SPACE, LAYOUT, tokens)
        first = len(match.blocks)
        drafts = self.store.drafts(LAYOUT, len(asked.names) - first)
        self.store.save(SPACE, LAYOUT, tokens, dict(enumerate(drafts, first)))
        match.release()
        return simulated, match.tokens


def replay(requests: Iterator[Asked], policy: str, mend: int = 0) -> tuple[list[int], int, int]:
    """Requests that differ, tokens that were hits, and blocks that were evicted."""
    both, different, hits = Both(POLICIES[policy], mend), [], 0
    with both.store:
        for number, asked in enumerate(requests):
            simulated, real = both.serve(asked)
            hits += real
            if simulated != real:
                different.append(number)
        evicted = both.store.stats()["counters"].get("host_evicted_blocks", 0)
    return different, hits, evicted


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"pace"}))
def test_drawn_sessions_hit_alike(policy: str, seed: int) -> None:
    different, hits, evicted = replay(drawn(seed, 600), policy)
    assert different == [] and hits > 10_000 and evicted > 1000


@pytest.mark.parametrize("policy", ["default", "lru"])
def test_the_public_trace_hits_alike(policy: str) -> None:
    if not TRACE.exists():
        pytest.skip("the public traces are not beside the checkout")
    different, hits, evicted = replay(traced(1500), policy)
    assert different == [] and hits > 20_000 and evicted > 10_000


def test_one_slot_more_or_less_is_noticed(seed: int) -> None:
    assert replay(drawn(seed, 600), "lru", mend=-8)[0] != []


@pytest.mark.soak
@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"pace"}))
def test_the_whole_public_trace_hits_alike(policy: str) -> None:
    if not TRACE.exists():
        pytest.skip("the public traces are not beside the checkout")
    assert replay(traced(20_000), policy)[0] == []
