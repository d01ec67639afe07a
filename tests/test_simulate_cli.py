"""`kvstore simulate`: what a person sees when all is well, and the one sentence when it is not."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from test_cli import command as any_command

from kvstore.policies.named import POLICIES

CHAT = [{"role": "user", "content": "hello " * 200}, {"role": "assistant", "content": "hi"}] * 3


__all__ = ["any_command"]  # a fixture


@pytest.fixture(autouse=True, scope="module")
def tracker() -> None:
    """What multiprocessing starts once and keeps is there before any test looks for leaks."""
    resource_tracker.ensure_running()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, any_command: Command) -> Command:
    """Runs `kvstore simulate …` in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    return partial(any_command, "simulate")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """120 requests of 12 conversations behind one system prompt; the name is no markup."""
    draw, fresh = random.Random(0), iter(range(1, 10_000))
    ends = [[0]] * 12
    path = tmp_path / "trace[b].jsonl"
    with path.open("w") as file:
        for at in range(120):
            one = draw.randrange(12)
            ends[one] = [*ends[one], next(fresh)]
            ids = [*ends[one], next(fresh)]
            record = {"timestamp": 1000 * at, "input_length": 512 * len(ids) - 100, "output_length": 9, "hash_ids": ids}
            file.write(json.dumps(record) + "\n")
    return path


def rows(out: str) -> dict[str, list[str]]:
    """The table's cells, by policy."""
    lines = [line.split() for line in out.splitlines()]
    return {words[0]: words[1:] for words in lines if words and words[0] in (*POLICIES, "min")}


def test_help(command: Command) -> None:
    said = command("--help")
    assert said.code == 0 and "Usage" in said.out and "--look-ahead" in said.out


def test_table_figures_and_page(command: Command, trace: Path, tmp_path: Path) -> None:
    with trace.open("a") as file:
        file.write('{"timestamp": 5, "inp')
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    said = command(trace, "--json", out, "--report", page, "--on-error", "skip", "--capacity", "0.5,0.05,1.0")
    assert said.code == 0, said.err
    assert "120 requests of trace[b].jsonl" in said.out and "1 bad records skipped" in said.out
    found = json.loads(out.read_text())
    told = found["trace"]
    assert (told["requests"], told["skipped"], told["unique_blocks"], told["span_seconds"]) == (120, 1, 241, 119.0)
    results = found["results"]
    assert [(one["policy"], one["capacity"]) for one in results] == [
        (policy, capacity) for policy in ("default", "lru", "min") for capacity in (0.05, 0.5, 1.0)
    ]
    shown = rows(said.out)
    for one in results:
        assert 0 < one["token_hit_ratio"] < 1 and 0 < one["share_of_min"] <= 1 and one["seconds"] > 0
        assert one["written"] - one["evictions"] <= one["blocks"] == int(241 * one["capacity"])
        assert f"{100 * one['token_hit_ratio']:.2f}" in shown[one["policy"]]
    assert [one["share_of_min"] for one in results if one["policy"] == "min"] == [1.0] * 3
    text = page.read_text()
    assert text.count("<polyline") == 2 * 3 and text.count("<circle") == 2 * 9 and "optimum (min)" in text
    assert "stroke-dasharray" in text and "prefers-color-scheme: dark" in text
    assert not re.search(r'(src|href)="(?!#)|https?://|url\((?!#)', text)


def test_policies_as_asked(command: Command, trace: Path, tmp_path: Path) -> None:
    """Shares are there without the optimum; what is known to come helps; the warm-up is not counted."""
    found = []
    for words in ((), ("--look-ahead", 30, "--warm-up", 0.25)):
        said = command(trace, "--policy", "lru", "--capacity", "0.06", "--json", tmp_path / "out.json", *words)
        assert said.code == 0 and list(rows(said.out)) == ["lru"]
        (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
        found.append(result["token_hit_ratio"])
    assert 0 < result["share_of_min"] < 1 and found[0] < found[1]
    assert "30 requests are known" in said.out and "25% of requests not counted" in said.out


def test_a_chat_log_and_drawn_arrivals(command: Command, tmp_path: Path) -> None:
    """Nothing of a model, of arrays or of plots is loaded for it."""
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"messages": CHAT}] * 8))
    probe = (
        f"import sys; sys.argv = ['kvstore', 'simulate', {str(path)!r}, '--policy', 'all', '--seed', '5'];"
        "from kvstore import cli; cli.app(standalone_mode=False);"
        "print('loaded', sorted({'torch', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    assert "arrivals drawn, seed 5" in " ".join(done.stdout.split())
    assert rows(done.stdout).keys() == {*POLICIES, "min"}
    assert done.stdout.strip().endswith("loaded []")


BAD: Sequence[tuple[str, list[str], str]] = (
    ("policy", ["--policy", "lru,lru-3"], "there is no policy lru-3; did you mean lru-2? There are default, "),
    ("strange policy", ["--policy", "xyz"], "there is no policy xyz; there are default, "),
    ("no policy", ["--policy", ","], "--policy is empty; write it as --policy default,lru"),
    ("no number", ["--capacity", "0.1,much"], "much is no capacity; give shares of all different blocks, as in"),
    ("zero", ["--capacity", "0"], "capacity 0 must be more than 0 and at most 1"),
    ("negative", ["--capacity", "-0.1"], "capacity -0.1 must be more than 0"),
    ("percent", ["--capacity", "5"], "capacity 5 must be more than 0 and at most 1"),
    ("nan", ["--capacity", "nan"], "capacity nan must be"),
    ("warm-up", ["--warm-up", "1"], "--warm-up 1.0 must be from 0 to less than 1"),
    ("on-error", ["--on-error", "ignore"], "--on-error is stop or skip, not ignore"),
    ("format", ["--format", "csv"], "there is no format csv; choose from auto, mooncake, bailian, aiperf, chat"),
    ("block tokens", ["--block-tokens", "256"], "line 1: 1436 tokens are 6 blocks of 256, but there are 3"),
    ("no folder", ["--json", "nowhere/out.json"], "the folder nowhere is not there; make it first"),
    ("a folder", ["--report", "."], "cannot write .: it is a folder; give the name of a file"),
)


@pytest.mark.parametrize(("words", "sentence"), [one[1:] for one in BAD], ids=[one[0] for one in BAD])
def test_bad_input_is_one_sentence_and_code_2(
    command: Command, trace: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(trace.parent)
    said = command(trace, *words)
    assert said.code == 2 and said.out == ""
    assert said.err.startswith("kvstore: ") and sentence in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]


@pytest.mark.parametrize("words", [["--look-ahead", "-1"], ["--block-tokens", "0"], ["--seed", "x"]], ids=" ".join)
def test_options_have_bounds(command: Command, trace: Path, words: list[str]) -> None:
    said = command(trace, *words)
    assert said.code == 2 and words[0] in said.err and "Traceback" not in said.err


def test_a_bad_trace_is_one_sentence(command: Command, trace: Path) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in trace.read_text().splitlines()]
    del lines[7]["timestamp"]
    trace.write_text("\n".join(map(json.dumps, lines)))
    said = command(trace)
    assert said.code == 2 and f'{trace}, line 8: "timestamp" is missing' in said.err
