"""``kvstore status``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli.target import AsJson, Target, store
from kvstore.figures import plain, size, span

if TYPE_CHECKING:
    from kvstore.daemon.operator import About

HELP = """
What a daemon holds and how it does: how full each tier is, what it gave, who is connected, and what went wrong.

* `kvstore status cache` is about the daemon that serves the directory `cache`; without a daemon it opens the directory
  and shows what is in it;

* `kvstore status unix:/run/kvstore.sock --json` is for machines: all counters and gauges.

A client sees its own tenant. Who runs as the daemon's user sees its settings, too, with `--json`.
"""

TROUBLE = re.compile(r"corrupt|failed|full|late|dropped|refused|expired_pins|breaker")
RATES = {"disk_read_bytes_per_second": "reads", "disk_write_bytes_per_second": "writes"}


def status(target: Target = "", as_json: AsJson = False) -> None:
    from kvstore.daemon.operator import Operator

    with store(target) as found:
        about = found.about() if isinstance(found, Operator) else None
        stats = found.stats()
    if as_json:
        print(json.dumps({"daemon": None if about is None else asdict(about), "stats": stats}, indent=1))
        return
    from kvstore.cli import tables

    console = tables.console()
    if about is not None:
        console.print(headline(about), highlight=False, markup=False)
    console.print()
    console.print(tables.tiers(stats))
    console.print()
    for line in facts(stats):
        console.print(line, highlight=False, markup=False)
    if wrong := troubles(stats):
        console.print(f"worth a look: {wrong}", style="yellow", highlight=False, markup=False)
    if about is not None:
        console.print()
        console.print(tables.sessions(about.sessions))


def headline(about: About) -> str:
    """What is running."""
    whose = f"tenant {plain(about.tenant)}" if about.tenant else "everybody who is no named tenant"
    return f"kvstore {about.version}, process {about.pid}, up {span(about.uptime)}; this is what {whose} has"


def facts(stats: Mapping[str, Any]) -> Iterator[str]:
    """What a tier's row does not tell."""
    counters, gauges, kept = stats["counters"], stats["gauges"], stats["kept"]
    asked, matched = counters.get("asked_tokens", 0), counters.get("matched_tokens", 0)
    share = f", {matched / asked:.1%} of {asked:,} asked for" if asked else ""
    spared = counters.get("saved_prefill_seconds", 0.0)
    yield f"found    {matched:,} tokens{share}" + (f"; prefills were {span(spared)} shorter" if spared else "")
    yield f"saved    {counters.get('saved_tokens', 0):,} tokens, {size(counters.get('saved_bytes', 0))}"
    evicted = {tier: counters.get(f"{tier}_evicted_blocks", 0) for tier in stats["tiers"]}
    yield "evicted  " + ", ".join(f"{count:,} blocks from {tier}" for tier, count in evicted.items())
    rates = [f"{what} {size(gauges[name])}/s" for name, what in RATES.items() if gauges.get(name)]
    if rates:
        yield f"disk     {', '.join(rates)}, where it was last measured"
    pinned = [f"{size(held)} pinned in {tier}" for tier, held in kept["pinned_bytes"].items() if held]
    if kept["retained_bytes"]:
        pinned.append(f"{size(kept['retained_bytes'])} retained")
    held = [f"{stats['leases']:,} blocks leased", f"{stats['drafts']:,} drafts", *pinned]
    yield f"held     {', '.join(held)}"


def troubles(stats: Mapping[str, Any]) -> str:
    """Counters that are 0 where all is well."""
    found = {name: count for name, count in stats["counters"].items() if count and TROUBLE.search(name)}
    found |= {name: value for name, value in stats["gauges"].items() if value and "breaker" in name}
    return ", ".join(f"{value:,g} {name.replace('_', ' ')}" for name, value in sorted(found.items()))
