"""``kvstore top``."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli.target import AsJson, Target, daemon
from kvstore.cli.terminal import seconds_of
from kvstore.errors import BadInput, Unreachable
from kvstore.figures import size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from kvstore.daemon.operator import About, Operator
    from kvstore.segments import Segment

HELP = """
Watch a daemon: what it gives and takes a second, how full its tiers are, what is used most, and who is connected.

* `kvstore top cache` watches the daemon of the directory `cache`, until Ctrl-C;

* `kvstore top unix:/run/kvstore.sock --interval 5s` looks every five seconds;

* `kvstore top --once` looks for one interval, prints that and ends.
"""

LEAST = 0.1  # seconds between two looks
ROWS = 10  # segments that are shown
SPARED = 20  # looking at segments may take this part of the time
BY_TIER = ("hit_tokens", "read_bytes", "written_bytes", "evicted_blocks")


@dataclass(frozen=True)
class Look:
    """What was seen at one moment (``time.monotonic``): ``rates`` since the last look, what is used most."""

    at: float
    about: About
    stats: Mapping[str, Any]
    rates: Mapping[str, float]
    segments: Sequence[Segment]


class Watch:
    """Looks at a daemon again and again."""

    def __init__(self, client: Operator) -> None:
        self._client, self._next = client, 0.0  # when segments are to be looked at again
        self._last = Look(time.monotonic(), client.about(), client.stats(), {}, ())

    def look(self) -> Look:
        """What is there, and what happened since the last time. Raises ``Unreachable``."""
        last, at = self._last, time.monotonic()
        about, stats, segments = self._client.about(), self._client.stats(), last.segments
        same = last.about.epoch == about.epoch  # or else it began anew, and so did its counters
        if at >= self._next or not same:
            begin = time.monotonic()
            segments = self._client.segments(ROWS)
            self._next = begin + SPARED * (time.monotonic() - begin)
        happened = rates(last.stats if same else None, stats, at - last.at)
        self._last = Look(at, about, stats, happened, segments)
        return self._last


def drawn(look: Look, width: int) -> RenderableType:
    """For people, in so many columns."""
    from rich.console import Group
    from rich.text import Text

    from kvstore.cli import status, tables

    wrong = status.troubles(look.stats)
    parts: list[RenderableType] = [
        Text(status.headline(look.about)),
        lively(look.rates),
        tables.tiers(look.stats),
        tables.segments(look.segments, width, "used most"),
        tables.sessions(look.about.sessions),
    ]
    if wrong:
        parts.append(Text(f"worth a look: {wrong}", "yellow"))
    return Group(*(one for part in parts for one in (part, "")))


def line(look: Look) -> str:
    """For machines: one line of JSON."""
    segments, sessions = [asdict(one) for one in look.segments], [dict(one) for one in look.about.sessions]
    said = {"at": time.time(), "epoch": look.about.epoch, "rates": look.rates, "tiers": look.stats["tiers"]}
    return json.dumps({**said, "segments": segments, "sessions": sessions})


def rates(before: Mapping[str, Any] | None, now: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """What each counter gained in a second; nothing, where there is nothing to compare with."""
    if before is None:
        return {}
    was = before["counters"]
    return {name: max(count - was.get(name, 0), 0) / seconds for name, count in now["counters"].items()}


def lively(happened: Mapping[str, float]) -> RenderableType:
    """Rates, by tier where there is one."""
    from kvstore.cli import tables

    drawn = tables.table("a second", "tier", "tokens found", "read", "written", "evicted blocks", numbers=4)
    for tier in tables.TIERS:
        cells = [happened.get(f"{tier}_{what}", 0.0) for what in BY_TIER]
        if tier in ("host", "disk") or any(cells):
            found, read, written, evicted = cells
            drawn.add_row(tier, f"{found:,.0f}", size(read), size(written), f"{evicted:,.1f}")
    asked, saved = happened.get("asked_tokens", 0.0), happened.get("saved_tokens", 0.0)
    drawn.caption = f"{asked:,.0f} tokens asked for, {saved:,.0f} saved ({size(happened.get('saved_bytes', 0.0))})"
    drawn.caption_justify = "left"
    return drawn


def top(
    target: Target = "",
    interval: Annotated[str, typer.Option(help="Between two looks: 2s, 500ms.")] = "2s",
    once: Annotated[bool, typer.Option("--once", help="One look, printed.")] = False,
    as_json: AsJson = False,
) -> None:
    from kvstore.cli import tables

    period = seconds_of(interval, "--interval")
    if period < LEAST:
        raise BadInput(f"--interval {interval} is too short; give {LEAST:g}s or more")
    pause, console = threading.Event(), tables.console()
    with quiet(), daemon(target) as found:
        watch = Watch(found)
        try:
            pause.wait(period)
            if once:
                look = watch.look()
                print(line(look)) if as_json else console.print(drawn(look, console.width), highlight=False)
            elif console.is_terminal and not as_json:
                _live(watch, pause, period, console)
            else:
                _printed(watch, pause, period, as_json)
        except KeyboardInterrupt:
            pass


@contextmanager
def quiet() -> Iterator[None]:
    """What the client logs of a daemon that goes is shown, and not to be written across the screen."""
    log, nothing = logging.getLogger("kvstore"), logging.NullHandler()
    log.addHandler(nothing)
    try:
        yield
    finally:
        log.removeHandler(nothing)


def _live(watch: Watch, pause: threading.Event, period: float, console: Console) -> None:
    """In one place, until Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                shown = drawn(watch.look(), console.width)
            except Unreachable as error:
                shown = Text(f"{error}; looking again", "red")
            live.update(shown, refresh=True)
            pause.wait(period)


def _printed(watch: Watch, pause: threading.Event, period: float, as_json: bool) -> None:
    """One after the other, until Ctrl-C."""
    from kvstore.cli import tables

    console = tables.console()
    while True:
        try:
            look = watch.look()
            print(line(look), flush=True) if as_json else console.print(drawn(look, console.width), highlight=False)
        except Unreachable as error:
            print(f"kvstore: {error}; looking again", file=sys.stderr, flush=True)
        pause.wait(period)
