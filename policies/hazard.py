"""When what was stored comes back, learned by class and age, and what keeping it is worth.

A *class* is what is known of a stretch of blocks when a request leaves it; *age* is the time since then, in bins of
half an octave. Of each class it is counted how many came into a bin and how many came back in it. Few classes are
seen often, so the hazard of one is that of all, times a factor for each of its features, times a shape for one of
them; all are shrunk towards 1 by pseudo-events. What keeping is worth is the Gittins index of that hazard: the largest
ratio, over all times to wait, of the chance that it comes back to the time that it is held.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import log2

Class = tuple[int, ...]  # the first number is a kind; PRIVATE ones have a number for each feature behind it
PRIVATE, TRUNK, LEFT, FOUND = 0, 1, 2, 3
FEATURES = 3  # of private classes
SHAPED = 2  # the feature that has a shape over age

_OCTAVES = 20  # 12 days
EDGES = [0.0, *(2 ** (half / 2) for half in range(2 * _OCTAVES))]  # seconds at which bins begin
BINS = len(EDGES)
_WIDTHS = [*(b - a for a, b in pairwise(EDGES)), EDGES[-1]]
_FORGET = 0.9995  # what a count is worth after each fit, of what it was
_FACTOR_PRIOR, _SHAPE_PRIOR, _BIN_PRIOR = 2.0, 10.0, 2.0  # pseudo-events
_SWEEPS = 4
_AT_ONCE = 8  # classes in a step
_MOST = 0.95  # of what is in a bin comes back, at most


def bin_of(age: float) -> int:
    """The bin of an age in seconds."""
    return 0 if age < 1 else min(BINS - 1, 1 + int(2 * log2(age)))


class Hazards:
    """Counts, and the worth that follows from them after ``fit``. A count weighs more the later it comes."""

    def __init__(self) -> None:
        self._weight = 1.0
        self._entered: dict[Class, list[float]] = {}
        self._returned: dict[Class, list[float]] = {}
        self._worth: dict[Class, list[float]] = {}

    def enter(self, kind: Class, bins: Iterable[int]) -> None:
        """A stretch of this class has come into these bins of age."""
        row = self._entered.get(kind)
        if row is None:
            row, self._returned[kind] = self._entered.setdefault(kind, [0.0] * BINS), [0.0] * BINS
        for each in bins:
            row[each] += self._weight

    def come_back(self, kind: Class, at: int) -> None:
        """A stretch of this class, which had entered the bin, came back in it."""
        self._returned[kind][at] += self._weight

    def worth(self, kind: Class, at: int) -> float:
        """What keeping a block is worth, by the last ``fit``: chance of a hit per second of holding it."""
        row = self._worth.get(kind)
        return row[at] if row is not None else 1 / (1 + EDGES[at])

    def fit(self) -> None:
        """All of ``fitting`` at once. O(classes x bins)."""
        for _ in self.fitting():
            pass

    def fitting(self) -> Iterator[None]:
        """Takes in what was counted, in steps of well under a millisecond; what is counted meanwhile is taken in too,
        or the next time. In the end all have their new worth, and what was counted so far counts a little less.
        """
        private = [kind for kind in self._entered if kind[0] == PRIVATE]
        pooled = self._pooled(private)
        yield
        factors = dict.fromkeys(private, 1.0)
        yield from self._fit_factors(factors, pooled)
        prior = _SHAPE_PRIOR * self._weight
        seen: dict[int, list[float]] = {kind[1 + SHAPED]: [prior] * BINS for kind in private}
        thought = {level: [prior] * BINS for level in seen}
        for number, kind in enumerate(private):
            returned, expected, times = seen[kind[1 + SHAPED]], thought[kind[1 + SHAPED]], factors[kind]
            for at, (e, r) in enumerate(zip(self._entered[kind], self._returned[kind], strict=True)):
                returned[at] += r
                expected[at] += e * min(_MOST, pooled[at] * times)
            if number % _AT_ONCE == 0:
                yield
        shapes = {level: [r / e for r, e in zip(seen[level], thought[level], strict=True)] for level in seen}
        worth = {kind: gittins(self._pooled([kind])) for kind in self._entered if kind[0] != PRIVATE}
        worth[(FOUND,)] = gittins(pooled)
        for number, kind in enumerate(private):
            times, shape = factors[kind], shapes[kind[1 + SHAPED]]
            worth[kind] = gittins([min(_MOST, h * times * s) for h, s in zip(pooled, shape, strict=True)])
            if number % _AT_ONCE == 0:
                yield
        self._worth = worth
        self._weight /= _FORGET
        if self._weight > 1e9:
            self._rescale()

    def _pooled(self, kinds: list[Class]) -> list[float]:
        """Hazard by bin of several classes together; a bin of which little is known is like the one before it."""
        hazards, before, prior = [], 0.01, _BIN_PRIOR * self._weight
        entered = [sum(column) for column in zip(*(self._entered[kind] for kind in kinds), strict=True)]
        returned = [sum(column) for column in zip(*(self._returned[kind] for kind in kinds), strict=True)]
        for came, back in zip(entered or [0.0] * BINS, returned or [0.0] * BINS, strict=True):
            before = min(_MOST, (back + before * prior) / (came + prior))
            hazards.append(before)
        return hazards

    def _fit_factors(self, product: dict[Class, float], pooled: list[float]) -> Iterator[None]:
        """For each class the product of its features' factors, fitted to the margins in turns."""
        prior = _FACTOR_PRIOR * self._weight
        expected = {k: sum(e * h for e, h in zip(self._entered[k], pooled, strict=True)) for k in product}
        returned = {kind: sum(self._returned[kind]) for kind in product}
        levels: list[dict[int, float]] = [{kind[1 + feature]: 1.0 for kind in product} for feature in range(FEATURES)]
        yield
        for _ in range(_SWEEPS):
            for feature, factor in enumerate(levels):
                sums = {level: [prior, prior] for level in factor}
                for kind in product:
                    margin = sums[kind[1 + feature]]
                    margin[0] += returned[kind]
                    margin[1] += expected[kind] * product[kind] / factor[kind[1 + feature]]
                levels[feature] = {level: seen / thought for level, (seen, thought) in sums.items()}
                for kind in product:
                    level = kind[1 + feature]
                    product[kind] *= levels[feature][level] / factor[level]
                yield

    def _rescale(self) -> None:
        for table in (self._entered, self._returned):
            for kind, row in table.items():
                table[kind] = [count / self._weight for count in row]
        self._weight = 1.0

    def state(self) -> str:
        """The counts that are not 0, as JSON: bins, and for each class what entered and returned by bin."""
        self._rescale()
        rows = []
        for kind, entered in self._entered.items():
            counts = enumerate(zip(entered, self._returned[kind], strict=True))
            rows.append([kind, [[at, round(e, 2), round(r, 2)] for at, (e, r) in counts if e >= 0.01]])
        return json.dumps({"bins": BINS, "rows": rows}, separators=(",", ":"))

    def learn(self, state: str) -> bool:
        """Takes in a ``state``; False, and nothing, where it cannot be read."""
        entered, returned = dict[Class, list[float]](), dict[Class, list[float]]()
        try:
            read = json.loads(state)
            for kind, counts in read["rows"] if read["bins"] == BINS else ():
                kind = tuple(map(int, kind))
                if kind[0] not in (PRIVATE, TRUNK, LEFT) or len(kind) != (1 + FEATURES if kind[0] == PRIVATE else 1):
                    return False
                entered[kind], returned[kind] = [0.0] * BINS, [0.0] * BINS
                for at, came, back in counts:
                    entered[kind][at], returned[kind][at] = max(float(came), 0.0), max(float(back), 0.0)
        except (ValueError, TypeError, KeyError, IndexError):
            return False
        if not entered:
            return False
        self._weight, self._entered, self._returned = 1.0, entered, returned
        self.fit()
        self._weight = 1.0  # nothing was forgotten by that
        return True


def gittins(hazards: list[float]) -> list[float]:
    """By bin of age: the largest chance of a return per second held, over all bins in which to give up.

    From the last bin back, bins are joined as long as going on is better than stopping (the index of a stopping
    problem, as for jobs of unknown length). O(bins).
    """
    index, ahead = [0.0] * BINS, list[tuple[float, float, float]]()  # chance, seconds, what survives
    for at in range(BINS - 1, -1, -1):
        hazard = hazards[at]
        chance, seconds, survives = hazard, _WIDTHS[at] * (1 - hazard / 2), 1 - hazard
        while ahead and ahead[-1][0] * seconds > chance * ahead[-1][1]:
            more, longer, then = ahead.pop()
            chance, seconds, survives = chance + survives * more, seconds + survives * longer, survives * then
        ahead.append((chance, seconds, survives))
        index[at] = chance / seconds
    return index
