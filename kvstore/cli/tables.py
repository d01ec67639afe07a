"""Tables that several commands show: tiers, sessions, segments. All text in them that somebody else chose is tame."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvstore.figures import plain, size, span

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore.segments import Segment

TIERS = ("device", "host", "disk", "remote")
WIDE = 160  # columns, where nobody looks on: text that is piped need not be folded
ROOMY = 130  # columns that are enough for all that segments have
BAR = 24
NARROW = 16  # letters of a name


def console() -> Console:
    """Where tables go."""
    made = Console()
    return made if made.is_terminal else Console(width=max(WIDE, made.width))


def table(title: str, *columns: str, numbers: int = 0) -> Table:
    """An empty table; the last ``numbers`` columns stand right."""
    drawn = Table(box=None, pad_edge=False, header_style="dim", show_header=any(columns))
    if title:
        drawn.title, drawn.title_justify, drawn.title_style = title, "left", "bold"
    for place, column in enumerate(columns):
        right = place >= len(columns) - numbers
        drawn.add_column(column, justify="right" if right else "left", overflow="fold")
    return drawn


def tiers(stats: Mapping[str, Any]) -> Table:
    """How full each tier is, and what it gave."""
    drawn = table("tiers", "tier", "", "used", "of", "blocks", "payload", "tokens found", "of asked", numbers=6)
    counters = stats["counters"]
    asked = counters.get("asked_tokens", 0)
    for tier in TIERS:
        numbers = stats["tiers"].get(tier)
        if numbers is None:
            continue
        found, capacity = counters.get(f"{tier}_hit_tokens", 0), numbers["capacity"]
        drawn.add_row(
            tier,
            ProgressBar(max(capacity, 1), numbers["used"], width=BAR) if capacity else "",
            size(numbers["used"]),
            size(capacity) if capacity else "no bound",
            f"{numbers['blocks']:,}",
            size(numbers["bytes"]),
            f"{found:,}",
            f"{found / asked:.1%}" if asked else "",
        )
    return drawn


def sessions(found: Sequence[Mapping[str, Any]]) -> Table:
    """Who is connected, and holds what."""
    names = ("session", "process", "user", "connected", "holds", "drafts", "staging")
    drawn, now = table("sessions", *names, numbers=4), time.time()
    for one in found:
        held = f"{one['leases']:,} matches" if one["leases"] else ""
        drafts, staged = f"{one['drafts']:,}" if one["drafts"] else "", one["staged_bytes"]
        who = "this one" if one["own"] else str(one["id"])
        since = span(now - one["since"])
        drawn.add_row(who, str(one["pid"]), str(one["uid"]), since, held, drafts, size(staged) if staged else "")
    return drawn


def segments(found: Iterable[Segment], width: int, title: str = "segments") -> Table:
    """What is stored. A narrow terminal gets fewer columns, rather than folded ones."""
    columns: list[tuple[str, Callable[[Segment], RenderableType]]] = [
        ("tokens", lambda one: f"{one.tokens:,}"),
        ("after", lambda one: f"{one.start:,}" if one.start else ""),
        ("bytes", lambda one: size(one.bytes)),
        ("uses", lambda one: f"{one.uses:,}"),
        ("used", lambda one: span(now - one.last_use)),
    ]
    if width >= ROOMY:
        columns += [
            ("served", lambda one: f"{one.served:,}"),
            ("age", lambda one: span(now - one.created)),
            ("expires", lambda one: f"in {span(one.expires - now)}" if one.expires else ""),
        ]
    now, names = time.time(), ("id", "tenant", "owner", "in")
    drawn = table(title, *names, *(column for column, _ in columns), numbers=len(columns))
    for column in drawn.columns:
        column.no_wrap = True
    for one in found:
        places = " ".join([*(f"{tier} {count}" for tier, count in one.blocks.items()), *["pinned"] * one.pinned])
        drawn.add_row(one.id, name(one.tenant), name(one.owner), places, *(show(one) for _, show in columns))
    return drawn


def name(text: str) -> Text:
    """Somebody's name, as it can be shown."""
    shown = plain(text)
    return Text(shown if len(shown) <= NARROW else f"{shown[: NARROW - 1]}…")
