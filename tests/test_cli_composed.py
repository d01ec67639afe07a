"""The command line on what is composed: schemas that are encoded ahead, and logs replayed with discovery."""

import json
from pathlib import Path

import pytest
from commands import Command, command

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.bench import models
from kvstore.pml import Schema

__all__ = ["command"]  # a fixture
SCHEMA = """<schema name="trip">
  <module name="city">The city is <parameter name="name" length="8"/>. </module>
  <module name="rules">Answer in three lines. </module>
</schema>"""


@pytest.fixture
def trip(tmp_path: Path) -> Path:
    path = tmp_path / "trip.xml"
    path.write_text(SCHEMA)
    return path


def test_what_was_encoded_ahead_is_there_for_prompts(command: Command, trip: Path, tmp_path: Path) -> None:
    first = command("pml", "encode", trip, "--dir", tmp_path / "cache")
    assert first.code == 0 and "45 tokens of modules, 45 computed now" in first.out
    assert "45 tokens of modules, 0 computed now" in command("pml", "encode", trip, "--dir", tmp_path / "cache").out
    subject = models.load("tiny")
    prompt = Schema.load(trip, tokenizer=subject.encoder.tokenizer).prompt(
        "<prompt schema='trip'><city name='Rome'/><rules/> Plan.</prompt>"
    )
    with kvstore.open(tmp_path / "cache") as store:
        hit = Reuse(subject.model, store).load(prompt)
        assert hit.cached_tokens == 45 - 8  # all but the room for the name
        out = subject.model.generate(**hit.inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == len(prompt) + 3


def test_without_a_directory_nothing_is_kept(command: Command, trip: Path) -> None:
    said = command("pml", "encode", trip, "--layout", "packed")
    assert said.code == 0 and "--dir" in said.out
    assert sorted(trip.parent.iterdir()) == [trip]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("{folder}/no.xml",), "no.xml"),
        (("{trip}", "--layout", "loose"), "packed"),
        (("{trip}", "--bos"), "beginning-of-sequence"),
        (("{broken}",), "line 2"),
    ],
)
def test_bad_schemas_are_one_sentence(command: Command, trip: Path, words: tuple[str, ...], says: str) -> None:
    broken = trip.with_name("broken.xml")
    broken.write_text('<schema name="x">\n<module name="a">text</schema>')
    said = command("pml", "encode", *(word.format(folder=trip.parent, trip=trip, broken=broken) for word in words))
    assert said.code == 2 and says in said.err and said.err.count("\n") == 1


def test_replay_with_discovery_tells_what_was_found_and_what_it_changed(command: Command, tmp_path: Path) -> None:
    page = "".join(f"line {number} of a page that two tasks read. " for number in range(12))
    chats = [
        {"messages": [{"role": "user", "content": start}, {"role": "assistant", "content": "a"}]}
        for start in (f"first {page} one", f"other {page} two")
    ]
    log, out = tmp_path / "log.json", tmp_path / "out.json"
    log.write_text(json.dumps(chats))
    said = command("replay", log, "--discover", 64, "--json", out, "--tokens", 2)
    assert said.code == 0, said.err
    found = json.loads(out.read_text())["discovery"]
    assert found["prefix_tokens"] < 10 < len(page) - 10 < found["more_tokens"] <= len(page) + 2
    assert found["turns"] == 1 and found["tokens_compared"] == 2 and found["divergence"] > 0
    assert "found beyond" in said.out and "nats a token" in said.out
    plain = command("replay", log, "--json", out, "--tokens", 2)
    assert plain.code == 0 and json.loads(out.read_text())["discovery"] is None
    assert "found beyond" not in plain.out
