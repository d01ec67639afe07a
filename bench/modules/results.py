"""What was measured, seed by seed, in a file that is written again after each: a long run can stop at any moment."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvstore.bench.environment import environment
from kvstore.errors import BadInput

MEASURES = ("recomputed", "all", "single", "overwritten", "alias")


@dataclass(frozen=True)
class Run:
    """One seed: scores of retrieval, what blending chose, the same through a store, losses of running text."""

    seed: int
    seconds: float
    scores: list[dict[str, Any]]
    choices: list[dict[str, Any]]
    served: list[dict[str, Any]]
    losses: list[dict[str, Any]]


@dataclass(frozen=True)
class Mean:
    """One arm at one share over all seeds, by measure; spreads are standard deviations, None for a single seed."""

    arm: str
    share: float
    means: dict[str, float]
    spreads: dict[str, float | None]


def finished(path: Path, setting: dict[str, Any]) -> list[Run]:
    """Runs of this setting that the file holds. Raises ``BadInput`` for a file of something else."""
    if not path.is_file():
        return []
    try:
        held = json.loads(path.read_text("utf-8"))
        runs = [Run(**run) for run in held["runs"]]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path} holds no results of this benchmark; give --json another name") from None
    return runs if held["setting"] == setting else []


def write(path: Path, setting: dict[str, Any], runs: Sequence[Run]) -> None:
    """All runs so far, and their means."""
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "setting": setting,
        "retrieval": [asdict(one) for one in means([run.scores for run in runs], MEASURES)],
        "choices": [asdict(one) for one in means([run.choices for run in runs], ("aliases", "aliases_found"))],
        "running_text": [asdict(one) for one in means([run.losses for run in runs], ("nats",))],
        "runs": [asdict(run) for run in runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    partial.replace(path)


def means(seeds: Sequence[Sequence[dict[str, Any]]], measures: Sequence[str]) -> list[Mean]:
    """Over seeds, in the order of the first one's arms."""
    found = []
    for rows in zip(*seeds, strict=True):
        columns = {measure: [float(row[measure]) for row in rows] for measure in measures}
        found.append(
            Mean(
                arm=rows[0].get("arm", "blend"),
                share=rows[0]["share"],
                means={name: statistics.mean(values) for name, values in columns.items()},
                spreads={name: statistics.stdev(values) if len(rows) > 1 else None for name, values in columns.items()},
            )
        )
    return found
