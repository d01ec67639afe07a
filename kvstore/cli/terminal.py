"""What commands have in common on a terminal: a bar on stderr, what to install, and where they may write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kvstore.errors import BadInput

if TYPE_CHECKING:
    from rich.progress import Progress

MOST_SECONDS = 36525 * 86400.0


def progress_bar(work: str, unit: str) -> Progress:
    """A progress bar on stderr that leaves nothing behind."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(work), BarColumn(), MofNCompleteColumn(), TextColumn(unit + " {task.fields[share]}"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


@contextmanager
def extras(names: str) -> Iterator[None]:
    """Names the extras to install where a library is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "kvstore":
            raise
        raise BadInput(f"this needs {error.name}; install it with: pip install 'kvstore-llm[{names}]'") from error


def seconds_of(text: str, name: str) -> float:
    """A duration such as "90s" or "7d". Raises ``BadInput`` that begins with ``name``."""
    with extras("serve"):
        from kvstore.settings.values import duration
    found: float = duration(MOST_SECONDS).read(text, name)
    return found


def check_writable(*targets: Path | None) -> None:
    """Raises ``BadInput`` where a file cannot be written because of where it is to be, before any work is done."""
    for target in targets:
        if target is not None and not target.absolute().parent.is_dir():
            raise BadInput(f"cannot write {target}: the folder {target.parent} is not there; make it first")
        if target is not None and target.is_dir():
            raise BadInput(f"cannot write {target}: it is a folder; give the name of a file")
