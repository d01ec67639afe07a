"""The benchmark of first tokens in pairs: which turns it reads, that its disk is slow, and what it makes of pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.adapters.transformers import Reuse
from kvstore.bench.conversation import Conversation, TokenIds, Turn
from kvstore.bench.encoders import WordEncoder
from kvstore.bench.models import tiny_llama
from kvstore.bench.never_slower import throttled
from kvstore.bench.never_slower.figures import plot, summarize, table
from kvstore.bench.never_slower.pairs import Pair, measure, open_store, prompts
from kvstore.bench.never_slower.throttled import CHUNK, ThrottledFiles

MIB = 1 << 20


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(throttled, "time", found)
    return found


def talk(name: str, *lengths: int) -> Conversation:
    """A conversation whose prompts go on from each other."""
    return Conversation(name, tuple(Turn(TokenIds(tuple(range(1, length + 1)))) for length in lengths))


def test_turns_are_spread_and_taken_in_rounds() -> None:
    log = [
        talk("long", *range(100, 1100, 100)),
        talk("short", 50),
        talk("other", 10, 20, 30, 40),
        talk("more", 1, 2, 3),
    ]
    asked = prompts(log, WordEncoder(2000), 2, 3, 600)
    assert [(p.conversation, p.turn, len(p.ids)) for p in asked] == [
        ("long", 1, 100),
        ("other", 1, 10),
        ("long", 3, 300),
        ("other", 3, 30),
        ("long", 6, 600),
        ("other", 4, 40),
    ]
    assert prompts(log, WordEncoder(2000), 2, 3, 2) == []


def test_a_throttled_disk_moves_what_it_says_and_no_more(tmp_path: Path, clock: Clock) -> None:
    files = ThrottledFiles(MIB)
    handle = files.open(str(tmp_path / "file"), create=True)
    data = bytes(range(256)) * (8 * CHUNK // 256)
    files.write(handle, memoryview(data), 0)
    assert clock.now == pytest.approx(102.0)  # 2 MiB at one a second
    buffer = bytearray(4 * CHUNK)
    assert files.read(handle, memoryview(buffer), 4 * CHUNK) == len(buffer)
    assert clock.now == pytest.approx(103.0)
    assert bytes(buffer) == data[4 * CHUNK :]
    clock.now += 60.0  # what was not used is lost
    files.read(handle, memoryview(buffer), 0)
    assert clock.now == pytest.approx(164.0)
    files.close(handle)


def test_pairs_are_measured_on_a_store_with_a_throttled_disk(tmp_path: Path) -> None:
    model = tiny_llama(500, layers=2, width=32, heads=2, kv_heads=1)
    asked = prompts([talk("one", 40, 80, 120), talk("two", 50, 100, 150)], WordEncoder(500), 2, 3, 200)
    with open_store(tmp_path / "store", "4MiB", 500 * MIB) as store:
        pairs = list(measure(model, Reuse(model, store, block_tokens=16), asked))
    assert [pair.prompt_tokens for pair in pairs] == [40, 50, 80, 100, 120, 150]
    assert [pair.matched for pair in pairs] == [0, 0, 40, 50, 80, 100]  # each conversation is alone
    assert [pair.store_first for pair in pairs] == [False, True] * 3
    assert all(pair.same_token and pair.without > 0 and pair.with_store > 0 for pair in pairs)
    assert all(sum(pair.cached_by_tier.values()) == pair.cached <= pair.matched for pair in pairs)
    assert pairs[0].reason == "nothing matched" and pairs[0].expected is None


PAIR = Pair("a", 1, 100, 2.0, 1.0, False, 80, 80, {"disk": 80}, 0.9, 1.5, 2.0, "", 0, 0.01, True)


def test_what_pairs_say(tmp_path: Path) -> None:
    pairs = [replace(PAIR, without=without, with_store=0.5 * without) for without in (1.0, 2.0, 3.0, 4.0)]
    pairs.append(replace(PAIR, without=10.0, with_store=12.0, cached=20, expected=9.0))
    found = summarize(pairs)
    assert (found["with_p50"], found["without_p50"], found["pairs"]) == (1.5, 3.0, 5)
    assert found["ratio_p50"]["value"] == 0.5
    assert found["ratio_p50"]["low"] <= 0.5 <= found["ratio_p50"]["high"]
    assert found["worst_pair"] == pytest.approx(1.2)
    assert (found["matched_tokens"], found["loaded_tokens"], found["cut_pairs"]) == (400, 340, 1)
    assert found["slower_pairs"] == 1 and found["missed_pairs"] == 3
    assert table({"5 MB/s": found}).row_count == 1
    with torch.random.fork_rng():
        plot({"5 MB/s": pairs}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
