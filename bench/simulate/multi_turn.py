"""AIPerf's multi-turn files: what users say, turn by turn, at times that the file gives, or else at drawn ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.bench.conversation import Message
from kvstore.bench.encoders import WordEncoder
from kvstore.bench.logs import ROLES
from kvstore.bench.simulate.arrivals import Arrivals
from kvstore.bench.simulate.blocks import Blocks
from kvstore.bench.simulate.chats import BLOCK_TOKENS, VOCABULARY
from kvstore.bench.simulate.records import BadRecord, count, read_each, seconds, shown
from kvstore.bench.simulate.requests import RECORDED, Request, Trace

MULTI_TURN = "aiperf"
_MILLISECOND = 1e-3
_HEARD = ("system", "assistant")  # whose words are part of prompts, but ask for no reply


def read_multi_turn(path: Path, block_tokens: int | None, skip: bool, seed: int) -> Trace:
    """One session on each line, or one turn; lines with one ``session_id`` go on from each other. Raises ``BadInput``.

    A prompt is all that was said so far. Replies are not in such files, and so not in the prompts.
    """
    reader = _Reader(block_tokens or BLOCK_TOKENS, Arrivals(seed))
    skipped = read_each(path, reader.read, skip)
    requests = tuple(sorted(reader.requests, key=lambda request: request.time))
    return Trace(path.name, MULTI_TURN, reader.block_tokens, requests, skipped, reader.arrivals)


@dataclass
class _Session:
    """As far as it has come."""

    said: tuple[Message, ...] = ()
    time: float | None = None  # of the latest turn
    dated: bool = False  # the file gives the first turn's time


class _Reader:
    """Takes in record after record."""

    def __init__(self, block_tokens: int, draw: Arrivals) -> None:
        self.block_tokens = block_tokens
        self.requests: list[Request] = []
        self.arrivals = RECORDED
        self._draw = draw
        self._sessions: dict[str, _Session] = {}
        self._encoder, self._blocks = WordEncoder(VOCABULARY), Blocks(block_tokens)

    def read(self, record: dict[str, Any]) -> None:
        """Raises ``BadRecord``, and then has taken in nothing."""
        given = record.get("session_id")
        name = f"#{len(self._sessions)}" if given is None else str(given)
        session, found = self._sessions.get(name, _Session()), list[Request]()
        for turn in _turns(record):
            session = _Session((*session.said, _message(turn)), session.time, session.dated)
            if session.said[-1].role not in _HEARD:
                self._time(turn, session)
                assert session.time is not None
                tokens = self._encoder.encode(session.said)
                output = count(turn, "output_length", 0) if turn.get("output_length") is not None else 0
                found.append(Request(session.time, len(tokens), self._blocks.of(tokens), output, name))
        self._sessions[name] = session
        self.requests += found

    def _time(self, turn: dict[str, Any], session: _Session) -> None:
        """Moves the session on to when the turn comes. Raises ``BadRecord``."""
        at, after = (_seconds(turn, name) for name in ("timestamp", "delay"))
        before = session.time
        if at is not None:
            if before is not None and not session.dated:
                raise BadRecord("the session's first turn has no timestamp, a later one has; give every turn one")
            if before is not None and at < before:
                raise BadRecord(f"time goes back, from {before:.3f} s to {at:.3f} s; sort the turns by timestamp")
            session.time, session.dated = at, True
        elif before is None:
            session.time, self.arrivals = self._draw.begin() + (after or 0.0), self._draw.said
        elif after is not None:
            session.time = before + after
        else:
            session.time, self.arrivals = before + self._draw.think(), self._draw.said


def _seconds(turn: dict[str, Any], name: str) -> float | None:
    return None if turn.get(name) is None else seconds(turn, name, _MILLISECOND)


def _turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = record.get("turns", [record])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord('"turns" must be a list of at least one turn, each an object with "text"')
    return turns


def _message(turn: dict[str, Any]) -> Message:
    role = turn.get("role") or "user"
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(f'"role" must be one of {", ".join(ROLES)}, not {shown(role)}')
    return Message(ROLES[role], "\n".join(_texts(turn)))


def _texts(turn: dict[str, Any]) -> list[str]:
    """All that is said in a turn; images and sounds are left out."""
    given = turn.get("texts") or [turn.get("text")]
    parts: list[Any] = []
    for part in given if isinstance(given, list) else [given]:
        contents = part.get("contents") if isinstance(part, dict) else [part]
        parts += contents if isinstance(contents, list) else [contents]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise BadRecord('a turn needs "text", or "texts" with a list of texts')
    return parts
