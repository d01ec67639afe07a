"""The report's plots, as SVG that takes its colours from the page, so that one file reads well in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kvstore.bench.replay import Row
from kvstore.bench.timeline import LANES, Bar, lanes

Data = TypeVar("Data")

# Drawn in these, and handed to the page as var(--name).
PALETTE = {
    "ink": "#101112",
    "muted": "#707172",
    "grid": "#d0d1d2",
    "recompute": "#d0743a",
    "reuse": "#13877b",
    "device": "#7f9a21",
    "host": "#13877c",
    "disk": "#5b6fd0",
    "remote": "#a05bc4",
    "card": "#fdfefc",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from the log
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": PALETTE["grid"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.6,
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}
MOST_CONVERSATIONS = 24  # in the plot of their waiting
WIDE = 13.4  # inches of a plot that takes a whole row of the page; its letters are as large as those of the others
LANE_COLOURS = dict(zip(LANES, ("disk", "host", "recompute"), strict=True))
LABEL_POINTS = 5.6  # that a digit in a bar takes
THINNEST = 0.0015  # of the plot's width: a bar that can be seen


def drawn(draw: Callable[[Axes, Data], None], data: Data, height: float = 3.1, width: float = 6.4) -> str:
    """One plot as an inline <svg>."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": draw.__name__}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot(), data)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _inlined(buffer.getvalue(), draw.__name__)


