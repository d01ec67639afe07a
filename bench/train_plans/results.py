"""Finished runs in a file, one a line, so that a long comparison can stop at any moment and go on later."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.bench.train_plans.arms import ARMS

RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Run:
    """One arm trained from one seed. ``setting`` is all else that the losses depend on."""

    arm: str
    seed: int
    setting: dict[str, Any]
    parameters: int
    cached_numbers: int  # in the cache, a token
    curve: list[dict[str, Any]]

    @property
    def loss(self) -> float:
        """Validation loss at the end, nats per token."""
        return float(self.curve[-1]["validation"])


@dataclass(frozen=True)
class Standing:
    """An arm over all its seeds. Spreads are standard deviations over seeds; None for a single one."""

    arm: str
    parameters: int
    cache: float  # as a share of the standard plan's
    losses: list[float]
    mean: float
    spread: float | None
    apart: float | None  # mean difference to the standard plan, seed by seed
    apart_spread: float | None


def finished(folder: Path, setting: dict[str, Any]) -> dict[tuple[str, int], Run]:
    """Runs of this setting that the folder holds."""
    path = folder / RUNS
    if not path.is_file():
        return {}
    runs = []
    for line in path.read_text("utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # a line that a crash cut short
            runs.append(Run(**json.loads(line)))
    return {(run.arm, run.seed): run for run in runs if run.setting == setting}


def append(folder: Path, run: Run) -> None:
    """Adds a finished run, on a line of its own whatever was there before."""
    path = folder / RUNS
    cut_short = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(vars(run)) + "\n")


def standings(runs: Sequence[Run]) -> list[Standing]:
    """Every arm that was run, in the order of ``ARMS``."""
    by_arm = {arm: {run.seed: run for run in runs if run.arm == arm} for arm in ARMS}
    standard = by_arm["standard"]
    made = []
    for arm, mine in by_arm.items():
        if not mine:
            continue
        losses = [mine[seed].loss for seed in sorted(mine)]
        apart = [mine[seed].loss - standard[seed].loss for seed in sorted(mine) if seed in standard]
        first = next(iter(mine.values()))
        whole = next(iter(standard.values()), first).cached_numbers
        made.append(
            Standing(
                arm=arm,
                parameters=first.parameters,
                cache=first.cached_numbers / whole,
                losses=losses,
                mean=statistics.mean(losses),
                spread=_spread(losses),
                apart=statistics.mean(apart) if apart else None,
                apart_spread=_spread(apart),
            )
        )
    return made


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
