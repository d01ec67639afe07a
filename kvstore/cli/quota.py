"""``kvstore quota``."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from kvstore.cli.target import AsJson, Target, daemon
from kvstore.figures import size

HELP = """
What each tenant may fill, and fills; and another budget of host memory for one of them, while the daemon serves.

* `kvstore quota cache` shows all tenants to who runs as the daemon's user, and to everybody else his own;

* `kvstore quota cache acme --host 2GiB` gives tenant `acme` two GiB from now on. When that is less, the blocks that are
  worth least go, and none that is being read.

A budget that is set so holds until the daemon ends; the one in its settings counts after that. Without TENANT it is
that of everybody who is no named tenant.
"""


def quota(
    target: Target = "",
    tenant: Annotated[str, typer.Argument(help="A named tenant.", show_default=False)] = "",
    host: Annotated[str | None, typer.Option(help="The new budget of host memory, such as 2GiB.")] = None,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for what leases hold beyond it.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    from kvstore.sizes import size_bytes

    budget = None if host is None else size_bytes(host, "host")
    with daemon(target) as found:
        shown = found.quotas() if budget is None else [found.resize(tenant, budget, wait)]
    shown = [one for one in shown if not tenant or one["tenant"] == tenant]
    if as_json:
        print(json.dumps(shown, indent=1))
    else:
        show(shown)
    if any(one["host"]["used"] > one["host"]["capacity"] for one in shown):
        print("kvstore: what leases hold beyond the budget goes when they end", file=sys.stderr)


def show(quotas: list[dict[str, Any]]) -> None:
    """One row a tenant."""
    from kvstore.cli import tables

    columns = ("host", "of", "filling", "of", "disk", "of", "clients")
    drawn = tables.table("tenants", "tenant", *columns, numbers=len(columns))
    for one in quotas:
        cells = [size(one[tier][key]) for tier in ("host", "staging") for key in ("used", "capacity")]
        cells += [size(one["disk"][key]) for key in ("used", "capacity")] if one["disk"] else ["", ""]
        drawn.add_row(tables.name(one["tenant"] or "(everybody else)"), *cells, f"{one['sessions']:,}")
    tables.console().print(drawn)
