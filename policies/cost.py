"""What a first token costs, as measured: how quickly tiers give their bytes, and how quickly a model reads tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

from kvstore.policies.fit import Fit

ENOUGH = 4 << 20  # bytes that a tier must have moved before its speed is known
FORGETS = 0.8  # how much a measurement of a tier counts beside the one after it: disks change within seconds
REMEMBERS = 0.98  # the same of a model, which changes little
WEIGHT = 0.25  # of the newest error
MOST = 1.0  # that one error may count, as a logarithm
FEW_SECONDS = 0.005  # that are not worth learning from: clocks, threads
HOPE = 1.02  # how much quicker a disk is taken to be with every decision to read nothing from it


class Line(NamedTuple):
    """A tier's speed: seconds for any transfer, and for each byte of it."""

    latency: float
    per_byte: float

    def seconds(self, size: int) -> float:
        """What ``size`` bytes take."""
        return self.latency + size * self.per_byte


class Speed:
    """How quickly a tier moves bytes. The caller's lock guards it."""

    def __init__(self) -> None:
        self._fit = Fit((0.1, 1.0), FORGETS)  # what cannot be told apart is the bytes'
        self._bytes = 0

    def moved(self, size: int, seconds: float) -> None:
        """So many bytes took so long."""
        self._bytes += size
        self._fit.saw((1.0, float(size)), seconds, kind=size.bit_length() // 2)

    @property
    def line(self) -> Line | None:
        """None: too little was moved to tell."""
        if self._bytes < ENOUGH or not self._fit.known:
            return None
        return Line(*self._fit.costs)


class Prefill:
    """How long a model takes for new tokens behind cached ones. The caller's lock guards it.

    A pass, the tokens and the pairs of tokens that see each other have their costs. Behind a cache, where attention
    is given a mask, each new token meets all that are there; without one, those before it.
    """

    def __init__(self) -> None:
        self._fit = Fit((0.5, 1.0, 0.5, 0.5), REMEMBERS, alike=(2, 3))
        self._off = 0.0  # mean logarithm of seconds measured over seconds expected

    def took(self, rows: int, new: int, cached: int, seconds: float) -> None:
        """A pass over ``rows`` sequences of ``new`` tokens, each behind ``cached``, took so long."""
        work = _work(rows, new, cached)
        if self._fit.known:
            self._off = _learned(self._off, self._fit.seconds(work), seconds)
        self._fit.saw(work, seconds, kind=((rows * new).bit_length(), cached > 0))

    @property
    def known(self) -> bool:
        """Whether enough was seen to say anything."""
        return self._fit.known

    @property
    def correction(self) -> float:
        """How many times as long as expected passes took of late; ``seconds`` has it in it."""
        return math.exp(self._off)

    @property
    def costs(self) -> tuple[float, float, float, float]:
        """Seconds for a pass, a token, and a pair of tokens without and behind a cache."""
        base, token, alone, behind = self._fit.costs
        return base, token, alone, behind

    def seconds(self, rows: int, new: int, cached: int) -> float:
        """What such a pass will take."""
        return self._fit.seconds(_work(rows, new, cached)) * self.correction

    def error(self, rows: int, new: int, cached: int) -> float:
        """How far off ``seconds`` may well be."""
        return self._fit.error(_work(rows, new, cached)) * self.correction


class Costs:
    """All that is known of one model and of what loads take beside it. The caller's lock guards it."""

    def __init__(self) -> None:
        self.prefill = Prefill()
        self.host = Speed()  # from memory to where the model reads
        self._off = 0.0  # of reads from disk: mean logarithm of seconds measured over seconds expected
        self._passed_by = 0  # decisions in a row to read nothing of what is on disk

    def read(self, expected: float, seconds: float) -> None:
        """What a load needs from disk was there after so long; the disk's own speed had let ``expected`` expect."""
        if max(expected, seconds) > FEW_SECONDS:
            self._off = _learned(self._off, expected, seconds)

    def decided(self, from_disk: bool) -> None:
        """Of what is on disk, some is loaded, or nothing."""
        self._passed_by = 0 if from_disk else self._passed_by + 1

    @property
    def load_correction(self) -> float:
        """How many times as long as expected reads took of late."""
        return math.exp(self._off)

    @property
    def hope(self) -> float:
        """How many times as quick as measured a disk is taken to be: one that has recovered is tried again some time,
        with little at first."""
        return HOPE**self._passed_by


def _work(rows: int, new: int, cached: int) -> tuple[float, float, float, float]:
    tokens = float(rows * new)
    return (1.0, tokens, 0.0, tokens * (cached + new)) if cached else (1.0, tokens, tokens * new / 2, 0.0)


def _learned(off: float, expected: float, seconds: float) -> float:
    """A mean of logarithms with one more measurement in it."""
    if expected <= 0 or seconds <= 0:
        return off
    return (1 - WEIGHT) * off + WEIGHT * max(-MOST, min(MOST, math.log(seconds / expected)))
