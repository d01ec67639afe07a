"""The report: one file that fetches nothing, with plots that take the page's colours, and a table for the terminal."""

import io
import itertools
import re
import threading
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from kvstore.adapters.transformers.timeline import COMPUTE, FETCH, LOAD, Span, Timeline
from kvstore.bench import plots, report, summary
from kvstore.bench.environment import environment
from kvstore.bench.replay import Row
from kvstore.bench.timeline import MOST_ROWS, Bar, Timed, lanes, overlap, packed
from kvstore.figures import seconds

PLAN = {
    "name": "fusedkv",
    "layers": 8,
    "stored_layers": 4,
    "token_bytes": 4096,
    "token_bytes_of_all_layers": 8192,
}
FETCHED = re.compile(r"""https?:|//[a-z]|\bsrc\s*=|<link|<script|@import|url\((?!#)|href="(?!#)""", re.IGNORECASE)


def rows(count: int, name: str = "chat") -> list[Row]:
    return [
        Row(
            conversation=f"{name} {place % 3}",
            turn=place // 3 + 1,
            prompt_tokens=100 * (place + 1),
            cached_tokens=90 * place,
            tokens_by_tier={"host": 60 * place, "disk": 30 * place},
            ttft_recompute=0.01 * (place + 1),
            ttft_reuse=0.002 + 0.0001 * place,
            tpot_recompute=0.002,
            tpot_reuse=0.0021,
            save_seconds=0.0005,
            logit_difference=1e-6,
            gaps=(),
            noise=2e-6,
        )
        for place in range(count)
    ]


def result(measured: list[Row], **changed: Any) -> dict[str, Any]:
    found = {
        "log": "chats.json",
        "model": "tiny",
        "settings": {"host": "1GiB", "interleave": False},
        "conversations": len({row.conversation for row in measured}),
        "turns": len(measured),
        "layer_plan": PLAN,
        "prompt_tokens": sum(row.prompt_tokens for row in measured),
        "cached_tokens": sum(row.cached_tokens for row in measured),
        "tokens_by_tier": summary.tokens_by_tier(measured),
        **summary.verdict(measured, 8),
        "ttft_seconds": {arm: summary.spread(getattr(row, f"ttft_{arm}") for row in measured) for arm in ARMS},
        "tpot_seconds": {arm: summary.spread(getattr(row, f"tpot_{arm}") for row in measured) for arm in ARMS},
        "save_seconds": summary.spread(row.save_seconds for row in measured),
        "bytes_by_tier": {"host": 7 << 20, "disk": 9 << 20},
        "bytes_held_by_tier": {"host": 5 << 20, "disk": 1 << 30},
        "counters": {"saved_tokens": 5},
        "environment": environment(),
        "timeline": None,
        "discovery": None,
        "rows": [vars(row) for row in measured],
    }
    return found | changed


ARMS = ("recompute", "reuse")


class Balanced(HTMLParser):
    """Notes the elements that are open, and complains of one that closes another."""

    VOID = ("meta", "br", "hr", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("count", [1, 2, 30])
def test_the_page_needs_nothing_but_itself(count: int) -> None:
    measured = rows(count)
    page = report.html(result(measured), measured)
    assert FETCHED.findall(page) == []
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert f"{count} turns of" in parser.text and "equal" in parser.text
    assert len(re.findall("<svg", page)) == 4


def test_the_detector_of_fetches_finds_them() -> None:
    planted = ['<img src="x">', "<a href='https://x'>", "@import 'x'", "url(x.png)", '<link rel="x">', 'href="/x"']
    assert [one for one in planted if not FETCHED.search(one)] == []


def test_plots_take_their_colours_from_the_page() -> None:
    measured = rows(12)
    drawings = [plots.drawn(draw, measured) for draw, _, _ in report.PLOTS]
    ids = [one for svg in drawings for one in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in drawings:
        ET.fromstring(svg.replace("xlink:href", "href"))
        assert "var(--recompute)" in svg
        assert not any(colour in svg for colour in plots.PALETTE.values())
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= plots.PALETTE.keys()
        referred = set(re.findall(r'(?:xlink:href="|url\()#([^")]*)', svg))
        assert referred <= set(re.findall(r'\bid="([^"]*)"', svg))


def test_every_tier_has_a_colour_on_the_page() -> None:
    measured = rows(6)
    for row in measured:
        row.tokens_by_tier["device"] = 5
    page = report.html(result(measured), measured)
    assert "from device" in page
    for colour in plots.PALETTE:
        assert len(re.findall(rf"--{colour}: #", page)) == 2, f"{colour} in light and in dark"


def test_plots_are_the_same_in_every_run() -> None:
    measured = rows(12)
    assert plots.drawn(plots.ttft_by_length, measured) == plots.drawn(plots.ttft_by_length, measured)


def test_names_from_the_log_are_only_names() -> None:
    measured = rows(6, name="<script>alert(1)</script> $\\frac{ & " + "x" * 60)
    page = report.html(result(measured, log="<b>log</b>"), measured)
    assert "<script" not in page and "<b>" not in page


def test_what_is_wrong_is_said() -> None:
    measured = rows(6)
    page = report.html(result(measured, tokens_equal=False, tokens_different=3), measured)
    assert "differ</p>" in page and "3 differ" in page
    shown = Console(file=io.StringIO(), width=100)
    shown.print(report.table(result(measured, tokens_equal=False, tokens_different=3)))
    assert "3 differ" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_the_tiers_that_there_are() -> None:
    measured = rows(6)
    shown = Console(file=io.StringIO(), width=100)
    shown.print(report.table(result(measured)))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    for part in ("6 turns of 3 conversations through tiny", "from host", "from disk", "1.0 GiB", "equal", "0 ties"):
        assert part in text
    assert re.search(r"bytes a token, fusedkv.* 4,096 .*50\.0%, 4 of 8 layers", text)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (2.5e-7, "0.25 µs"), (0.0123, "12.3 ms"), (3.0, "3 s"), (4000.0, "4,000 s")]
)
def test_times_are_in_a_unit_that_suits_them(value: float, text: str) -> None:
    assert seconds(value) == text


