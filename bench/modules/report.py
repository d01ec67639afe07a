"""The tables and the plot of what reuse of documents loses and wins back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from kvstore.bench.modules.results import MEASURES, Mean, Run, means
from kvstore.bench.train_plans.report import STYLE

COLOURS = {"blend": "#c2412d", "random": "#8a8b8c"}
MARKS = {"modular": ("s", "#101112"), "not re-encoded": ("x", "#101112"), "tuned": ("o", "#13877b")}
MARKS["tuned, links"] = ("^", "#2f56c4")


def retrieval(runs: Sequence[Run], title: str) -> Table:
    """Shares of right answers, by arm and kind of query."""
    shown = Table(title=title, caption="right answers; anew: tokens recomputed; ±: over seeds")
    shown.add_column("arm", no_wrap=True)
    for name in ("anew", *MEASURES[1:]):
        shown.add_column(name, justify="right")
    for one in means([run.scores for run in runs], MEASURES):
        cells = (_measured(one, name, 3, spread=name in ("all", "alias")) for name in MEASURES[1:])
        shown.add_row(named(one), f"{one.means['recomputed']:.0%}", *cells)
    return shown


def running_text(runs: Sequence[Run]) -> Table:
    """Losses and perplexities of the last segment."""
    shown = Table(title="running text, last segment", caption="per byte; perplexity is that of the mean loss")
    shown.add_column("arm", no_wrap=True)
    for column in ("nats", "perplexity"):
        shown.add_column(column, justify="right")
    for one in means([run.losses for run in runs], ("nats",)):
        perplexity = f"{math.exp(one.means['nats']):.3f}"
        shown.add_row(named(one), _measured(one, "nats", 4), perplexity)
    return shown


def named(one: Mean) -> str:
    """An arm, with its share where it has several."""
    return f"{one.arm} {one.share:.0%}" if one.arm in COLOURS else one.arm


def _measured(one: Mean, name: str, digits: int, spread: bool = True) -> str:
    over_seeds = one.spreads[name] if spread else None
    return f"{one.means[name]:.{digits}f}" + ("" if over_seeds is None else f"±{over_seeds:.{digits}f}")


def plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Right answers over the share that is recomputed, of all queries and of aliases, in a PNG file."""
    found = means([run.scores for run in runs], MEASURES)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        whole, aliases = figure.subplots(1, 2)
        _draw(whole, found, "all", "all queries")
        _draw(aliases, found, "alias", "queries of aliases")
        whole.legend(frameon=False, fontsize=8, loc="lower right")
        figure.suptitle(title)
        figure.savefig(path, dpi=130)


def _draw(axes: Axes, found: Sequence[Mean], measure: str, title: str) -> None:
    ends = {one.arm: one for one in found if one.arm in ("full", "modular")}
    for arm, colour in COLOURS.items():
        line = [ends["modular"], *(one for one in found if one.arm == arm), ends["full"]]
        shares, values = [100 * one.means["recomputed"] for one in line], [one.means[measure] for one in line]
        axes.errorbar(
            shares,
            values,
            [one.spreads[measure] or 0.0 for one in line],
            color=colour,
            marker=".",
            capsize=2,
            label=arm,
        )
    axes.axhline(ends["full"].means[measure], color="#101112", linewidth=0.8, linestyle="--", label="full recompute")
    for one in found:
        if one.arm in MARKS:
            mark, colour = MARKS[one.arm]
            axes.plot(0, one.means[measure], mark, color=colour, markersize=6, label=one.arm)
    axes.set_xlabel("% of the documents' tokens recomputed")
    axes.set_ylabel(f"right answers, {title}")
