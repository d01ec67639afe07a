"""The readers of traces to simulate: what each kind becomes, and when its requests come."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from trace_files import MOONCAKE, Record, written

from kvstore.bench.simulate import arrivals, readers
from kvstore.bench.simulate.requests import Request
from kvstore.errors import BadInput

BAILIAN: list[Record] = [
    {
        "chat_id": 7,
        "parent_chat_id": -1,
        "timestamp": 61.25,
        "input_length": 20,
        "output_length": 4,
        "hash_ids": [3, 4],
    },
    {"chat_id": 8, "parent_chat_id": -1, "timestamp": 62, "input_length": 16, "output_length": 4, "hash_ids": [9]},
    {
        "chat_id": 9,
        "parent_chat_id": 7,
        "timestamp": 70.5,
        "input_length": 33,
        "output_length": 4,
        "hash_ids": [3, 5, 6],
    },
]
CHAT = [
    {"role": "system", "content": "be brief " * 40},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes, of course"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]


# -- hash ids ---------------------------------------------------------------------------------------------------------


def test_mooncake(tmp_path: Path) -> None:
    trace = readers.read(written(tmp_path, MOONCAKE))
    assert (trace.name, trace.format, trace.block_tokens, trace.arrivals) == ("trace", "mooncake", 512, "recorded")
    assert trace.requests == (
        Request(0.0, 1300, (0, 1, 2), 7),
        Request(2.5, 512, (0,), 0),
        Request(2.5005, 1025, (0, 1, 5), 9),
    )
    assert (trace.tokens, trace.unique_blocks, trace.span, trace.skipped) == (2837, 4, 2.5005, 0)
    assert [*trace.requests[0].sizes(512)] == [512, 512, 276]


def test_bailian(tmp_path: Path) -> None:
    trace = readers.read(written(tmp_path, BAILIAN))
    assert (trace.format, trace.block_tokens, trace.span) == ("bailian", 16, 9.25)
    assert [(request.time, request.session) for request in trace.requests] == [(61.25, "7"), (62.0, "8"), (70.5, "7")]


def test_blocks_of_another_size(tmp_path: Path) -> None:
    path = written(tmp_path, [{**BAILIAN[0], "input_length": 60}])
    assert readers.read(path, block_tokens=32).block_tokens == 32
    with pytest.raises(BadInput, match=r"60 tokens are 4 blocks of 16, but there are 2 hash ids; .* --block-tokens"):
        readers.read(path)


def test_a_format_that_is_named_is_not_guessed(tmp_path: Path) -> None:
    path = written(tmp_path, [{**record, "chat_id": at} for at, record in enumerate(MOONCAKE)])
    assert readers.read(path, "mooncake").span == 2.5005
    assert readers.read(path, "bailian", block_tokens=512).span == 2500.5
    with pytest.raises(BadInput, match="there is no format mooncak; choose from auto, mooncake"):
        readers.read(path, "mooncak")


# -- words ------------------------------------------------------------------------------------------------------------


def same_length(requests: Sequence[Request]) -> int:
    """Leading blocks that all of them have."""
    return sum(1 for ids in zip(*(request.blocks for request in requests), strict=False) if len(set(ids)) == 1)


@pytest.mark.parametrize("lines", [True, False], ids=["jsonl", "json"])
def test_a_chat_log_is_read_in_blocks_of_words(tmp_path: Path, lines: bool) -> None:
    log = [{"id": name, "messages": CHAT} for name in "ab"]
    trace = readers.read(written(tmp_path, log if lines else json.dumps(log)), block_tokens=16)
    assert (trace.format, trace.block_tokens, trace.arrivals) == ("chat", 16, "drawn, seed 0")
    first, second = ([one for one in trace.requests if one.session == name] for name in "ab")
    assert [one.tokens for one in first] == [88, 88 + 5 + 5]  # words and marks
    assert [one.output for one in first] == [5, 0]
    for one, other in zip(first, second, strict=True):
        assert one.blocks == other.blocks and len(one.blocks) == -(-one.tokens // 16)
    assert same_length(first) == first[0].tokens // 16
    assert trace.unique_blocks == len({block for one in first for block in one.blocks})


def test_drawn_arrivals(tmp_path: Path) -> None:
    path = written(tmp_path, [{"id": str(at), "messages": CHAT} for at in range(400)])
    one, again, other = (readers.read(path, seed=seed) for seed in (3, 3, 4))
    assert one == again and one.requests != other.requests
    assert (one.arrivals, other.arrivals) == ("drawn, seed 3", "drawn, seed 4")
    times = [request.time for request in one.requests]
    assert times == sorted(times) and times[0] > 0
    turns: dict[str, list[float]] = {}
    for request in one.requests:
        turns.setdefault(request.session, []).append(request.time)
    begins = [turn[0] for _, turn in sorted(turns.items(), key=lambda item: int(item[0]))]
    assert begins == sorted(begins)
    assert begins[-1] / 400 == pytest.approx(arrivals.SESSION_SECONDS, rel=0.2)
    thinking = sorted(turn[1] - turn[0] for turn in turns.values())
    assert thinking[200] == pytest.approx(arrivals.THINK_SECONDS, rel=0.3)
    assert thinking[0] > 0 and thinking[-1] > 4 * thinking[200]


def test_token_ids_are_blocks_as_they_are(tmp_path: Path) -> None:
    log = [{"session_id": "s", "token_ids": [1, 2, 3, 4, 5]}, {"session_id": "s", "token_ids": [1, 2, 9, 4, 2**32 - 1]}]
    first, second = readers.read(written(tmp_path, log), block_tokens=2).requests
    assert first.blocks[0] == second.blocks[0] and len({*first.blocks, *second.blocks}) == 5


TURNS: list[Record] = [
    {"role": "system", "text": "be brief " * 40},
    {"text": "one?", "timestamp": 1500},
    {"texts": ["two", {"name": "more", "contents": ["words", "here"]}], "delay": 2500, "output_length": 12},
    {"role": "assistant", "text": "well"},
    {"text": "three?", "timestamp": 9000},
]
SESSION: Record = {"session_id": "s", "turns": TURNS}


def test_multi_turn(tmp_path: Path) -> None:
    trace = readers.read(written(tmp_path, [SESSION, {**SESSION, "session_id": 5}]), block_tokens=16)
    assert (trace.format, trace.arrivals, len(trace.requests)) == ("aiperf", "recorded", 6)
    requests = [request for request in trace.requests if request.session == "s"]
    assert [(request.time, request.output) for request in requests] == [(1.5, 0), (4.0, 12), (9.0, 0)]
    assert [request.tokens for request in requests] == [88, 88 + 5 + 2, 88 + 5 + 2 + 3 + 4]
    assert [same_length(pair) for pair in itertools.pairwise(requests)] == [88 // 16, 95 // 16]
    assert trace.unique_blocks == len({block for request in requests for block in request.blocks})


def test_turns_on_lines_of_their_own_are_one_session(tmp_path: Path) -> None:
    turns = [{"session_id": "s", **turn} for turn in TURNS]
    one, other = (readers.read(written(tmp_path, lines)) for lines in ([SESSION], turns))
    assert one == other


def test_multi_turn_without_times(tmp_path: Path) -> None:
    sessions = [{"turns": [{"text": "one"}, {"text": "two", "delay": 750}, {"text": "three"}]} for _ in range(9)]
    trace = readers.read(written(tmp_path, sessions), seed=2)
    assert trace.arrivals == "drawn, seed 2" and len(trace.requests) == 27
    for name in {request.session for request in trace.requests}:
        first, second, third = (request.time for request in trace.requests if request.session == name)
        assert second - first == pytest.approx(0.75) and third > second


@pytest.mark.parametrize(
    ("name", "format", "requests"),
    [
        ("conversation_trace.jsonl", "mooncake", 12031),
        ("fastchat_dummy_conversation.sharegpt.json", "chat", 1000),
        ("mt_bench_question.jsonl", "chat", 160),
    ],
)
def test_public_traces(traces: Path, name: str, format: str, requests: int) -> None:
    trace = readers.read(traces / name)
    assert (trace.format, len(trace.requests)) == (format, requests)
