"""Hints to a real engine: each is answered, and what is said to come is in memory when it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from inside import Ask, Inside, running
from models import prompt
from serving import transfer

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(900)]
QUEUED = [prompt(800 + number, 600) for number in range(4)]
FOLLOWS, NEVER, SHORT = prompt(810, 900), prompt(811, 900), prompt(812, 40)
TRIES = 200  # requests within which a prefetch is to be done


def action(name: str, kind: str, version: str = "1.0", **payload: Any) -> Mapping[str, Any]:
    return {"action_id": name, "action_type": kind, "action_version": version, "payload": payload}


@pytest.fixture
def engine(tmp_path: Path, llama: Path) -> Iterator[Inside]:
    """One request at a time; what its prompts need is on disk only."""
    config = transfer(dir=str(tmp_path / "cache"), host="64MiB", disk="1GiB", load="layers")
    with running(llama, tmp_path / "first.log", config) as first:
        for ids in (*QUEUED, FOLLOWS, NEVER):
            first.one(ids)
    with running(llama, tmp_path / "log", config, max_num_seqs=1) as found:
        yield found


def test_what_waiting_requests_will_read_is_brought_while_others_run(engine: Inside) -> None:
    answers = engine.ask(*(Ask(ids, kvstore={}, tokens=32) for ids in QUEUED))
    tiers = [answer.told["by_tier"] for answer in answers]
    there = len(QUEUED[0]) - 1
    assert tiers == [{"disk": there}, {"host": there}, {"host": there}, {"host": there}]  # the first never waited


def test_a_prompt_that_will_follow_is_in_memory_when_it_does(engine: Inside) -> None:
    answers = list[str]()
    while len(answers) < TRIES and answers[-1:] != ["resident"]:
        answers.append(engine.one(SHORT, tokens=1, kvstore={"prefetch": FOLLOWS}).told["prefetch"])
    assert answers[-1] == "resident" and set(answers[:-1]) <= {"accepted", "prefetching"}
    told = [engine.one(ids, kvstore={}).told["by_tier"] for ids in (FOLLOWS, NEVER)]
    assert told == [{"host": len(FOLLOWS) - 1}, {"disk": len(NEVER) - 1}]


def test_the_envelope_of_the_engine_is_answered_action_by_action(engine: Inside) -> None:
    actions = [
        action("keep", "kvstore.retain", seconds=60),
        action("hold", "kvstore.pin", seconds=60),
        action("next", "kvstore.prefetch", token_ids=FOLLOWS),
        action("ranges", "kv.retain", directives=[{"start": 0, "end": 32, "priority": 80, "duration": 60.0}]),
        action("session", "kv.retain", ttl_seconds=2.5, priority=3, block_hashes=["11"]),
        action("weights", "kv.retain", directives=[{"start": 0, "end": 32, "priority": 80}]),
        action("later", "kvstore.pin", "2.0", seconds=60),
        action("other", "kv.fetch", keys=[1]),
        action("wrong", "kvstore.pin", seconds="long"),
    ]
    (told,) = (answer.told["hints"] for answer in engine.ask(Ask(QUEUED[0], actions=actions)))
    assert told["next"] in ("accepted", "prefetching", "resident")
    assert [told[name] for name in ("keep", "hold", "ranges", "session")] == ["accepted"] * 4
    refused = {name: told[name] for name in ("weights", "later", "other", "wrong")}
    assert refused == {
        "weights": "ignored: kv.retain without a duration says how much blocks matter, not how long; that is not used",
        "later": "ignored: version '2.0' of kvstore.pin is not known, only 1",
        "other": "ignored: kv.fetch is not known; choose from kv.retain, kvstore.retain, kvstore.pin, kvstore.prefetch",
        "wrong": "ignored: seconds='long' is no number of seconds",
    }


def test_hints_of_a_request_that_is_not_served_are_ignored(engine: Inside) -> None:
    engine.one(SHORT, salt="ours#1", kvstore={"segments": [[0, len(SHORT)]]})
    wishes = {"retain": 60, "pin": 60, "prefetch": FOLLOWS}
    exact = engine.ask(Ask(SHORT, salt="ours#1", kvstore=wishes, actions=[action("keep", "kvstore.pin", seconds=60)]))
    assert [exact[0].told[name] for name in wishes] == ["ignored"] * 3 and exact[0].told["hints"] == {"keep": "ignored"}


def test_another_tenants_prompt_is_not_there(engine: Inside) -> None:
    answers = {engine.one(SHORT, salt="ours", kvstore={"prefetch": FOLLOWS}).told["prefetch"] for _ in range(5)}
    assert "unknown" in answers and answers <= {"accepted", "unknown"}


def test_prefetches_that_make_no_sense_are_refused(engine: Inside) -> None:
    for wrong in ("text", 7, [1, -2], [1.5], {"a": 1}):
        told = engine.one(SHORT, tokens=1, kvstore={"prefetch": wrong}).told
        assert told["refused"].startswith("prefetch needs"), wrong
