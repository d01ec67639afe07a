"""What a command is about: a daemon by its socket, or a cache directory, through its daemon or by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.errors import BadInput, Unreachable

if TYPE_CHECKING:
    from kvstore.daemon.operator import Operator
    from kvstore.local import LocalStore

TIMEOUT = 10.0  # seconds that a daemon has for an answer
VARIABLES = ["KVSTORE_SOCKET", "KVSTORE_DIR"]
KEYS = "KVSTORE_ENCRYPTION__KEY_DIR"  # as the daemon's settings have it
NAMES = "unix:SOCKET, the socket's path, or a cache directory; without it what KVSTORE_SOCKET or KVSTORE_DIR says"

Target = Annotated[
    str, typer.Argument(metavar="[TARGET]", envvar=VARIABLES, show_envvar=False, show_default=False, help=f"{NAMES}.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: JSON on stdout.")]


def place_of(target: str) -> Path:
    """The path that a target names. Raises ``BadInput``."""
    text = target.removeprefix("unix:").removeprefix("//") if target.startswith("unix:") else target
    if not text or "\0" in text:
        raise BadInput(f"no daemon is named; give {NAMES}")
    return Path(text).expanduser().absolute()


def socket_of(place: Path) -> Path:
    """Where the daemon listens that is meant by this path."""
    from kvstore.daemon import SOCKET

    return place / SOCKET if place.is_dir() else place


def is_cache(place: Path) -> bool:
    """Whether a directory is one of ours."""
    from kvstore.tiers.folder import TAG

    return (place / TAG).is_file()


@contextmanager
def daemon(target: str, timeout: float = TIMEOUT) -> Iterator[Operator]:
    """The daemon that a target names. Raises ``BadInput``, ``Unreachable``."""
    from kvstore.daemon.operator import Operator

    place = place_of(target)
    try:
        client = Operator(socket_of(place), timeout)
    except Unreachable as error:
        if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            way = f"--dir {place}" if place.is_dir() else f"--socket {place}"
            raise Unreachable(f"no daemon is at {place}; start one with: kvstore serve {way}") from error
        raise
    with client:
        yield client


@contextmanager
def store(target: str) -> Iterator[Operator | LocalStore]:
    """The daemon that a target names, or the store of a directory that no process has open, as large as it is.

    Raises ``BadInput``, ``StoreBusy``, ``Unreachable``."""
    with ExitStack() as stack:
        reached: Operator | LocalStore
        try:
            reached = stack.enter_context(daemon(target))
        except Unreachable:
            if not is_cache(place_of(target)):
                raise
            reached = stack.enter_context(_alone(place_of(target)))
        yield reached


def _alone(place: Path) -> LocalStore:
    import kvstore
    from kvstore.config import MIN_HOST

    print(f"no daemon serves {place}; this command opens it by itself", file=sys.stderr)
    space = os.statvfs(place)
    keys = os.environ.get(KEYS) or None
    return kvstore.open(place, host=MIN_HOST, disk=space.f_blocks * space.f_frsize, encryption=keys)
