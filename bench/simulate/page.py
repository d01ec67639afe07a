"""The page of a sweep: hit ratios against capacity, in one HTML file that needs nothing but itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kvstore.bench.simulate import summary
from kvstore.bench.simulate.sweep import MINIMUM

FOLDER, TEMPLATE = Path(__file__).parent, "report.html.j2"
DEFAULT = "default"
COLOURS = 10  # of lines, beside those of the default and of the optimum; the page defines them
# A plot and the part of it inside the axes, in the units of its viewBox.
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 44, 626, 12, 314
MOST_TICKS = 7
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


@dataclass(frozen=True)
class Mark:
    """A place along an axis, or a result, with what is said of it."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """One policy, from the smallest capacity to the largest."""

    policy: str
    style: str  # a class of the page's
    marks: list[Mark]


@dataclass(frozen=True)
class Plot:
    """Lines over capacities on a logarithmic axis."""

    title: str
    note: str
    lines: list[Line]
    across: list[Mark]
    up: list[Mark]


def html(result: dict[str, Any]) -> str:
    """The whole page of a ``summary.summarize``."""
    loader = FileSystemLoader([FOLDER, FOLDER.parent])  # what both kinds of pages share is above
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters.update(percent=summary.percent, duration=summary.duration)
    hits = "share of all prompt tokens that need not be computed, %"
    shares = "share of the hits that the optimum has, %"
    return environment.get_template(TEMPLATE).render(
        result=result,
        rows=summary.grid(result),
        facts=summary.facts(result),
        colours=COLOURS,
        size=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        plots=[
            plot(result, "token_hit_ratio", "Token hits", hits, from_zero=True),
            plot(result, "share_of_min", "Token hits against the optimum's", shares, from_zero=False),
        ],
    )


def plot(result: dict[str, Any], key: str, title: str, note: str, from_zero: bool) -> Plot:
    """One figure of all results against capacity, both in percent."""
    capacities = sorted({one["capacity"] for one in result["results"]})
    low, high = math.log(capacities[0]), math.log(capacities[-1])
    values = [100 * one[key] for one in result["results"]]
    ticks = _ticks(0.0 if from_zero else min(values), max(values))

    def x(capacity: float) -> float:
        share = (math.log(capacity) - low) / (high - low) if high > low else 0.5
        return round(LEFT + 8 + share * (RIGHT - LEFT - 16), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (BOTTOM - TOP), 1)

    lines = []
    for policy, row in summary.grid(result).items():
        marks = [Mark(x(one["capacity"]), y(100 * one[key]), _said(one, key)) for one in row]
        lines.append(Line(policy, _style(policy, result), marks))
    lines.sort(key=lambda line: line.policy == DEFAULT)  # drawn last, over the others
    across = [Mark(x(capacity), BOTTOM, summary.percent(capacity)) for capacity in capacities]
    return Plot(title, note, lines, across, [Mark(LEFT, y(tick), f"{tick:g}") for tick in ticks])


def _said(one: dict[str, Any], key: str) -> str:
    return f"{one['policy']} at {summary.percent(one['capacity'])}: {100 * one[key]:.2f}%"


def _style(policy: str, result: dict[str, Any]) -> str:
    if policy in (DEFAULT, MINIMUM):
        return policy
    others = [name for name in summary.grid(result) if name not in (DEFAULT, MINIMUM)]
    return f"line-{others.index(policy) % COLOURS}"


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers around these, not many."""
    for step in STEPS:
        first, last = math.floor(least / step), max(math.ceil(most / step), math.floor(least / step) + 1)
        if last - first < MOST_TICKS:
            break
    return [round(step * number, 1) for number in range(first, last + 1)]
