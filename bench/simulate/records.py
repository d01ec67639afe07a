"""Records of a JSONL file, one a line: read within bounds, and a bad one either stops the reading or is counted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvstore.errors import BadInput

MAX_LINE = 16 << 20  # bytes
LATEST = 1e12  # seconds, 30,000 years
NEWER_FILE = "remove the line or fetch the file again"


class BadRecord(Exception):
    """What is wrong with one record and how to mend it. Whoever reads the file adds where it stands."""


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank; of a line longer than ``MAX_LINE``, more than that many.

    Raises ``BadInput`` for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if line.strip():
                    yield number, line
                while len(line) > MAX_LINE and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE + 1)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}; give the path of a trace or a chat log") from error


def parsed(line: bytes) -> dict[str, Any]:
    """The object on a line. Raises ``BadRecord``."""
    if len(line) > MAX_LINE:
        raise BadRecord(f"the line is longer than {MAX_LINE >> 20} MiB, which no request is; {NEWER_FILE}")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"the line is not text in UTF-8 (byte {error.start}); {NEWER_FILE}") from error
    except (ValueError, RecursionError) as error:
        cut = "the line is broken" if line.endswith(b"\n") else "the file ends in half a line"
        what = error.msg if isinstance(error, json.JSONDecodeError) else "no JSON that can be read"
        raise BadRecord(f"{cut} ({what}); {NEWER_FILE}") from error
    if not isinstance(record, dict):
        raise BadRecord(f"an object was expected, not {type(record).__name__}; {NEWER_FILE}")
    return record


def read_each(path: Path, read: Callable[[dict[str, Any]], None], skip: bool) -> int:
    """Calls ``read`` with each record, in order. Returns how many were bad and left out, with ``skip``.

    Raises ``BadInput``, without ``skip`` for the first bad record too.
    """
    skipped = 0
    for number, line in lines(path):
        try:
            read(parsed(line))
        except BadRecord as bad:
            if not skip:
                raise BadInput(f"{path}, line {number}: {bad}") from bad
            skipped += 1
    return skipped


def seconds(record: dict[str, Any], field: str, unit: float) -> float:
    """A time of so many seconds each. Raises ``BadRecord``."""
    value = record[field]
    if type(value) not in (int, float) or not 0 <= value <= LATEST / unit:
        raise BadRecord(f'"{field}" must be a number that is not negative, not {shown(value)}')
    return float(value) * unit


def count(record: dict[str, Any], field: str, least: int) -> int:
    """A whole number of tokens. Raises ``BadRecord``."""
    value = record[field]
    if type(value) is not int or value < least:
        raise BadRecord(f'"{field}" must be a whole number of at least {least}, not {shown(value)}')
    return value


def shown(value: Any) -> str:
    """A number as it is, of everything else the kind: logs are private."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)[:24] if type(value) in (int, float, bool) else f"a {type(value).__name__}"
