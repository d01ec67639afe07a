"""Bad traces to simulate: each is refused in one sentence with its line, or counted and left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trace_files import MOONCAKE, Record, written

from kvstore.bench.simulate import readers, records
from kvstore.bench.simulate.requests import Request
from kvstore.errors import BadInput

GOOD, LAST = MOONCAKE[0], MOONCAKE[2]
HALF = json.dumps(LAST)[:30]


def but(**changes: Any) -> list[Record]:
    """Three records, the second of which is another; fields that are None are missing."""
    changed = {**MOONCAKE[1], **changes}
    return [GOOD, {name: value for name, value in changed.items() if value is not None}, LAST]


def turn(**fields: Any) -> list[Record]:
    """Three sessions of two turns, with these fields in the second turn of the second one."""
    good = {"text": "hello", "timestamp": 5000}
    turns = ([good, good], [good, {**good, **fields}], [good])
    return [{"session_id": str(at), "turns": each} for at, each in enumerate(turns)]


BAD: dict[str, tuple[str | bytes | list[Record], str]] = {
    "no-time": (but(timestamp=None), '"timestamp" is missing; every record needs'),
    "no-length": (but(input_length=None, output_length=None), '"input_length" and "output_length" is missing'),
    "no-ids": (but(hash_ids=None), '"hash_ids" is missing'),
    "time-back": ([GOOD, {**LAST, "timestamp": 5}, {**MOONCAKE[1], "timestamp": 4}], "from 0.005 s to 0.004 s; sort"),
    "text-time": (but(timestamp="noon"), '"timestamp" must be a number that is not negative, not a str'),
    "true-time": (but(timestamp=True), "not true"),
    "nan-time": (but(timestamp=float("nan")), "not nan"),
    "endless-time": (but(timestamp=float("inf")), "not inf"),
    "huge-time": (but(timestamp=10**400), "that is not negative, not 1000000"),
    "negative-time": (but(timestamp=-1), "not -1"),
    "negative-length": (but(input_length=-5), '"input_length" must be a whole number of at least 1, not -5'),
    "empty-prompt": (but(input_length=0, hash_ids=[]), "at least 1, not 0"),
    "half-token": (but(output_length=2.5), '"output_length" must be a whole number of at least 0, not 2.5'),
    "text-ids": (but(hash_ids=["a"]), '"hash_ids" must be a list of at least one whole number'),
    "float-ids": (but(hash_ids=[1.0]), '"hash_ids" must be a list'),
    "true-ids": (but(hash_ids=[True]), '"hash_ids" must be a list'),
    "one-id": (but(hash_ids=0), '"hash_ids" must be a list'),
    "few-ids": (but(input_length=513), "513 tokens are 2 blocks of 512, but there are 1 hash ids"),
    "other-parent": (but(input_length=1024, hash_ids=[0, 2]), "block 2 stands behind 0 here and behind 1 before; ids"),
    "other-depth": (but(hash_ids=[1]), "block 1 stands first here and behind 0 before"),
    "no-root": (but(input_length=1024, hash_ids=[8, 0]), "block 0 stands behind 8 here and first before"),
    "twice": (but(input_length=1024, hash_ids=[8, 8]), "block 8 stands behind 8 here and first before"),
    "array": ("\n".join(json.dumps(one) for one in (GOOD, [1], LAST)), "an object was expected, not list"),
    "broken": (f"{json.dumps(GOOD)}\n{HALF}\n{json.dumps(LAST)}\n", "the line is broken"),
    "deep": (f"{json.dumps(GOOD)}\n{'[' * 100_000}\n{json.dumps(LAST)}\n", "the line is broken"),
    "latin": (json.dumps(GOOD).encode() + b'\n{"\xe9": 1}\n' + json.dumps(LAST).encode(), "not text in UTF-8 (byte 2)"),
    "no-text": (turn(text=None), 'a turn needs "text", or "texts"'),
    "number-text": (turn(text=5), 'a turn needs "text", or "texts"'),
    "role": (turn(role="wizard"), '"role" must be one of system, developer'),
    "turn-back": (turn(timestamp=4999), "time goes back, from 5.000 s to 4.999 s; sort the turns by timestamp"),
    "turn-delay": (turn(delay=-1, timestamp=None), '"delay" must be a number'),
    "turn-output": (turn(output_length="x"), '"output_length" must be'),
    "no-turn": ([turn()[0], {"session_id": "t", "turns": []}, turn()[2]], '"turns" must be a list of at least one'),
    "late-time": (
        [turn()[0], {"turns": [{"text": "a"}, {"text": "b", "timestamp": 9}]}, turn()[2]],
        "the session's first turn has no timestamp, a later one has",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_record_stops_or_is_counted(tmp_path: Path, content: Any, sentence: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(BadInput) as caught:
        readers.read(path)
    said = str(caught.value)
    line = 3 if sentence.startswith("from 0.005") else 2
    assert said.startswith(f"{path}, line {line}: ") and sentence in said and "\n" not in said
    trace = readers.read(path, skip=True)
    sessions = trace.format == "aiperf"
    assert (trace.skipped, len(trace.requests)) == (1, 3 if sessions else 2)
    good = (content[0], content[2]) if line == 2 and isinstance(content, list) else None
    if good:
        assert trace.requests == readers.read(written(tmp_path, good)).requests


def test_half_a_line_at_the_end(tmp_path: Path) -> None:
    path = written(tmp_path, f"{json.dumps(GOOD)}\n\n{HALF}")
    with pytest.raises(BadInput, match=r"line 3: the file ends in half a line .*; remove the line or fetch"):
        readers.read(path)
    assert readers.read(path, skip=True).skipped == 1


def test_the_first_line_may_be_the_bad_one(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HALF}\n{json.dumps(GOOD)}\n")
    with pytest.raises(BadInput, match="line 1: the line is broken"):
        readers.read(path)
    assert readers.read(path, skip=True).requests == (Request(0.0, 1300, (0, 1, 2), 7),)


def test_lines_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE", 200)
    long = json.dumps({**LAST, "note": "x" * 1000})
    path = written(tmp_path, f"{json.dumps(GOOD)}\n{long}\n{json.dumps(LAST)}\n")
    with pytest.raises(BadInput, match="line 2: the line is longer than"):
        readers.read(path)
    trace = readers.read(path, skip=True)
    assert (trace.skipped, len(trace.requests)) == (1, 2)


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "nowhere", "cannot read .*nowhere: No such file or directory; give the path"),
    "folder": (lambda folder: folder, "cannot read .*: Is a directory; give the path of a trace or a chat log"),
    "empty": (lambda folder: written(folder, ""), "is empty; give a trace or a chat log"),
    "blank": (lambda folder: written(folder, "\n \n"), "is empty"),
    "unknown": (
        lambda folder: written(folder, [{"prompt": "x"}]),
        "is of no known format: its first record has prompt",
    ),
    "binary": (lambda folder: written(folder, bytes(range(128, 256))), "is not a text file in UTF-8"),
    "array": (lambda folder: written(folder, json.dumps(MOONCAKE)), "must have one request on each line; write it"),
    "silent": (
        lambda folder: written(folder, [{"turns": [{"role": "system", "text": "x"}]}]),
        "holds no request; give",
    ),
}


@pytest.mark.parametrize("skip", [False, True], ids=["stop", "skip"])
@pytest.mark.parametrize(("make", "sentence"), FILES.values(), ids=FILES)
def test_files_that_hold_no_trace(tmp_path: Path, make: Callable[[Path], Path], sentence: str, skip: bool) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        readers.read(make(tmp_path), skip=skip)
    assert "\n" not in str(caught.value)


def test_nothing_but_bad_records(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no request, and 2 bad records; give"):
        readers.read(written(tmp_path, [{**GOOD, "timestamp": -1}, {**GOOD, "hash_ids": []}]), skip=True)


def test_messages_do_not_leak_words(tmp_path: Path) -> None:
    bad: list[Record] = [{**GOOD, "timestamp": "my password"}, {"turns": [{"text": "a", "role": "my password"}]}]
    for record in bad:
        with pytest.raises(BadInput) as caught:
            readers.read(written(tmp_path, [record]))
        assert "password" not in str(caught.value)
