"""Traces that name the blocks of prompts by ids: Mooncake's, and Bailian's, which also say what goes on from what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstore.bench.conversation import session_of
from kvstore.bench.simulate.records import BadRecord, count, read_each, seconds
from kvstore.bench.simulate.requests import Request, Trace

MOONCAKE, BAILIAN = "mooncake", "bailian"
BLOCK_TOKENS = {MOONCAKE: 512, BAILIAN: 16}
UNIT = {MOONCAKE: 1e-3, BAILIAN: 1.0}  # seconds
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
ROOT = None  # the parent of a first block


def read_hashed(path: Path, format: str, block_tokens: int | None, skip: bool) -> Trace:
    """A trace of hash ids. Raises ``BadInput``."""
    reader = _Reader(format, block_tokens or BLOCK_TOKENS[format])
    skipped = read_each(path, reader.read, skip)
    return Trace(path.name, format, reader.block_tokens, tuple(reader.requests), skipped)


class _Reader:
    """Takes in record after record, each held against those before it."""

    def __init__(self, format: str, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.requests: list[Request] = []
        self._unit = UNIT[format]
        self._parents: dict[int, int | None] = {}
        self._sessions: dict[str, str] = {}  # by chat

    def read(self, record: dict[str, Any]) -> None:
        """Raises ``BadRecord``, and then has taken in nothing."""
        missing = [f'"{field}"' for field in FIELDS if field not in record]
        if missing:
            raise BadRecord(f"{' and '.join(missing)} is missing; every record needs {', '.join(FIELDS)}")
        time = seconds(record, "timestamp", self._unit)
        if self.requests and time < self.requests[-1].time:
            before = self.requests[-1].time
            raise BadRecord(f"time goes back, from {before:.3f} s to {time:.3f} s; sort the lines by timestamp")
        tokens, output = count(record, "input_length", 1), count(record, "output_length", 0)
        blocks = self._blocks(record["hash_ids"], tokens)
        self.requests.append(Request(time, tokens, blocks, output, self._session(record)))

    def _blocks(self, ids: Any, tokens: int) -> tuple[int, ...]:
        if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
            raise BadRecord('"hash_ids" must be a list of at least one whole number')
        fitting = -(-tokens // self.block_tokens)
        if len(ids) != fitting:
            raise BadRecord(
                f"{tokens} tokens are {fitting} blocks of {self.block_tokens}, but there are {len(ids)} hash ids; "
                f"if the trace has other blocks, say so with --block-tokens"
            )
        parents: dict[int, int | None] = {}
        for block, parent in zip(ids, [ROOT, *ids], strict=False):
            known = parents.get(block, self._parents.get(block, parent))
            if known != parent:
                raise BadRecord(f"block {block} stands {_behind(parent)} here and {_behind(known)} before; {CHAINED}")
            parents[block] = parent
        self._parents.update(parents)
        return tuple(ids)

    def _session(self, record: dict[str, Any]) -> str:
        """The first chat of those that go on from each other; what the record says; or nothing."""
        if "parent_chat_id" not in record:
            return session_of(record)
        chat = str(record.get("chat_id", ""))
        self._sessions[chat] = session = self._sessions.get(str(record["parent_chat_id"]), chat)
        return session


CHAINED = "ids must stand for a block and all that is before it, so hash blocks with their prefix"


def _behind(parent: int | None) -> str:
    return "first" if parent is ROOT else f"behind {parent}"
