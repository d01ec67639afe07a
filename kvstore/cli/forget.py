"""``kvstore forget``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from kvstore.cli.target import AsJson, Target, place_of, store
from kvstore.cli.terminal import seconds_of
from kvstore.errors import BadInput
from kvstore.figures import size

HELP = """
Erase blocks: keys, values and token ids, in memory, on disk and in Redis. What is erased was everything that meets all
conditions given.

* `kvstore forget cache --owner alice --yes` erases what was saved for `alice`;

* `kvstore forget cache --tenant acme --older-than 7d` erases what tenant `acme` saved more than a week ago, and asks
  before it does;

* `kvstore forget cache --id 5e0c21` erases a segment that `kvstore ls` shows, and what stands behind it.

Without a daemon the directory is opened for it. It returns when the bytes are gone, and prints how many there were.
"""


def forget(
    target: Target = "",
    tenant: Annotated[str | None, typer.Option(help="Of this tenant, of those that namespaces name.")] = None,
    owner: Annotated[str | None, typer.Option(help="Saved for this owner.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Saved longer ago than this: 90s, 30m, 12h, 7d.")] = None,
    id: Annotated[str | None, typer.Option(help="Of this segment, and what stands behind it.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    from kvstore.local import LocalStore

    age = None if older_than is None else seconds_of(older_than, "--older-than")
    given = {"tenant": tenant, "owner": owner, "older than": older_than, "in or behind segment": id}
    words = [f"{name} {value!r}" for name, value in given.items() if value is not None]
    if not words:
        raise BadInput("forget needs --tenant, --owner, --older-than or --id: without them it would erase everything")
    with store(target) as found:
        _agreed(f"erase what meets all of: {', '.join(words)}; at {place_of(target)}", yes)
        if id is None:
            receipt = found.forget(tenant=tenant, owner=owner, older_than=age)
        elif isinstance(found, LocalStore):
            receipt = found.forget(tenant=tenant, owner=owner, older_than=age, match=found.segment(id))
        else:
            receipt = found.forget_segment(id, tenant, owner, age)
    if as_json:
        print(json.dumps(asdict(receipt)))
        return
    later = f"; {receipt.deferred} are invisible, and gone when nobody reads them any more" if receipt.deferred else ""
    print(f"{receipt.blocks:,} blocks with {size(receipt.bytes)} of keys and values are erased{later}")


def _agreed(what: str, yes: bool) -> None:
    """Asks, where there is somebody to ask. Raises ``BadInput`` where there is nobody, ``typer.Abort`` for a no."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise BadInput(f"this is no terminal to ask at; add --yes to {what}")
    typer.confirm(f"Shall this {what}?", abort=True, err=True)