def spans(layers: int, load: float, compute: float, pause: float = 0.0) -> list[Span]:
    """Loads and computes, each one after the other; with a ``pause``, nothing is loaded while it is computed."""
    made, loaded, computed = [], 100.0, 100.0
    for layer in range(layers):
        begin = max(loaded, computed + pause) if pause else loaded
        loaded = begin + load
        start = max(loaded, computed)
        computed = start + compute
        made += [Span(LOAD, layer, begin, loaded), Span(COMPUTE, layer, start, computed)]
    return made


def test_overlap_is_the_share_of_loading_under_compute_of_earlier_layers() -> None:
    assert overlap(spans(4, load=1.0, compute=1.0)) == pytest.approx(3 / 4)  # the first has nothing to hide under
    assert overlap(spans(4, load=2.0, compute=1.0)) == pytest.approx(3 / 8)
    assert overlap(spans(4, load=1.0, compute=5.0)) == pytest.approx(3 / 4)
    half = [Span(FETCH, 1, 0.0, 2.0), Span(LOAD, 1, 2.0, 4.0), Span(COMPUTE, 0, 1.0, 3.0)]
    assert overlap(half) == pytest.approx(0.5)


def test_what_does_not_lie_under_an_earlier_compute_does_not_count() -> None:
    assert overlap(spans(4, load=1.0, compute=1.0, pause=0.5)) == 0.0
    own = [Span(LOAD, 1, 0.0, 1.0), Span(COMPUTE, 1, 0.0, 1.0), Span(COMPUTE, 2, 0.0, 1.0)]
    assert overlap(own) == 0.0
    twice = [Span(LOAD, 2, 0.0, 4.0), Span(COMPUTE, 0, 0.0, 2.0), Span(COMPUTE, 1, 1.0, 2.0)]
    assert overlap(twice) == pytest.approx(0.5)  # two computes at once hide a moment once
    assert overlap([]) == overlap([Span(COMPUTE, 0, 0.0, 1.0)]) == 0.0


def test_a_timeline_takes_spans_from_any_thread() -> None:
    timeline = Timeline()
    work = [threading.Thread(target=lambda n=n: timeline.add(LOAD, n, float(-n), 1.0)) for n in range(8)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert [span.layer for span in timeline.spans()] == list(range(7, -1, -1))


def timed(layers: int) -> dict[str, Any]:
    return Timed("chat 1", 3, 12_345, spans(layers, load=1e-3, compute=2e-3)).as_json()


@pytest.mark.parametrize("layers", [1, 12, 80])
def test_the_page_shows_the_timeline_of_a_load(layers: int) -> None:
    measured = rows(6)
    page = report.html(result(measured, timeline=timed(layers)), measured)
    assert FETCHED.findall(page) == []
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and len(re.findall("<svg", page)) == 5
    assert f"{layers} ms beside {2 * layers} ms of compute, {(layers - 1) / layers:.0%} of it hidden" in parser.text
    svg = plots.drawn(plots.load_timeline, timed(layers))
    ET.fromstring(svg.replace("xlink:href", "href"))
    assert not any(colour in svg for colour in plots.PALETTE.values())
    labels = set(re.findall(r">(\d+)</text>", plots.drawn(plots.load_timeline, timed(layers), width=plots.WIDE)))
    assert layers > 12 or {str(layer) for layer in range(layers)} <= labels  # with room, every bar has its number


def test_bars_that_overlap_get_rows_of_their_own() -> None:
    found = packed([Bar("", begin, end) for begin, end in [(0, 3), (1, 2), (2, 4), (3, 5)]])
    assert [[(bar.begin, bar.end) for bar in row] for row in found] == [[(0, 3), (3, 5)], [(1, 2), (2, 4)]]
    many = packed([Bar(str(layer), 0.0, layer + 1.0) for layer in range(40)])
    assert len(many) == MOST_ROWS and sum(map(len, many)) == 40
    assert all(one.end <= other.begin for row in many for one, other in itertools.pairwise(row))


def test_layers_that_came_together_are_one_bar() -> None:
    together = [{"kind": FETCH, "layer": layer, "begin_ms": 0.0, "end_ms": 2.0} for layer in range(8)]
    alone = {"kind": FETCH, "layer": 8, "begin_ms": 2.0, "end_ms": 3.0}
    assert lanes([*together, alone]) == [(FETCH, [[Bar("0–7", 0.0, 2.0), Bar("8", 2.0, 3.0)]])]
