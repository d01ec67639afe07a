"""What looking ahead is worth on a trace, with the store's own policies."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kvstore.bench.simulate import look_ahead
from kvstore.bench.simulate.look_ahead import DISK, MEMORY, Outcome, Served, Tiers, simulate
from kvstore.bench.simulate.readers import read
from kvstore.errors import BadInput


def drawn(seed: int, requests: int = 400) -> list[list[int]]:
    """Conversations that go on in turns, some blocks a turn, all behind the same first block."""
    draw, fresh = random.Random(seed), iter(range(1, 1 << 30))
    going: list[list[int]] = []
    found = []
    for _ in range(requests):
        if len(going) < 30 or draw.random() < 0.2:
            going.append([0])
        talk = going[draw.randrange(max(0, len(going) - 30), len(going))]
        talk += [next(fresh) for _ in range(draw.randrange(1, 4))]
        found.append(list(talk))
    return found


def test_a_disk_is_waited_for_unless_the_queue_is_seen() -> None:
    requests = [[1, 2], [3, 4], [1, 2, 5]]
    assert simulate(requests, 2).served == [Served(2, 0, 0), Served(2, 0, 0), Served(3, 2, 2)]
    assert simulate(requests, 2, look_ahead=1).served[2] == Served(3, 2, 0)
    slow = simulate(requests, 2, look_ahead=1, bandwidth=1)  # one block is moved before each request
    assert slow.served[2] == Served(3, 2, 1) and (slow.waited, slow.in_memory, slow.hit) == (1, 0.5, 2 / 7)


def test_each_block_is_in_one_place_and_both_stay_in_their_budgets(seed: int) -> None:
    tiers = Tiers(20)
    requests = drawn(seed)
    for number, blocks in enumerate(requests):
        tiers.look(requests[number : number + 8], bandwidth=3)
        tiers.serve(blocks)
        memory, disk = (set(tier.victims()) for tier in tiers._tiers)
        assert not memory & disk and memory | disk == tiers.where.keys()
        assert len(memory) <= 20 and len(disk) <= 20 * DISK
        assert all((block in memory) == (place == MEMORY) for block, place in tiers.where.items())


def test_the_further_it_looks_the_less_is_waited_for(seed: int) -> None:
    requests = drawn(seed)
    waits = [simulate(requests, 60, ahead, bandwidth=4).waited for ahead in (0, 2, 8)]
    assert waits[0] > waits[1] > waits[2]
    assert simulate(requests, 60, 8).waited <= waits[2]


def test_slower_requests_are_counted() -> None:
    before = Outcome(1, 0, 0, [Served(9, 5, 2), Served(9, 5, 2), Served(9, 5, 2), Served(9, 5, 2)])
    after = Outcome(1, 8, 0, [Served(9, 5, 1), Served(9, 6, 6), Served(9, 5, 3), Served(9, 4, 0)])
    assert after.slower_than(before) == 2 and before.slower_than(before) == 0


def test_a_queue_of_eight_finds_nine_tenths_in_memory_and_slows_nobody(traces: Path) -> None:
    trace = read(traces / "conversation_trace.jsonl")
    requests, memory = [request.blocks for request in trace.requests], trace.unique_blocks // 100
    without = simulate(requests, memory)
    eight, many = simulate(requests, memory, 8, 12), simulate(requests, memory, 32, 12)
    assert without.in_memory < 0.2
    assert eight.in_memory >= 0.91 and many.in_memory >= 0.99
    assert eight.slower_than(without) == many.slower_than(without) == 0


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    records = [
        {"timestamp": number, "input_length": 512 * len(blocks), "output_length": 1, "hash_ids": blocks}
        for number, blocks in enumerate(drawn(1, 50))
    ]
    trace.write_text("".join(json.dumps(record) + "\n" for record in records))
    look_ahead.main(trace, [0.2], [4], [0, 2], out)
    found = json.loads(out.read_text())
    assert (found["trace"], found["requests"]) == ("trace.jsonl", 50)
    assert [(row["look_ahead"], row["bandwidth"]) for row in found["results"]] == [(0, 0), (4, 0), (4, 2)]
    assert "not seen" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--memory"):
        look_ahead.main(trace, [0.001])
    with pytest.raises(BadInput):
        look_ahead.main(tmp_path / "missing")
