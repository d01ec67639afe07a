"""How much of a load is hidden: the spans of one hit, the share of loading under compute, and their JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.adapters.transformers.timeline import COMPUTE, FETCH, LOAD, Span

LANES = (FETCH, LOAD, COMPUTE)
MOST_ROWS = 4  # of a lane


@dataclass(frozen=True)
class Timed:
    """The spans of one turn. Holds no token and no text."""

    conversation: str
    turn: int
    cached_tokens: int
    spans: Sequence[Span]

    def as_json(self) -> dict[str, Any]:
        """Spans in milliseconds from the first one's begin, with the share of loading under compute.

        ``loading_ms`` and ``compute_ms``: how long at least one layer was fetched or loaded, and computed.
        """
        start = min(span.begin for span in self.spans)
        whole = Span("", 0, start, max(span.end for span in self.spans))
        computing = [span for span in self.spans if span.kind == COMPUTE]
        loading = [span for span in self.spans if span.kind != COMPUTE]
        return {
            "conversation": self.conversation,
            "turn": self.turn,
            "cached_tokens": self.cached_tokens,
            "overlap": overlap(self.spans),
            "loading_ms": covered(whole, loading) * 1e3,
            "compute_ms": covered(whole, computing) * 1e3,
            "spans": [
                {
                    "kind": span.kind,
                    "layer": span.layer,
                    "begin_ms": (span.begin - start) * 1e3,
                    "end_ms": (span.end - start) * 1e3,
                }
                for span in self.spans
            ],
        }


def overlap(spans: Iterable[Span]) -> float:
    """The share of all fetching and loading that happened while the model computed an earlier layer; 0 without any."""
    listed = list(spans)
    total = hidden = 0.0
    for span in listed:
        if span.kind == COMPUTE:
            continue
        total += span.end - span.begin
        earlier = [other for other in listed if other.kind == COMPUTE and other.layer < span.layer]
        hidden += covered(span, earlier)
    return hidden / total if total else 0.0


def covered(span: Span, others: Iterable[Span]) -> float:
    """Seconds of ``span`` during which at least one of ``others`` was under way."""
    seconds, reached = 0.0, span.begin
    for other in sorted(others, key=lambda other: other.begin):
        begin, end = max(other.begin, reached), min(other.end, span.end)
        if begin < end:
            seconds, reached = seconds + end - begin, end
    return seconds


@dataclass(frozen=True)
class Bar:
    """What a timeline shows of one span, or of layers that came together; in milliseconds."""

    label: str
    begin: float
    end: float


def lanes(spans: Sequence[dict[str, Any]]) -> list[tuple[str, list[list[Bar]]]]:
    """The spans of a JSON timeline as bars: for each kind of work that there was, one row or several."""
    found = []
    for kind in LANES:
        layers: dict[tuple[float, float], list[int]] = {}
        for span in spans:
            if span["kind"] == kind:
                layers.setdefault((span["begin_ms"], span["end_ms"]), []).append(span["layer"])
        if layers:
            found.append((kind, packed([Bar(_label(which), *times) for times, which in layers.items()])))
    return found


def _label(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{min(layers)}–{max(layers)}"


def packed(bars: Iterable[Bar]) -> list[list[Bar]]:
    """Bars in as few rows as they fit in without covering each other; past ``MOST_ROWS``, begins are cut instead."""
    rows: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: (bar.begin, bar.end)):
        free = next((row for row in rows if row[-1].end <= bar.begin), None)
        if free is None and len(rows) < MOST_ROWS:
            rows.append([bar])
            continue
        row = free if free is not None else min(rows, key=lambda row: row[-1].end)
        row.append(Bar(bar.label, max(bar.begin, row[-1].end), max(bar.end, row[-1].end)))
    return rows
