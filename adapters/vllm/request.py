"""What is known of one request of the engine, from its arrival until its pages are the engine's again."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.adapters.vllm.hints import HINTS, IGNORED, Hint, from_envelope, from_field
from kvstore.adapters.vllm.question import Found, Question
from kvstore.adapters.vllm.step import Scope
from kvstore.errors import BadInput
from kvstore.job import Job
from kvstore.keys import TOKEN_BYTES

MODULAR = "modular"
FIELD = "kvstore"  # of kv_transfer_params


@dataclass(frozen=True)
class Wishes:
    """What ``kv_transfer_params["kvstore"]`` asks for. Raises ``BadInput``."""

    segments: tuple[tuple[int, int], ...] = ()  # [start, end) of the prompt, from its first token on
    hints: Mapping[str, Hint] = field(default_factory=dict)  # by name

    @classmethod
    def read(cls, given: object, prompt: int) -> Wishes:
        """From the field of a request whose prompt has so many tokens."""
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise BadInput(f'kv_transfer_params["kvstore"] must be an object, not {type(given).__name__}')
        known = ("segments", "mode", *HINTS)
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise BadInput(f'kv_transfer_params["kvstore"] has no {unknown[0]!r}, but {", ".join(known)}')
        segments = _segments(given.get("segments", ()), prompt)
        if given.get("mode", MODULAR if segments else "exact") not in ("exact", MODULAR):
            raise BadInput(f'mode={given["mode"]!r} is not known; choose "exact" or "modular"')
        if given.get("mode") == "exact":
            segments = ()
        return cls(segments, from_field(given))


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


@dataclass
class Tracked:
    """One request. Belongs to the scheduler's thread."""

    request: Any
    scope: Scope
    served: bool  # False: neither looked up nor saved
    wishes: Wishes = field(default_factory=Wishes)
    actions: Mapping[str, Hint] = field(default_factory=dict)  # by id, from the engine's envelope of hints
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
    jobs: tuple[Job, ...] = ()  # what the store is told of it while it waits

    @property
    def asked(self) -> object:
        """What its kv_transfer_params say to us."""
        return (self.request.kv_transfer_params or {}).get(FIELD)

    def read(self) -> None:
        """What it wishes, and what the engine's envelope says of it."""
        self.actions = from_envelope(getattr(self.request, "kv_hints", None))
        try:
            self.wishes = Wishes.read(self.asked, self.request.num_prompt_tokens)
        except BadInput as error:
            self.refused["refused"] = str(error)

    def hints(self, action: str) -> Iterator[Hint]:
        """All that ask for this, if it is served."""
        if self.served:
            yield from (hint for hint in (*self.wishes.hints.values(), *self.actions.values()) if hint.action == action)

    def seconds(self, action: str) -> float:
        """For how long its prompt is to be kept; 0: not at all."""
        return max((hint.seconds for hint in self.hints(action)), default=0.0)

    @property
    def told(self) -> dict[str, Any] | None:
        """What the reply says, if anything was asked."""
        if self.asked is None and not self.actions:
            return None
        mode = MODULAR if self.found.approximate else "exact"
        told = {"tokens": sum(self.by_tier.values()), "by_tier": self.by_tier, "mode": mode}
        told |= self.refused | self._answers(self.wishes.hints)
        return {FIELD: told | ({"hints": self._answers(self.actions)} if self.actions else {})}

    def _answers(self, hints: Mapping[str, Hint]) -> dict[str, str]:
        return {name: hint.answer if self.served or not hint.action else IGNORED for name, hint in hints.items()}

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
