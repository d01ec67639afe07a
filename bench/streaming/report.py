"""The tables and the plot of what a cache of constant size costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table

COLOURS = (
    "#13877b",
    "#7fc2ba",
    "#c2412d",
    "#e0a096",
    "#101112",
    "#8a8b8c",
    "#2f56c4",
    "#93a9e6",
    "#d0943a",
    "#a05bc4",
)
LEANS = 0.1  # share of a layer's attention
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
}


def losses(result: dict[str, Any]) -> Table:
    """Every arm: its loss, how far it is from the first, and what the whole text took."""
    setting = result["setting"]
    shown = Table(
        title=f"{setting['tokens']:,} held-out tokens, {setting['context']} in the cache",
        caption=f"a token is a byte; ± is the standard error over slices of the text. {sinks(result)}",
    )
    shown.add_column("")
    for column in ("nats", "perplexity", "beside the first", "tokens/s"):
        shown.add_column(column, justify="right", no_wrap=True)
    for one in result["losses"]:
        beside = "" if one is result["losses"][0] else f"{one['apart']:+.4f} ± {one['apart_error']:.4f}"
        speed = f"{setting['tokens'] / one['seconds']:,.0f}"
        shown.add_row(one["arm"], f"{one['loss']:.4f}", f"{one['perplexity']:.3f}", beside, speed)
    return shown


def sinks(result: dict[str, Any]) -> str:
    """Whether the model leans on its first tokens at all: if not, a window without them loses nothing."""
    most = max(sum(layer) for layer in result["attention_to_first"])
    if most < LEANS:
        return f"The model has no sinks: its first tokens get at most {most:.1%} of a layer's attention."
    return f"The model has sinks: its first tokens get up to {most:.1%} of a layer's attention."


def attention(result: dict[str, Any]) -> Table:
    """How much of its attention each layer pays to the first tokens."""
    even = 1 / result["setting"]["context"]
    shown = Table(
        title="attention paid to the first tokens", caption=f"a token seen like any other gets about {even:.1%}"
    )
    shown.add_column("layer", justify="right")
    for token in range(len(result["attention_to_first"][0])):
        shown.add_column(f"token {token}", justify="right")
    for number, layer in enumerate(result["attention_to_first"]):
        shown.add_row(str(number), *(f"{share:.1%}" for share in layer))
    return shown


def decoding(result: dict[str, Any]) -> Table:
    """Time and memory along a long answer."""
    shown = Table(title="one answer of generate, greedy, in slices", caption="times are medians")
    for column in ("tokens", "per token", "in the model", "cache", "process"):
        shown.add_column(column, justify="right")
    for part in result["decoding"]:
        resident = part["resident_bytes"]
        shown.add_row(
            f"{part['tokens']:,}",
            f"{part['seconds'] * 1e3:.2f} ms",
            f"{part['model_seconds'] * 1e3:.2f} ms",
            f"{part['cache_bytes'] / 2**20:.2f} MiB",
            "" if resident is None else f"{resident / 2**20:.1f} MiB",
        )
    return shown


def plot(result: dict[str, Any], path: Path) -> None:
    """Losses along the text, and times along the answer, in a PNG file."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        along, times = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_losses(along, result["losses"], result["setting"])
        _draw_times(times, result["decoding"])
        figure.savefig(path, dpi=130)


def _draw_losses(axes: Axes, arms: Sequence[dict[str, Any]], setting: dict[str, Any]) -> None:
    tokens, context = setting["tokens"], setting["context"]
    count = len(arms[0]["slices"])
    places = [context + (tokens - context) * (number + 0.5) / count for number in range(count)]
    for arm, colour in zip(arms, COLOURS, strict=True):
        axes.plot(places, arm["slices"], color=colour, linewidth=1.3, label=f"{arm['arm']}: {arm['loss']:.3f}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("token of the text")
    axes.set_ylabel("loss, nats per byte")
    axes.legend(frameon=False, fontsize=7)


def _draw_times(axes: Axes, slices: Sequence[dict[str, Any]]) -> None:
    tokens = [part["tokens"] for part in slices]
    for key, colour, says in (
        ("seconds", "#101112", "generate"),
        ("model_seconds", "#13877b", "of which in the model"),
    ):
        axes.plot(tokens, [part[key] * 1e3 for part in slices], "o-", color=colour, markersize=4, label=says)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens generated")
    axes.set_ylabel("milliseconds per token, median")
    axes.legend(frameon=False, fontsize=8)
