"""The index at a million blocks: match, private memory, reopening; and the time that ``import kvstore`` takes."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import kvstore
from kvstore import Layout
from kvstore.bench.micro.host import NAMESPACE, VOCABULARY
from kvstore.block import Header
from kvstore.files import OsFiles
from kvstore.keys import block_key, token_bytes
from kvstore.tiers.disk import DiskTier

LAYOUT = Layout.uniform(layers=1, heads=1, dim=2, dtype="bfloat16")  # small slots: a million of them fit on a disk
CHAIN = 128  # blocks of a 32k-token prompt
PROMPTS = 200


def measure(folder: Path, blocks: int) -> dict[str, float]:
    """``match_32k_seconds`` (p50), ``index_bytes_per_block``, ``reopen_seconds``, ``import_seconds``."""
    # Slots here are far smaller than real ones, so the index's share of the budget needs a budget as for real ones.
    budget = max(blocks * 175_000, 1 << 30)
    chains = build(folder / "index", blocks, budget)
    before = private_bytes()
    begin = time.perf_counter()
    store = kvstore.open(folder / "index", host="64MiB", disk=budget)
    reopen = time.perf_counter() - begin
    held = private_bytes() - before
    with store:
        known = store.stats()["tiers"]["disk"]["blocks"]
        assert known >= blocks * 0.99, f"only {known} of {blocks} blocks came back"
        times = []
        for i in range(PROMPTS):
            ids = chains[i % len(chains)]
            begin = time.perf_counter()
            match = store.match(NAMESPACE, LAYOUT, ids)
            match.release()
            times.append(time.perf_counter() - begin)
            assert match.tokens == len(ids) // 4 - 1, f"matched {match.tokens} of {len(ids) // 4} tokens"
    return {
        "match_32k_seconds": statistics.median(times),
        "index_bytes_per_block": held / known,
        "reopen_seconds": reopen,
        "import_seconds": import_seconds(),
    }


def build(path: Path, blocks: int, budget: int) -> list[bytes]:
    """A disk tier whose index knows ``blocks`` blocks: a tenth of them children of one shared block, the rest chains
    of 128 blocks that also start with the shared one. Only slots are reserved; no payload is written.

    Returns the token bytes of some prompts of 32k tokens: a chain each.
    """
    rng = random.Random(0)
    tier = DiskTier(OsFiles(), path, budget)
    pending: list[tuple[int, Header]] = []
    sequence = 0

    def add(parent: bytes, root: bool, tokens: bytes) -> bytes:
        nonlocal sequence
        sequence += 1
        key = block_key(NAMESPACE, parent, tokens)
        address = tier.reserve(LAYOUT.full_slot_bytes)
        assert address is not None, "the disk budget is too small for the benchmark"
        fingerprint = NAMESPACE.fingerprint.digest
        header = Header(
            key=key, parent=parent, root=root, namespace=NAMESPACE.digest, fingerprint=fingerprint, tenant="", owner="",
            tokens=tokens, layout=LAYOUT, stride=LAYOUT.block_tokens, sequence=sequence, created=time.time(),
        )  # fmt: skip
        pending.append((address, header))
        if len(pending) >= 20_000:
            tier.commit(pending)
            pending.clear()
        return key

    shared = _tokens(rng)
    trunk = add(NAMESPACE.root, True, shared)
    for _ in range(blocks // 10):
        add(trunk, False, shared[:400] + _tokens(rng)[400:])
    chains: list[bytes] = []
    while sequence < blocks:
        parent, chain = trunk, [shared]
        for _ in range(CHAIN - 1):
            chain.append(_tokens(rng))
            parent = add(parent, False, chain[-1])
        if len(chains) < PROMPTS:
            chains.append(b"".join(chain))
    tier.commit(pending)
    tier.close()
    return chains


def _tokens(rng: random.Random) -> bytes:
    return token_bytes(rng.choices(range(VOCABULARY), k=LAYOUT.block_tokens))


def private_bytes() -> int:
    """Anonymous memory of this process (what is mapped from files is the page cache's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def import_seconds(repeats: int = 9) -> float:
    """Median of ``import kvstore`` in a fresh interpreter, without the interpreter's own start."""
    code = "import time; t = time.perf_counter(); import kvstore; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy())
        for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs)