def _inlined(svg: str, name: str) -> str:
    """The SVG without what only a file needs, with the page's colours and fonts, and ids that are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", svg)
    for colour, value in PALETTE.items():
        svg = svg.replace(value, f"var(--{colour})")
    return svg


def _legend(axes: Axes, **given: Any) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, handlelength=1.4, **given)


def ttft_by_length(axes: Axes, rows: Sequence[Row]) -> None:
    """Time to the first token against the length of the prompt, both ways, with running medians."""
    length = np.array([row.prompt_tokens for row in rows])
    for name, seconds in (
        ("recompute", [row.ttft_recompute for row in rows]),
        ("reuse", [row.ttft_reuse for row in rows]),
    ):
        values = np.array(seconds) * 1e3
        axes.scatter(length, values, s=14, color=PALETTE[name], alpha=0.45, linewidths=0)
        bins = np.array_split(np.argsort(length, kind="stable"), max(1, min(12, len(rows) // 4)))
        centres = [float(np.median(length[one])) for one in bins]
        axes.plot(centres, [float(np.median(values[one])) for one in bins], color=PALETTE[name], lw=2, label=name)
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("time to first token, ms")
    axes.set_ylim(bottom=0)
    _legend(axes)


def tokens_over_turns(axes: Axes, rows: Sequence[Row]) -> None:
    """Prompt tokens that were computed and that came from each tier, added up over the replay."""
    turns = np.arange(1, len(rows) + 1)
    tiers = sorted(
        {tier for row in rows for tier, tokens in row.tokens_by_tier.items() if tokens}, key=list(PALETTE).index
    )
    parts: dict[str, Any] = {"computed": np.cumsum([row.prompt_tokens - row.cached_tokens for row in rows])}
    for tier in tiers:
        parts[f"from {tier}"] = np.cumsum([row.tokens_by_tier.get(tier, 0) for row in rows])
    colours = [PALETTE["recompute"], *(PALETTE[tier] for tier in tiers)]
    axes.stackplot(turns, *parts.values(), labels=list(parts), colors=colours, alpha=0.85, linewidth=0)
    axes.set_xlabel("turn of the replay")
    axes.set_ylabel("prompt tokens, cumulative")
    axes.yaxis.set_major_formatter(_thousands)
    axes.set_xlim(1, max(2, len(rows)))
    _legend(axes)


def _thousands(value: float, _place: float = 0) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def ttft_distribution(axes: Axes, rows: Sequence[Row]) -> None:
    """Which share of the turns got their first token within a time."""
    for name, seconds in (
        ("recompute", [row.ttft_recompute for row in rows]),
        ("reuse", [row.ttft_reuse for row in rows]),
    ):
        values = np.sort(np.array(seconds)) * 1e3
        share = np.arange(1, len(values) + 1) / len(values)
        axes.step(values, share, where="post", color=PALETTE[name], lw=2, label=name)
        axes.fill_between(values, share, step="post", color=PALETTE[name], alpha=0.10, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.set_xlabel("time to first token, ms")
    axes.set_ylabel("share of turns")
    axes.set_ylim(0, 1.02)
    _legend(axes)


def waiting_by_conversation(axes: Axes, rows: Sequence[Row]) -> None:
    """Each conversation's time to first token, turn after turn: how long its user waited, both ways."""
    names = list(dict.fromkeys(row.conversation for row in rows))[:MOST_CONVERSATIONS]
    for place, name in enumerate(names):
        turns = [row for row in rows if row.conversation == name]
        for offset, arm, seconds in (
            (-0.19, "recompute", [row.ttft_recompute for row in turns]),
            (0.19, "reuse", [row.ttft_reuse for row in turns]),
        ):
            widths = np.array(seconds) * 1e3
            lefts = np.concatenate(([0.0], np.cumsum(widths)[:-1]))
            shades = [0.9 if turn % 2 == 0 else 0.6 for turn in range(len(turns))]
            for left, width, shade in zip(lefts, widths, shades, strict=True):
                axes.barh(place + offset, width, left=left, height=0.34, color=PALETTE[arm], alpha=shade, linewidth=0)
    axes.set_yticks(range(len(names)), [name if len(name) <= 24 else f"{name[:23]}…" for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("waiting for first tokens, ms, one segment a turn")
    handles = [Patch(color=PALETTE[arm], label=arm) for arm in ("recompute", "reuse")]
    _legend(axes, handles=handles)


def load_timeline(axes: Axes, timeline: dict[str, Any]) -> None:
    """What was done for each layer of one hit and when: a lane for each kind of work, a bar for each layer."""
    end = max(span["end_ms"] for span in timeline["spans"])
    middles, names, place = [], [], 0.0
    for kind, rows in lanes(timeline["spans"]):
        for row in rows:
            ends = [bar.begin for bar in row[1:]] + [end]
            for number, (bar, room) in enumerate(zip(row, ends, strict=True)):
                axes.barh(
                    place,
                    max(bar.end - bar.begin, THINNEST * end),
                    left=bar.begin,
                    height=0.86,
                    color=PALETTE[LANE_COLOURS[kind]],
                    alpha=0.95 if number % 2 == 0 else 0.76,
                    linewidth=0,
                )
                _number(axes, bar, place, room, end)
            place += 1
        middles.append(place - len(rows) / 2 - 0.5)
        names.append(kind)
        place += 0.45  # between lanes
    axes.set_yticks(middles, names)
    axes.tick_params(axis="y", labelcolor=PALETTE["ink"])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, end)
    axes.set_xlabel("ms since the first of this work began; numbers are layers")


def timeline_height(timeline: dict[str, Any]) -> float:
    """Inches that ``load_timeline`` needs."""
    return 0.9 + 0.34 * max(2, sum(len(rows) for _, rows in lanes(timeline["spans"])))


def _number(axes: Axes, bar: Bar, place: float, room: float, end: float) -> None:
    """The label of a bar: in it, or behind it when only there is room (which ends at ``room``), or nowhere."""
    points = axes.figure.get_figwidth() * 72 * 0.92 / end  # type: ignore[union-attr]
    needed = (LABEL_POINTS * len(bar.label) + 2) / points
    if bar.end - bar.begin >= needed:
        at, align, colour = (bar.begin + bar.end) / 2, "center", "card"
    elif room - bar.end >= 2 * needed:
        at, align, colour = bar.end + needed / 2, "left", "muted"
    else:
        return
    axes.text(at, place, bar.label, ha=align, va="center_baseline", fontsize=8.5, color=PALETTE[colour])
