"""Traces of every kind that can be simulated; which kind it is, the fields of its records say."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from kvstore.bench.simulate.chats import CHAT, read_chats
from kvstore.bench.simulate.hashed import BAILIAN, MOONCAKE, read_hashed
from kvstore.bench.simulate.multi_turn import MULTI_TURN, read_multi_turn
from kvstore.bench.simulate.records import BadRecord, lines, parsed
from kvstore.bench.simulate.requests import Trace
from kvstore.errors import BadInput

AUTO = "auto"
FORMATS = (AUTO, MOONCAKE, BAILIAN, MULTI_TURN, CHAT)
_LOOKED_AT = 16  # lines, of which the first may be broken


def read(path: Path, format: str = AUTO, block_tokens: int | None = None, skip: bool = False, seed: int = 0) -> Trace:
    """The requests of a trace or a log. ``block_tokens``: None is what the format has. ``seed``: of drawn arrivals.

    ``skip``: bad records of a trace are left out and counted; without it, and for chat logs, they raise ``BadInput``,
    and so does a file that cannot be read or holds no request.
    """
    if format not in FORMATS:
        raise BadInput(f"there is no format {format}; choose from {', '.join(FORMATS)}")
    if format == AUTO:
        format = _format_of(path)
    if format == MULTI_TURN:
        trace = read_multi_turn(path, block_tokens, skip, seed)
    elif format == CHAT:
        trace = read_chats(path, block_tokens, seed)
    else:
        trace = read_hashed(path, format, block_tokens, skip)
    if not trace.requests:
        left_out = f", and {trace.skipped} bad records" if trace.skipped else ""
        raise BadInput(f"{path} holds no request{left_out}; give a trace with one request on each line")
    return trace


def _format_of(path: Path) -> str:
    """By the first line that is an object. A file without one is a chat log in some other layout."""
    found = list(islice(lines(path), _LOOKED_AT))
    if not found:
        raise BadInput(f"{path} is empty; give a trace or a chat log with at least one request")
    for _, line in found:
        try:
            record = parsed(line)
        except BadRecord:
            continue
        return _format_of_record(record)
    return CHAT


def _format_of_record(record: dict[str, Any]) -> str:
    if "hash_ids" in record or ("timestamp" in record and "input_length" in record):
        return BAILIAN if "chat_id" in record else MOONCAKE
    turns = record.get("turns", [record])
    said = turns and isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    if said and ("text" in turns[0] or "texts" in turns[0]):
        return MULTI_TURN
    return CHAT
