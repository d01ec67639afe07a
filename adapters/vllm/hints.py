"""Hints: what a request asks the store to do beside serving it, and what it is answered.

They come in ``kv_transfer_params["kvstore"]``, or as actions in vLLM's own envelope, from whoever routes requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.errors import BadInput
from kvstore.keys import token_bytes

RETAIN, PIN, PREFETCH = "retain", "pin", "prefetch"
HINTS = (RETAIN, PIN, PREFETCH)
ACCEPTED, IGNORED = "accepted", "ignored"
MOST_SECONDS = 366 * 86400
MOST_TOKENS = 1 << 22
VERSION = "1"  # of actions, the part before the first dot


@dataclass(slots=True)
class Hint:
    """One. ``answer``: what the reply says of it; of a prefetch, once that is known, written by the thread that
    prefetches and read by the engine's."""

    action: str
    seconds: float = 0.0
    token_ids: bytes = b""  # of a prompt that will follow
    answer: str = ACCEPTED


def from_field(given: Mapping[str, Any]) -> dict[str, Hint]:
    """By name, from ``kv_transfer_params["kvstore"]``. Raises ``BadInput``."""
    hints = {name: Hint(name, _seconds(given, name)) for name in (RETAIN, PIN) if given.get(name)}
    if given.get(PREFETCH):
        hints[PREFETCH] = Hint(PREFETCH, token_ids=_token_ids(given[PREFETCH]))
    return hints


def from_envelope(envelope: Any) -> dict[str, Hint]:
    """By the action's id, from ``Request.kv_hints``, or None. What is no hint for a store is one that is ignored."""
    hints = dict[str, Hint]()
    for action in envelope.actions if envelope is not None else ():
        try:
            hints[action.action_id] = _hint(action.action_type, action.action_version, action.payload)
        except BadInput as error:
            hints[action.action_id] = Hint("", answer=f"{IGNORED}: {error}")
    return hints


def _hint(kind: str, version: str, payload: Mapping[str, Any]) -> Hint:
    if version.split(".")[0] != VERSION:
        raise BadInput(f"version {version!r} of {kind} is not known, only {VERSION}")
    if kind == "kv.retain":
        return Hint(RETAIN, _retention(payload))
    action = kind.removeprefix("kvstore.") if kind.startswith("kvstore.") else ""
    if action in (RETAIN, PIN):
        return Hint(action, _seconds(payload, "seconds"))
    if action == PREFETCH:
        return Hint(action, token_ids=_token_ids(payload.get("token_ids")))
    raise BadInput(f"{kind} is not known; choose from kv.retain, {', '.join(f'kvstore.{name}' for name in HINTS)}")


def _retention(payload: Mapping[str, Any]) -> float:
    """The longest that the prompt, or a part of it, is to be kept: vLLM's form with directives, or Dynamo's."""
    if "ttl_seconds" in payload:
        return _seconds(payload, "ttl_seconds")
    directives = payload.get("directives")
    if not isinstance(directives, Sequence) or not all(isinstance(one, Mapping) for one in directives):
        raise BadInput("kv.retain needs ttl_seconds, or a list of directives")
    durations = [_seconds(one, "duration") for one in directives if one.get("duration") is not None]
    if not durations:
        raise BadInput("kv.retain without a duration says how much blocks matter, not how long; that is not used")
    return max(durations)


def _seconds(given: Mapping[str, Any], name: str) -> float:
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_SECONDS:
        raise BadInput(f"{name}={value!r} is no number of seconds")
    return float(value)


def _token_ids(given: object) -> bytes:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) > MOST_TOKENS:
        raise BadInput(f"prefetch needs a list of token ids, {MOST_TOKENS:,} at most")
    try:
        return token_bytes(given)
    except BadInput as error:
        raise BadInput(f"prefetch needs token ids: {error}") from None
