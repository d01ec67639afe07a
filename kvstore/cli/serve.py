"""``kvstore serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.terminal import extras

HELP = """
Hold one cache for all workers of this host, until SIGTERM or Ctrl-C.

Workers connect with `kvstore.connect("unix:/path/of/the/socket")`, or `kvstore.connect(DIR)`, and get the same store
that `kvstore.open` gives, at the speed of shared memory.

* `kvstore serve --dir cache` keeps blocks in memory and in `cache/`, and listens at `cache/kvstore.sock`;

* `kvstore serve --socket /run/kvstore.sock --host 16GiB` keeps them in memory only;

* `kvstore serve --config kvstore.toml` takes all settings from a file; `kvstore config --explain` says what there are.

Flags go over the environment (`KVSTORE_HOST`), and that over the file. Exit code 2: the settings are wrong, or another
daemon is there.
"""


def serve(
    config: Annotated[Path | None, typer.Option(help="A file of settings, in TOML or YAML.")] = None,
    socket: Annotated[Path | None, typer.Option(help="Where to listen, beside DIR/kvstore.sock.")] = None,
    dir: Annotated[Path | None, typer.Option(help="The cache directory; without it there is no disk tier.")] = None,
    host: Annotated[str | None, typer.Option(help="Memory for blocks, such as 4GiB.")] = None,
    disk: Annotated[str | None, typer.Option(help="Disk space for blocks, such as 64GiB.")] = None,
    staging: Annotated[str | None, typer.Option(help="How much of memory clients may be filling at once.")] = None,
    redis: Annotated[str | None, typer.Option(help="A Redis that hosts share, such as redis://host:6379/0.")] = None,
    http: Annotated[str | None, typer.Option(help="Metrics and dashboard, such as 127.0.0.1:9410; or off.")] = None,
    health: Annotated[str | None, typer.Option(help="/livez and /readyz for probes, such as 0.0.0.0:9411.")] = None,
    drain: Annotated[str | None, typer.Option(help="How long to wait for what is under way at the end: 20s.")] = None,
    lease_ttl: Annotated[str | None, typer.Option(help="How long a silent client keeps what it holds: 10s.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    with extras("serve"):
        from kvstore import settings
        from kvstore.daemon.serve import serve as run

    said = {
        "socket": socket,
        "dir": dir,
        "host": host,
        "disk": disk,
        "staging": staging,
        "redis.url": redis,
        "http": http,
        "health": health,
        "drain": drain,
        "lease_ttl": lease_ttl,
        "log_level": log_level,
    }
    run(settings.load(config, {name: str(value) for name, value in said.items() if value is not None}))
