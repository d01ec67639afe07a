"""Times to first tokens with memory, disk and workers: what can be worked out by hand, and what may never be."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.bench.simulate import timed
from kvstore.bench.simulate.requests import Request, Trace
from kvstore.bench.simulate.timed import AWARE, most, serve, strategy_of
from kvstore.bench.simulate.timed_run import FIRST, Chats, Run, Turn, drawn, recorded
from kvstore.bench.simulate.timed_tiers import Machine
from kvstore.errors import BadInput

# A token takes a byte: 100 of them are computed in 1 s, loaded in 0.1 s, read from disk in 2 s and written in 1 s.
MACHINE = Machine(1, 1, 2, 400, 4000, 400, 1000.0, 50.0, 100.0, 1, 0.01, 0.0, 0.5)
STRATEGIES = ("lru", "fifo", "pace", "lru+prefetch", "lru+look-ahead", AWARE, f"pace+look-ahead+{timed.PREFETCH}")


def one(time: float, *blocks: int, output: int = 1, before: int = FIRST) -> Turn:
    """Blocks of 100 tokens each, all of them the prompt's."""
    return Turn(time, 100 * len(blocks), output, blocks, (100,) * len(blocks), before)


def run(turns: list[Turn], name: str = "lru", machine: Machine = MACHINE) -> Run:
    served = Run(turns, machine, strategy_of(name))
    served.finish()
    return served


def crowd(seed: int, sessions: int = 150) -> list[Turn]:
    """More than one worker can serve."""
    return drawn(Chats(sessions, 0.05, 20.0, turns=4.0, question=60, answer=40, window=400), seed)


def firsts(served: Run) -> list[float]:
    return [round(each.first - each.came, 9) for each in served.served]


def in_memory(served: Run) -> float:
    return sum(each.in_memory for each in served.served) / sum(each.found for each in served.served)


def test_the_second_of_two_waits_for_the_first_and_loads_what_it_left() -> None:
    turns = [one(0.0, 0, 1, output=3), one(1.0, 0, 1, 2, output=1)]
    # 2 s of prefill and two more tokens; the second comes at 1 s, starts at 3 s and computes 100 of its tokens.
    served = run(turns)
    assert firsts(served) == [2.0, 3.0]
    assert [each.ended for each in served.served] == [3.0, 4.0] and served.busy == 4.0
    assert (served.served[1].started, served.served[1].hit, served.served[1].in_memory) == (3.0, 200, 200)
    # Loaded under the computation, whichever is longer: at 20 tokens a second the 200 take 10 s.
    assert firsts(run(turns, machine=replace(MACHINE, link=20.0))) == [2.0, 12.0]
    # Found whole, the last token is computed all the same.
    assert firsts(run([one(0.0, 0), one(5.0, 0)])) == [1.0, 0.099]
    # Attention: 300 * 300 - 200 * 200 pairs.
    assert firsts(run(turns, machine=replace(MACHINE, quadratic=1e-4)))[1] == 3.0 + 4.0 + 5.0


def test_slots_let_a_prefill_pass_what_is_decoded_and_stop_it() -> None:
    turns = [one(0.0, 0, output=5), one(2.0, 1, output=1)]
    assert firsts(run(turns)) == [1.0, 2.0]  # decoded until 3 s
    both = run(turns, machine=replace(MACHINE, slots=2))
    assert firsts(both) == [1.0, 1.0] and both.served[0].ended == 4.0 and both.busy == 4.0


def test_what_is_on_disk_is_waited_for_unless_it_is_read_in_advance() -> None:
    small = replace(MACHINE, memory=200)
    turns = [one(0.0, 0, 1), one(10.0, 2, 3), one(20.0, 4), one(20.0, 0, 1, 5, output=1)]
    waited = run(turns, machine=small).served[3]
    # It starts at 21 s, when the other is done, and reads 200 tokens in 4 s; the new ones take 1 s.
    assert (waited.started, waited.in_memory, waited.hit, waited.first) == (21.0, 0, 200, 26.0)
    for name in ("lru+prefetch", AWARE):
        ahead = run(turns, name, replace(small, read=250.0)).served[3]  # 0.8 s, and it waits 1
        assert (ahead.in_memory, ahead.first) == (200, 22.0), name
        slow = run(turns, name, small).served[3]  # half of it has come after 2 s, when it has waited 1 s
        assert (slow.started, slow.in_memory, slow.first) == (21.0, 0, 25.0), name


def test_what_the_queue_needs_is_evicted_last() -> None:
    tight = replace(MACHINE, memory=200, disk=0)
    turns = [one(0.0, 0), one(2.0, 1), one(4.0, 2), one(4.5, 0), one(4.5, 3)]
    assert [each.hit for each in run(turns, "lru", tight).served] == [0, 0, 0, 0, 0]
    assert [each.hit for each in run(turns, "lru+look-ahead", tight).served] == [0, 0, 0, 99, 0]


