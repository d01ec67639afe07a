"""What is known of one request of the engine, from its arrival until its pages are the engine's again."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.adapters.vllm.question import Found, Question
from kvstore.adapters.vllm.step import Scope
from kvstore.errors import BadInput
from kvstore.keys import TOKEN_BYTES

MODULAR = "modular"
FIELD = "kvstore"  # of kv_transfer_params


@dataclass(frozen=True)
class Wishes:
    """What ``kv_transfer_params["kvstore"]`` asks for. Raises ``BadInput``."""

    segments: tuple[tuple[int, int], ...] = ()  # [start, end) of the prompt, from its first token on
    retain: float = 0.0  # seconds that its prompt is to be kept
    pin: float = 0.0  # seconds that its prompt is to be kept in memory

    @classmethod
    def read(cls, given: object, prompt: int) -> Wishes:
        """From the field of a request whose prompt has so many tokens."""
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise BadInput(f'kv_transfer_params["kvstore"] must be an object, not {type(given).__name__}')
        unknown = sorted(set(given) - {"segments", "mode", "retain", "pin"})
        if unknown:
            raise BadInput(f'kv_transfer_params["kvstore"] has no {unknown[0]!r}, but segments, mode, retain and pin')
        segments = _segments(given.get("segments", ()), prompt)
        if given.get("mode", MODULAR if segments else "exact") not in ("exact", MODULAR):
            raise BadInput(f'mode={given["mode"]!r} is not known; choose "exact" or "modular"')
        if given.get("mode") == "exact":
            segments = ()
        return cls(segments, _seconds(given, "retain"), _seconds(given, "pin"))


def _segments(given: object, prompt: int) -> tuple[tuple[int, int], ...]:
    found, end = list[tuple[int, int]](), 0
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise BadInput("segments must be a list of [start, end] pairs")
    for number, pair in enumerate(given):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(type(place) is int for place in pair):
            raise BadInput(f"segment {number} must be a pair of token numbers, not {pair!r}")
        start, stop = pair
        if start != end or not start < stop <= prompt:
            raise BadInput(
                f"segment {number}, {start} to {stop}, must begin at {end}, where the one before it ends, and end by "
                f"{prompt}, where the prompt does"
            )
        found.append((start, stop))
        end = stop
    return tuple(found)


def _seconds(given: Mapping[str, Any], name: str) -> float:
    value = given.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 366 * 86400:
        raise BadInput(f"{name}={value!r} is no number of seconds")
    return float(value)


@dataclass
class Tracked:
    """One request. Belongs to the scheduler's thread."""

    request: Any
    scope: Scope
    served: bool  # False: neither looked up nor saved
    wishes: Wishes = field(default_factory=Wishes)
    refused: dict[str, str] = field(default_factory=dict)  # why a wish is not granted, for the reply
    modular: bool = False  # segments of it may be taken from elsewhere
    question: Question | None = None  # what is stored of it; holds what is to be loaded until it is
    found: Found = field(default_factory=Found)  # the answer
    by_tier: dict[str, int] = field(default_factory=dict)  # tokens that were taken, by where they were
    loading: bool = False  # its pages are being written
    failed: bool = False  # a load failed; the rest of it is computed
    saved: int = 0  # leading tokens that are stored, or about to be
    saving: bool = False  # some of its pages may still be read
    preemptions: int = 0

    @property
    def tokens(self) -> bytes:
        """All token ids that are known."""
        return array("I", self.request.all_token_ids).tobytes()

    def upto(self, tokens: int) -> bytes:
        """The first so many."""
        return self.tokens[: tokens * TOKEN_BYTES]

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Those that may be taken from elsewhere."""
        return self.wishes.segments if self.modular else ()

    def release(self) -> None:
        """Ends the leases of what was found, or is still looked for."""
        if self.question is not None:
            self.question.drop()
