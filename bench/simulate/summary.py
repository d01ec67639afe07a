"""What a sweep found, as JSON has it and as one table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvstore.bench.simulate.requests import Trace
from kvstore.bench.simulate.sweep import MINIMUM, Outcome

MINUTE, HOUR = 60, 3600


def summarize(trace: Trace, outcomes: Iterable[Outcome], policies: Sequence[str]) -> dict[str, Any]:
    """The figures of these policies, and their shares of the optimum, which is among the outcomes at every capacity."""
    ordered = sorted(outcomes, key=lambda one: (one.job.policy, one.job.capacity))
    best = {one.job.capacity: one.token_hit_ratio for one in ordered if one.job.policy == MINIMUM}
    job = ordered[0].job
    return {
        "trace": {
            "name": trace.name,
            "format": trace.format,
            "block_tokens": trace.block_tokens,
            "requests": len(trace.requests),
            "tokens": trace.tokens,
            "unique_blocks": trace.unique_blocks,
            "span_seconds": trace.span,
            "arrivals": trace.arrivals,
            "skipped": trace.skipped,
        },
        "settings": {"look_ahead": job.look_ahead, "warm_up": job.warm_up},
        "results": [_figures(one, best[one.job.capacity]) for one in ordered if one.job.policy in policies],
    }


def _figures(outcome: Outcome, best: float) -> dict[str, Any]:
    return {
        "policy": outcome.job.policy,
        "capacity": outcome.job.capacity,
        "blocks": outcome.blocks,
        "token_hit_ratio": outcome.token_hit_ratio,
        "block_hit_ratio": outcome.block_hit_ratio,
        # The optimum is one of blocks; where last blocks are short, it can be a hair off in tokens.
        "share_of_min": min(1.0, outcome.token_hit_ratio / best) if best else 1.0,
        "evictions": outcome.evictions,
        "written": outcome.stored,
        "seconds": outcome.seconds,
    }


def percent(share: float) -> str:
    """A share as people read it, without zeros behind it."""
    return f"{100 * share:.4g}%"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("h", HOUR), ("min", MINUTE)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def grid(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results of each policy, by capacity."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in result["results"]:
        rows.setdefault(one["policy"], []).append(one)
    return rows


def facts(result: dict[str, Any]) -> str:
    """What the trace is, in one line."""
    trace, settings = result["trace"], result["settings"]
    said = [
        f"{trace['tokens']:,} prompt tokens",
        f"{trace['unique_blocks']:,} different blocks of {trace['block_tokens']} tokens",
        f"over {duration(trace['span_seconds'])}",
        f"arrivals {trace['arrivals']}",
    ]
    said += [f"{trace['skipped']:,} bad records skipped"] if trace["skipped"] else []
    said += [f"the next {settings['look_ahead']} requests are known"] if settings["look_ahead"] else []
    said += [f"the first {percent(settings['warm_up'])} of requests not counted"] if settings["warm_up"] else []
    return " · ".join(said)


def table(result: dict[str, Any]) -> Group:
    """A row for each policy, a column for each capacity: token hit ratio and, behind it, its share of the optimum."""
    rows = grid(result)
    trace = result["trace"]
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("capacity")
    for one in next(iter(rows.values())):
        shown.add_column(percent(one["capacity"]), justify="right")
    for policy, row in rows.items():
        cells = (f"{100 * one['token_hit_ratio']:.2f} [dim]{100 * one['share_of_min']:3.0f}[/]" for one in row)
        shown.add_row(policy, *cells)
    title = f"{trace['requests']:,} requests of {trace['name']}: token hits, % · of the optimum's, %"
    return Group(Text(title, style="bold"), shown, Text(facts(result), style="dim"))
