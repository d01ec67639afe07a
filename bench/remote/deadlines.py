"""How far beyond their deadlines loads and matches come back, by what the network does."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

import kvstore
from kvstore import Fingerprint, Layout, Namespace
from kvstore.bench.remote.proxy import Apart
from kvstore.bench.remote.server import Server, wait_until
from kvstore.errors import BadInput
from kvstore.remote.breaker import LIMIT
from kvstore.remote.options import RemoteOptions
from kvstore.store import Store

BLOCKS = 4  # of a prompt
LAYOUT = Layout.uniform(12, 4, 64, "float16", block_tokens=256)  # 3 MiB a block
SPACE = Namespace(Fingerprint({"model": "bench"}))
LOOKUP, TIMEOUT, DEADLINE = 0.02, 1.0, 0.25  # seconds


@dataclass
class Times:
    """Seconds that calls took, of which they may take ``allowed``."""

    allowed: float
    taken: list[float] = field(default_factory=list)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Measures a call."""
        begin = time.perf_counter()
        yield
        self.taken.append(time.perf_counter() - begin)

    def figures(self) -> dict[str, float]:
        """Milliseconds, and those beyond what was allowed."""
        over = [1000 * max(0.0, taken - self.allowed) for taken in self.taken]
        return {
            "calls": len(self.taken),
            "p50_ms": 1000 * median(self.taken),
            "p99_ms": 1000 * high(self.taken),
            "p50_over_ms": median(over),
            "p99_over_ms": high(over),
        }


def high(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else values[0]


def tokens_of(seed: int) -> list[int]:
    """A prompt that no other begins like."""
    return [seed * 1000 + at % 999 for at in range(BLOCKS * LAYOUT.block_tokens + 1)]


def share(store: Store, seed: int) -> None:
    """Saves a prompt's blocks, which are in Redis when this returns."""
    drafts = dict(enumerate(store.drafts(LAYOUT, BLOCKS)))
    for draft in drafts.values():
        draft.payload[:] = bytes([seed % 251]) * len(draft.payload)
    store.save(SPACE, LAYOUT, tokens_of(seed)[:-1], drafts)
    if not store.flush(60.0):
        raise BadInput("redis-server does not take blocks; is the machine too busy?")


def measure(server: Server, mode: str, rounds: int) -> dict[str, object]:
    """Loads that begin when the network is well and go on as ``mode`` has it, then matches, until the breaker opens."""
    near = RemoteOptions(server.url, lookup=5.0, timeout=10.0)
    loads, matches, openings, wrong = Times(DEADLINE), Times(LOOKUP), list[int](), 0
    with closing(Apart(server.port)) as proxy, kvstore.open(host="256MiB", redis=near) as one:
        for seed in range(LIMIT):
            share(one, seed)
        for turn in range(rounds):
            wrong += _loads(proxy, mode, loads)
            openings.append(_matches(proxy, mode, matches, 1000 * (turn + 1)))
            proxy.cut()
    return {
        "load": loads.figures(),
        "match": matches.figures(),
        "matches_until_open": max(openings),
        "wrong_bytes": wrong,
    }


def _loads(proxy: Apart, mode: str, times: Times) -> int:
    """As many loads as open the breaker; how many gave wrong bytes."""
    proxy.mode, wrong = "as it is", 0
    with kvstore.open(host="256MiB", redis=RemoteOptions(proxy.url, lookup=5.0, timeout=TIMEOUT)) as store:
        found = [store.match(SPACE, LAYOUT, tokens_of(seed)) for seed in range(LIMIT)]
        if sum(match.tokens for match in found) != LIMIT * BLOCKS * LAYOUT.block_tokens:
            raise BadInput("redis-server does not give what it was given; is the machine too busy?")
        proxy.mode = mode
        gc.collect()
        for seed, match in enumerate(found):
            load, last = store.load(match), len(LAYOUT.layers) - 1
            with times.one():
                came = load.wait(last, timeout=DEADLINE)
            good, start = load.good_tokens(last) if came else 0, 0
            for piece in load.pieces(last):
                start += piece.tokens
                if start <= good and bytes(piece.keys) != bytes([seed % 251]) * len(piece.keys):
                    wrong += 1
            load.release()
    return wrong


def _matches(proxy: Apart, mode: str, times: Times, seed: int) -> int:
    """Matches of prompts that nobody has stored, until the breaker is open; how many that took."""
    proxy.mode = "as it is"
    passed = proxy.passed
    with kvstore.open(host="16MiB", redis=RemoteOptions(proxy.url, lookup=LOOKUP, timeout=TIMEOUT)) as store:
        wait_until(lambda: proxy.passed > passed)  # it has said hello
        proxy.mode = mode
        for count in range(1, 200):
            with times.one():
                store.match(SPACE, LAYOUT, tokens_of(seed + count)).release()
            if store.stats()["gauges"]["remote_breaker_open"]:
                return count
            if mode == "as it is" and count == 10:
                return 0
    raise BadInput(f"the breaker does not open with {mode}")


def cost_when_open(rounds: int) -> dict[str, float]:
    """Microseconds that a match of a long prompt takes without Redis, and with a breaker that is open."""
    dead = RemoteOptions("redis://127.0.0.1:1/0", lookup=LOOKUP)
    plain, broken = Times(0.0), Times(0.0)
    with kvstore.open(host="16MiB") as without, kvstore.open(host="16MiB", redis=dead) as beside:
        for seed in range(20):
            beside.match(SPACE, LAYOUT, tokens_of(seed)).release()
        wait_until(lambda: beside.stats()["gauges"]["remote_breaker_open"])
        prompt = [at % 50000 for at in range(32 * 1024)]
        packed = b"".join(token.to_bytes(4, "little") for token in prompt)
        for _ in range(rounds):
            for store, times in ((without, plain), (beside, broken)):
                with times.one():
                    store.match(SPACE, LAYOUT, packed).release()
    one, other = (1e6 * median(times.taken) for times in (plain, broken))
    return {"without_us": one, "breaker_open_us": other, "added_us": other - one}
