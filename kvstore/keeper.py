"""Verbs on what a match found: pin it in a tier, retain it at all, demote it. Each takes the store's lock once, for
microseconds a block, and waits for no read and no write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from kvstore.errors import BadInput
from kvstore.families import NONE
from kvstore.fetch import Fetch
from kvstore.keeping import Keep
from kvstore.loader import Loader
from kvstore.match import Match
from kvstore.mover import Priority
from kvstore.residency import Residency
from kvstore.room import step_down
from kvstore.upload import Upload, Uploader

TierName = Literal["device", "host", "disk"]
Blocks = Sequence[tuple[int, int]]  # number, and tokens of it
NAMES = {"device": "device memory", "host": "host memory", "disk": "disk"}
LIFE = 10  # periods that a pin lives at most, however often its blocks are used
MEMORY = {"device", "host"}


@dataclass(frozen=True, slots=True)
class Retained:
    """What ``Store.retain`` does: ``tokens`` of the ``asked`` ones, the leading ones, are kept until ``until`` (Unix
    seconds). ``why``: what stands against more."""

    asked: int
    tokens: int
    until: float
    why: str

    def __str__(self) -> str:
        return f"{self.tokens} of {self.asked} tokens are retained until {self.until:.0f}{_rest(self.why)}"


@dataclass(frozen=True, slots=True)
class Pinned:
    """What ``Store.pin`` does: ``tokens`` of the ``asked`` ones, the leading ones, stay in ``tier`` until ``until``
    (Unix seconds), or longer when they are used. ``why``: what stands against more. Whether this is held makes no
    difference."""

    tier: TierName
    asked: int
    tokens: int
    seconds: float
    until: float
    why: str
    _end: Callable[[], None] = field(repr=False, compare=False)

    def release(self) -> None:
        """Ends this pin, and none that others have on the same blocks. Again is no error. Any thread."""
        self._end()

    def __str__(self) -> str:
        stay = f"stay in {NAMES[self.tier]} until {self.seconds:g} seconds after their last use"
        return f"{self.tokens} of {self.asked} tokens {stay}{_rest(self.why)}"


@dataclass(frozen=True, slots=True)
class Demoted:
    """What ``Store.demote`` does: ``bytes`` of host and device memory are free now. ``later`` blocks follow when they
    are written and nobody reads them; without a disk, before all others when room is needed."""

    asked: int
    bytes: int
    later: int

    def __str__(self) -> str:
        return f"{self.bytes} bytes of {self.asked} tokens are free now, and {self.later} blocks follow"


def _rest(why: str) -> str:
    return f", but no more: {why}" if why else ""


class Keeper:
    """One per store."""

    def __init__(self, residency: Residency, loader: Loader, uploader: Uploader | None) -> None:
        self._residency, self._loader, self._uploader = residency, loader, uploader

    def pin(self, match: Match, tier: TierName, seconds: float) -> Pinned:
        """See ``Store.pin``."""
        if tier not in NAMES:
            raise BadInput(f"tier={tier!r} is none to pin in; choose one of {', '.join(NAMES)}")
        check_seconds(seconds)
        residency, keeping = self._residency, self._residency.keeping
        reads, uploads = list[tuple[Fetch, int]](), list[Upload]()
        with residency.lock:
            residency.check_open()
            residency.settle()
            now, blocks = residency.wall(), self._chain(match)
            tiers = [tier, keeping.last] if tier == "device" else [tier]  # what is there is a copy
            keep = Keep([keeping.pins[each] for each in tiers if each in keeping.pins], now + LIFE * seconds, seconds)
            steps: dict[str, Callable[[int], str]] = {"disk": self._write, "device": self._near}
            steps["host"] = partial(self._bring, reads)
            if len(keep.accounts) < len(tiers):
                tokens, why = 0, f"this store has no {NAMES[tier]}"
            else:
                tokens, why = self._keep(keep, blocks, now + seconds, steps[tier])
            if tier == "device" and tokens and not self._raise(keep, uploads):
                tokens = sum(used for number, used in blocks if number in keep.until)
                why = "what others read and fill takes the rest of device memory"
            keeping.begin(keep)
        for fetch, part in reads:
            self._loader.submit(fetch, part)
        if self._uploader is not None:
            self._uploader.submit(uploads)
        return Pinned(tier, match.tokens, tokens, seconds, now + seconds, why, partial(self._end, keep))

    def retain(self, match: Match, seconds: float) -> Retained:
        """See ``Store.retain``."""
        check_seconds(seconds)
        residency, keeping = self._residency, self._residency.keeping
        with residency.lock:
            residency.check_open()
            residency.settle()
            until = residency.wall() + seconds
            keep = Keep([keeping.retained], until)
            tokens, why = self._keep(keep, self._chain(match), until, self._write)
            keeping.begin(keep)
        return Retained(match.tokens, tokens, until, why)

    def demote(self, match: Match) -> Demoted:
        """See ``Store.demote``."""
        residency = self._residency
        index, hot = residency.index, residency.hot
        free, later = 0, dict[int, None]()
        with residency.lock:
            residency.check_open()
            residency.settle()
            numbers = [number for number, _ in match.held()]
            match.release()
            residency.settle()
            for number in reversed(numbers):
                if not index.present(number):  # forgotten meanwhile
                    continue
                residency.keeping.let_go(number, MEMORY)
                free += 0 if hot is None else hot.demote(number)
                free += step_down(residency, number)
                if number in residency.residents and self._follows(number, later):
                    later[number] = None
            residency.host_policy.let_go(later)
        residency.counters.add("demoted_bytes", free)
        return Demoted(match.tokens, free, len(later))

    def _follows(self, number: int, later: dict[int, None]) -> bool:
        """Whether a block that is in memory still is to go from there next. One that has no other place stays while
        others stand behind it. Locked."""
        residency = self._residency
        resident = residency.residents[number]
        if residency.disk is not None and not resident.failed:
            self._write(number)
            resident.demoted = True
            return True
        return all(child in later for child in residency.index.families.children(number))

    def _end(self, keep: Keep) -> None:
        with self._residency.lock:
            self._residency.keeping.end(keep)

    def _chain(self, match: Match) -> Blocks:
        """The blocks of a match, and those before them, without which they would not be found. Locked."""
        index, blocks = self._residency.index, match.held()
        before = index.chain(blocks[0][0])[:-1] if blocks else []
        return [*((number, index.count[number]) for number in before), *blocks]

    def _keep(self, keep: Keep, blocks: Blocks, until: float, step: Callable[[int], str]) -> tuple[int, str]:
        """Keeps leading blocks, as far as there is room and ``step`` has nothing against one. Returns how many tokens,
        and why not more. Locked."""
        residency, keeping, tokens = self._residency, self._residency.keeping, 0
        for number, used in blocks:
            if not residency.index.present(number):
                return tokens, "the rest is not stored any more"
            size = residency.index.kind_of(number).layout.full_slot_bytes
            full = keeping.add(keep, number, size, until)
            if full is not None:
                what = "pins" if keep.period else "what is retained"
                return tokens, f"{what} may take {full.limit} bytes of {NAMES[full.tier]}"
            why = step(number)
            if why:
                keeping.drop(keep, number)
                return tokens, why
            tokens += used
        return tokens, ""

    # -- what it takes to have a block in a tier: why it cannot be had, or nothing. Locked. ----------------------------

    def _bring(self, reads: list[tuple[Fetch, int]], number: int) -> str:
        """It is in host memory, or comes there behind all that loads wait for; the caller submits it."""
        if number in self._residency.residents:
            return ""
        fetch = self._loader.fetches.get(number)
        if fetch is not None:
            reads += [(fetch, part) for part in fetch.hasten(len(reads))]
            return ""
        fetch = self._loader.start(number, Priority.DEMAND, (1, len(reads)))
        if fetch is None:
            return "leases and unwritten blocks take the rest of host memory"
        reads.append((fetch, 0))
        return ""

    def _write(self, number: int) -> str:
        """It is in the last tier, or queued to be written there."""
        residency = self._residency
        if number in residency.index.remote:
            return "the rest is on other hosts only; load it first"
        if residency.disk is None or residency.index.disk[number] != NONE:
            return ""
        resident = residency.residents[number]
        if resident.failed:
            return "the rest could not be written to disk"
        resident.clean = resident.unwanted = False  # it may have been there once
        residency.write_soon(number)
        return ""

    def _near(self, number: int) -> str:
        """It is in the last tier, and on the device or near it."""
        hot = self._residency.hot
        if number in self._residency.residents or (hot is not None and number in hot):
            return self._write(number)
        return "the rest is not in memory; load it first"

    def _raise(self, keep: Keep, uploads: list[Upload]) -> bool:
        """The blocks are on the device, or on their way; those are dropped for which there is no room (then False)."""
        hot, numbers = self._residency.hot, list(keep.until)
        assert hot is not None and self._uploader is not None
        upload = self._uploader.of(numbers, numbers)
        uploads += [] if upload is None else [upload]
        there = next((at for at, number in enumerate(numbers) if not hot.placed(number)), len(numbers))
        for number in numbers[there:]:
            self._residency.keeping.drop(keep, number)
        return there == len(numbers)


def check_seconds(seconds: float) -> None:
    """Raises ``BadInput`` for what is no time to keep something."""
    given: object = seconds
    if not isinstance(given, int | float) or not (math.isfinite(given) and given > 0):
        raise BadInput(f"seconds={given!r} is no positive number; say how long")
