"""``kvstore doctor``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli import machine, place
from kvstore.cli.machine import Finding
from kvstore.cli.target import AsJson, Target, daemon, place_of, socket_of
from kvstore.errors import BadInput, Unreachable

if TYPE_CHECKING:
    from kvstore.settings import Settings

HELP = """
Look at the machine, the settings, the cache directory and the daemon, and say of each what is wrong and what to do.

* `kvstore doctor` looks at the machine, and at what `KVSTORE_*` variables say;

* `kvstore doctor cache` looks at the directory `cache` and the daemon that serves it, too;

* `kvstore doctor --config kvstore.toml` looks at what a daemon with this file would find.

It changes nothing: in the directory a page is written and removed. Exit code 0: a daemon can run. 1: something fails,
and its row says how to mend it. Warnings cost speed or comfort.
"""

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    target: Target = "",
    config: Annotated[Path | None, typer.Option(help="A file of settings, in TOML or YAML.")] = None,
    as_json: AsJson = False,
) -> None:
    found = list(examined(target, config))
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        show(found)
    if any(one.state == "fail" for one in found):
        raise typer.Exit(1)


def examined(target: str, config: Path | None) -> Iterator[Finding]:
    """All that was looked at."""
    settings, about_settings = configured(config)
    at, folder = named(target, settings)
    served, budgets = serving(at) if at is not None else ([], None)
    if budgets is None and settings is not None:
        budgets = settings.host, settings.disk
    yield from machine.findings(budgets[0] if budgets else None, place.newest(folder) if folder else 0.0)
    yield about_settings
    if folder is not None:
        yield from place.directory(folder)
        if budgets is not None and budgets[1]:
            yield place.space(folder, budgets[1])
        yield place.index(folder)
    yield from served
    if settings is not None and (redis := place.redis(settings)) is not None:
        yield redis


def named(target: str, settings: Settings | None) -> tuple[Path | None, Path | None]:
    """Where the daemon is, or will be, and the cache directory, as far as a target or else settings say."""
    if target:
        at = place_of(target)
        is_folder = at.is_dir() or not (at.exists() or target.startswith("unix:") or at.suffix == ".sock")
        return at, at if is_folder else None
    folder = None if settings is None or settings.dir is None else settings.dir.absolute()
    return folder or (settings.socket if settings is not None else None), folder


def configured(config: Path | None) -> tuple[Settings | None, Finding]:
    """The settings that a daemon would take; None where they are wrong, or pydantic is not there."""
    try:
        from kvstore import settings
    except ModuleNotFoundError as error:
        what = f"a daemon needs {error.name}"
        return None, Finding("settings", "warn", what, "pip install 'kvstore-llm[serve]'")
    try:
        found = settings.load(config, serve=False)
    except BadInput as error:
        return None, Finding("settings", "fail", str(error), "kvstore config --explain says what there is")
    given = str(config) if config else "no file"
    return found, Finding("settings", "pass", f"{given}; kvstore config --explain shows them")


def serving(at: Path) -> tuple[list[Finding], tuple[int, int] | None]:
    """The socket and the daemon behind it; and the host and disk budgets of all tenants that it tells us of."""
    found = [place.socket(socket_of(at))]
    try:
        with daemon(os.fspath(at), place.PATIENCE) as client:
            found.append(place.answering(client))
            quotas = client.quotas()
    except Unreachable as error:
        return [*found, place.silent(error)], None
    host = sum(one["host"]["capacity"] + one["staging"]["capacity"] for one in quotas)
    return found, (host, sum(one["disk"]["capacity"] for one in quotas if one["disk"]))


def show(found: list[Finding]) -> None:
    """One row each, and what to do below it."""
    from rich.text import Text

    from kvstore.cli import tables

    drawn = tables.table("", "", "", "")
    for one in found:
        said = Text(one.what)
        if one.remedy and one.state != "pass":
            said.append(f"\n→ {one.remedy}", "dim")
        drawn.add_row(Text(one.state, COLOURS[one.state]), one.name, said)
    tables.console().print(drawn)
    states = [one.state for one in found]
    print(f"{states.count('pass')} pass, {states.count('warn')} warn, {states.count('fail')} fail")