def test_two_workers_share_the_queue() -> None:
    turns = [one(0.0, number) for number in range(4)]
    assert firsts(run(turns)) == [1.0, 2.0, 3.0, 4.0]
    assert firsts(run(turns, machine=replace(MACHINE, workers=2))) == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_request_is_served_once_and_tiers_stay_in_their_budgets(name: str, seed: int) -> None:
    turns, ended = crowd(seed), list[int]()
    machine = replace(MACHINE, memory=1500, disk=6000, slots=3, workers=2)

    def check() -> None:
        ended.append(1)
        tiers = served.tiers
        assert tiers._memory_used == tiers.bytes_of(tiers._memory) + tiers.bytes_of(tiers._reading)
        assert tiers._disk_used == tiers.bytes_of(tiers._disk) <= machine.disk
        assert len(tiers._memory_policy) == len(tiers._memory) and len(tiers._disk_policy) == len(tiers._disk)
        assert tiers._memory_used <= machine.memory + tiers._held_bytes

    served = Run(turns, machine, strategy_of(name), check)
    served.finish()
    assert len(ended) == len(turns) and not served.tiers._held and not served.tiers._reading
    for turn, each in zip(turns, served.served, strict=True):
        assert turn.time <= each.came <= each.started < each.first <= each.ended or turn.before != FIRST
        assert 0 <= each.hit < turn.prompt and 0 <= each.in_memory <= each.found
        assert each.first - each.started >= machine.prefill(turn.prompt, each.hit) - 1e-9
        if turn.before != FIRST:
            assert each.came == pytest.approx(served.served[turn.before].ended + turn.time)
    assert served.tiers.read <= machine.read * served.now and served.tiers.written <= machine.write * served.now
    assert 0 < served.tiers.read and sum(each.hit for each in served.served) > 0


def test_without_a_cache_everything_is_computed(seed: int) -> None:
    turns = crowd(seed)
    row = serve(turns, replace(MACHINE, slots=1), timed.RECOMPUTE)
    seconds = sum(turn.prompt * 0.01 + (turn.output - 1) * 0.5 for turn in turns)
    assert (row["hit"], row["in_memory"], row["written_gb"], row["storage_share"]) == (0, 0, 0, 0)
    assert row["gpu_s"] == pytest.approx(2 * seconds, abs=0.1)
    assert row["cost"]["gpu"] == pytest.approx(2 * seconds / 3600 * 5, abs=1e-3)


def test_looking_ahead_finds_no_less_and_more_of_it_in_memory(seed: int) -> None:
    machine = replace(MACHINE, memory=1500, disk=4000, slots=3, read=400.0)
    runs = {name: run(crowd(seed), name, machine) for name in ("lru", "lru+prefetch", AWARE)}
    assert in_memory(runs["lru"]) < in_memory(runs["lru+prefetch"])
    assert in_memory(runs["lru"]) < in_memory(runs[AWARE])
    hits = {name: sum(each.hit for each in served.served) for name, served in runs.items()}
    assert hits[AWARE] > hits["lru"] and hits[AWARE] >= hits["lru+prefetch"]


def test_what_comes_after_the_last_session_has_begun_counts_apart(seed: int) -> None:
    turns = [one(0.0, 0), one(10.0, 0, before=0)]
    row = serve(turns, MACHINE, "lru")
    assert (row["hit"], row["in_service_s"]) == (0.0, 1.0)
    assert row["to_the_end"] == {"hit": 99 / 200, "in_memory": 1.0, "in_service_s": 0.5495}
    assert serve(turns, MACHINE, "lru", warm_up=0.5)["hit"] == 0.99
    again = [serve(crowd(seed), replace(MACHINE, memory=1500), AWARE) for _ in range(2)]
    assert again[0] == again[1]


def test_more_workers_never_make_first_tokens_later(seed: int) -> None:
    draw = random.Random(seed)
    turns = [replace(one(draw.uniform(0, 200), number), output=draw.randrange(1, 9)) for number in range(120)]
    for slots in (1, 3):
        means = [
            serve(turns, replace(MACHINE, workers=workers, slots=slots), "lru")["ttft"]["mean"]
            for workers in (1, 2, 3, 4)
        ]
        assert means == sorted(means, reverse=True) and means[0] > means[1]


def test_turns_that_are_drawn_go_on_from_each_other_and_fit_the_window(seed: int) -> None:
    chats = Chats(400, 1.0, 60.0)
    turns = drawn(chats, seed)
    assert turns == drawn(chats, seed) != drawn(chats, seed + 1)
    assert len(turns) / 400 == pytest.approx(chats.turns, rel=0.2)
    dropped = 0
    for turn in turns:
        assert sum(turn.tokens) == turn.prompt + turn.output <= chats.window
        before = () if turn.before == FIRST else turns[turn.before].blocks
        kept = turn.blocks[:-1]
        assert kept == before[len(before) - len(kept) :]
        dropped += len(kept) < len(before)
    assert dropped > 0 and 0.8 < most(turns) < 1


def test_a_trace_is_served_at_its_times() -> None:
    requests = (Request(5.0, 150, (70, 71), 4), Request(9.0, 250, (70, 72, 73), 1))
    turns = recorded(Trace("made", "made", 100, requests))
    assert turns == [Turn(0.0, 150, 4, (0, 1), (100, 50)), Turn(4.0, 250, 1, (0, 2, 3), (100, 100, 50))]
    assert most(turns) == 0.25
    assert firsts(run(turns)) == [1.5, 1.5] and run(turns).served[1].hit == 100


def test_the_command_writes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out, png, trace = tmp_path / "out.json", tmp_path / "out.png", tmp_path / "trace.jsonl"
    timed.main(strategy=["recompute", "lru"], disk=[5.0, 1.0], sessions=20, json_path=out, plot_path=png)
    rows = json.loads(out.read_text())["results"]
    assert [(row["strategy"], row["disk_gb"]) for row in rows] == [("recompute", 0.0), ("lru", 5.0), ("lru", 1.0)]
    shown = capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG") and f"{rows[1]['hit']:.1%}" in shown and "storage" in shown
    records = [{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [0, 1]}] * 2
    trace.write_text("".join(json.dumps(record) + "\n" for record in records))
    timed.main(trace, [AWARE], [2], disk=[5.0], warm_up=0.0, json_path=out)
    assert json.loads(out.read_text())["trace"] == "trace.jsonl"
    with pytest.raises(BadInput, match="no strategy lru\\+luck"):
        timed.main(strategy=["lru+luck"])
