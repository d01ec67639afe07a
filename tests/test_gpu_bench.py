"""The GPU's benchmark on a machine without one: the same code at small sizes, Triton's kernel in its interpreter."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from kvstore.bench.gpu import exactness, waits
from kvstore.bench.gpu.__main__ import measured
from kvstore.bench.gpu.setting import Figure, Setting
from kvstore.tensors.plain import transfer
from kvstore.tensors.rope import Turn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command wrote; the interpreter has to be chosen before Triton is imported, so it runs apart."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "kvstore.bench.gpu", "--device", "cpu", "--small", "--json", str(path)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.soak
def test_every_part_runs_and_is_correct(result: dict[str, Any]) -> None:
    assert result["failed"] == []
    answers = {
        name: figure["value"]
        for part in result["parts"].values()
        for name, figure in part.items()
        if isinstance(figure["value"], bool)
    }
    assert set(answers.values()) == {True}
    assert {"bit_equal", "host_load_bit_equal", "fails_without_waits", "fused_decode_near_reference"} <= answers.keys()


@pytest.mark.soak
def test_the_file_says_where_it_was_measured(result: dict[str, Any]) -> None:
    environment = result["environment"]
    assert environment["small"] and environment["date"] and environment["device"]
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.soak
def test_figures_have_no_goals_on_a_small_machine(result: dict[str, Any]) -> None:
    goals = [figure["goal"] for part in result["parts"].values() for figure in part.values()]
    assert goals and set(goals) == {None}


def test_a_goal_is_met_or_not() -> None:
    assert Figure("ratio", 0.91, goal=0.9).met and not Figure("ratio", 0.89, goal=0.9).met
    assert Figure("ratio", 1.1, goal=1.15, at_most=True).met and not Figure("ratio", 1.2, goal=1.15, at_most=True).met
    assert Figure("ratio", 1.0).met is None and Figure("equal", False).met is False


def test_a_kernel_that_is_wrong_is_noticed() -> None:
    def wrong(runs: Any, turn: Turn | None, target: Any) -> None:
        transfer(runs, turn, target)
        target.keys[0, 0, -1] += 1

    def idle(runs: Any, turn: Turn | None, target: Any) -> None:
        pass

    for kernel, right in ((transfer, True), (wrong, False), (idle, False)):
        figures = {figure.name: figure.value for figure in exactness.compared(Setting(CPU, small=True), kernel)}
        assert figures["bit_equal"] is right


def test_a_part_that_breaks_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfACompiler(Exception):
        pass

    def breaks(setting: Setting) -> Iterator[Figure]:
        yield Figure("before", 1.0)
        raise OfACompiler("no such instruction\nand more")

    monkeypatch.setattr(waits, "measure", breaks)
    setting = Setting(CPU, small=True)
    figures, failed = measured(setting, ["waits", "exactness"], Console(file=io.StringIO()))
    assert failed == ["waits"] and [figure.name for figure in figures["waits"]] == ["before"] and figures["exactness"]
    assert "waits: failed, OfACompiler: no such instruction" in setting.notes


def test_the_stress_finds_missing_waits_and_only_those() -> None:
    figures = {figure.name: figure.value for figure in waits.measure(Setting(CPU, small=True))}
    assert figures["no_wrong_read_with_waits"] and figures["fails_without_waits"]
