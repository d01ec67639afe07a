"""``kvstore ping``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from kvstore.cli.target import AsJson, Target, daemon
from kvstore.errors import Unreachable
from kvstore.figures import seconds

HELP = """
Ask a daemon whether it is there, and see how long its answers take.

* `kvstore ping cache` asks the daemon that serves the directory `cache`;

* `kvstore ping unix:/run/kvstore.sock --timeout 1` is a probe for a container: it says nothing more than its exit code
  has to.

Exit code 0: it answers. 1: it does not, or not in time. 2: the command is wrong.
"""


def ping(
    target: Target = "",
    count: Annotated[int, typer.Option(min=1, help="How many times, one after the other.")] = 10,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that each answer may take.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    try:
        with daemon(target, timeout) as found:
            times = sorted(found.ping() for _ in range(count))
    except Unreachable as error:
        print(f"kvstore: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    p50, p99 = times[len(times) // 2], times[min(len(times) * 99 // 100, len(times) - 1)]
    if as_json:
        print(json.dumps({"count": count, "p50_seconds": p50, "p99_seconds": p99}))
    else:
        print(f"{count} answers, p50 {seconds(p50)}, p99 {seconds(p99)}")
