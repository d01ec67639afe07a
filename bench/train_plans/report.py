"""The table and the plot of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table

from kvstore.bench.train_plans.results import Run, Standing, standings

COLOURS = ("#101112", "#8a8b8c", "#c2412d", "#d0943a", "#13877b", "#a05bc4", "#2f56c4")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
}


def table(found: Sequence[Standing], title: str) -> Table:
    """Every arm: its cache, parameters, loss, and how far that is from the standard plan's."""
    shown = Table(title=title, caption="validation loss in nats per byte; ± is the standard deviation over seeds")
    shown.add_column("plan", no_wrap=True)
    for column in ("cache", "parameters", "validation loss", "beside standard"):
        shown.add_column(column, justify="right")
    best = min(standing.mean for standing in found)
    for standing in found:
        loss = _measured(standing.mean, standing.spread, "")
        shown.add_row(
            standing.arm,
            f"{standing.cache:.0%}",
            f"{standing.parameters:,}",
            f"[bold]{loss}[/]" if standing.mean == best else loss,
            "" if standing.arm == "standard" else _measured(standing.apart, standing.apart_spread, "+"),
        )
    return shown


def _measured(value: float | None, spread: float | None, sign: str) -> str:
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Curves of the mean validation loss, and where each seed ended, in a PNG file."""
    found = standings(runs)
    colours = dict(zip([standing.arm for standing in found], COLOURS, strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        curves, ends = figure.subplots(1, 2)
        _draw_curves(curves, runs, colours)
        _draw_ends(ends, found, colours)
        figure.suptitle(title)
        figure.savefig(path, dpi=130)


def _draw_curves(axes: Axes, runs: Sequence[Run], colours: dict[str, str]) -> None:
    lowest, top = [], []
    for arm, colour in colours.items():
        curves = [run.curve for run in runs if run.arm == arm]
        points = list(zip(*curves, strict=False))
        tokens = [point[0]["tokens"] for point in points]
        losses = [statistics.mean(one["validation"] for one in point) for point in points]
        axes.plot(tokens, losses, color=colour, linewidth=1.4, label=arm)
        lowest.append(min(losses))
        top.append(losses[min(len(losses) - 1, len(losses) // 4)])
    axes.set_ylim(min(lowest) - 0.03, max(top) + 0.03)  # the first quarter falls too steeply to show the rest
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens read")
    axes.set_ylabel("validation loss, mean over seeds")
    axes.legend(frameon=False, fontsize=8)


def _draw_ends(axes: Axes, found: Sequence[Standing], colours: dict[str, str]) -> None:
    for place, standing in enumerate(reversed(found)):
        colour = colours[standing.arm]
        axes.plot(standing.losses, [place] * len(standing.losses), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot([standing.mean] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(found)), [f"{one.arm}\n{one.cache:.0%} cache" for one in reversed(found)], fontsize=8)
    axes.set_xlabel("validation loss at the end; dots are seeds, bars their mean")
