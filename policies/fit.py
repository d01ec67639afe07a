"""What work costs, learned from measurements: a sum of non-negative parts, that outliers do not pull and age fades."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

Vector = Sequence[float]
Matrix = list[list[float]]

FEW = 3  # measurements without which nothing is known
KEPT = 8  # of each kind, the latest
MANY, FRESH = 16, 0.9  # behind so many, a fit is good until what it is made of has faded so far
ROUNDS = 5
FAR = 2.0  # times the usual error: what is further off counts less
LEAST_ERROR = 0.03  # relative, of any measurement
DOUBT = 0.3  # relative error that few measurements may hide: this, over their number
ALIKE = 0.01  # how strongly costs that are alike are held together, against what was measured


class _Seen(NamedTuple):
    number: int
    work: tuple[float, ...]
    seconds: float


class _Solved(NamedTuple):
    upto: int  # number of the latest measurement in it
    costs: tuple[float, ...]
    error: float  # relative, of one measurement
    inverse: Matrix  # of the weighted squares of the work


class Fit:
    """Seconds of work as the sum of its quantities, each times a cost.

    Of every ``kind`` of work the latest measurements are kept, so that what is seen often does not displace what is
    seen rarely. Each counts ``memory`` times as much as the one after it. The caller's lock guards it.
    """

    def __init__(self, shares: Sequence[float], memory: float, alike: tuple[int, int] | None = None) -> None:
        """``shares``: of each quantity, how much of the longest work may well be due to it, as far as one knows before.

        ``alike``: two quantities whose costs are about the same, as long as only one was seen."""
        self._shares, self._width, self._memory, self._alike = tuple(shares), len(shares), memory, alike
        self._kinds: dict[Hashable, deque[_Seen]] = {}
        self._count = 0
        self._solved: _Solved | None = None

    def saw(self, work: Vector, seconds: float, kind: Hashable = None) -> None:
        """Work of these quantities took so long."""
        if seconds <= 0 or not math.isfinite(seconds):
            return
        self._count += 1
        seen = _Seen(self._count, tuple(work), seconds)
        self._kinds.setdefault(kind, deque(maxlen=KEPT)).append(seen)

    @property
    def known(self) -> bool:
        """Whether enough was seen to say anything."""
        return self._count >= FEW

    @property
    def costs(self) -> tuple[float, ...]:
        """Seconds for one of each quantity."""
        return self._fitted().costs

    def seconds(self, work: Vector) -> float:
        """What work of these quantities takes."""
        return _product(self._fitted().costs, work)

    def error(self, work: Vector) -> float:
        """One standard deviation of ``seconds``: large for work unlike all that was seen."""
        solved = self._fitted()
        spread = sum(x * _product(row, work) for x, row in zip(work, solved.inverse, strict=True))
        return solved.error * math.sqrt(max(spread, 0.0))

    # -- the fit: weighted least squares, the weights made anew from what is left over ---------------------------------

    def _fitted(self) -> _Solved:
        """A fit takes a millisecond, so it is not made anew for a few measurements among many."""
        found, count = self._solved, self._count
        if found is None or found.upto < min(count, MANY) or self._memory ** (count - found.upto) < FRESH:
            found = self._solved = self._solve([seen for kind in self._kinds.values() for seen in kind])
        return found

    def _solve(self, seen: Sequence[_Seen]) -> _Solved:
        scale = [max((abs(one.work[i]) for one in seen), default=0.0) or 1.0 for i in range(self._width)]
        rows = [[x / size for x, size in zip(one.work, scale, strict=True)] for one in seen]
        age = [self._memory ** (self._count - one.number) for one in seen]
        expected, trust, error = [one.seconds for one in seen], [1.0] * len(seen), LEAST_ERROR
        longest, few = max(expected, default=1.0), DOUBT / max(len(seen), 1)
        costs, squares = [0.0] * self._width, _zeros(self._width)
        for _ in range(ROUNDS):
            weights = [a * t / e**2 for a, t, e in zip(age, trust, expected, strict=True)]
            squares = self._squares(rows, weights, scale, longest, error + few)
            right = [
                sum(w * row[i] * one.seconds for w, row, one in zip(weights, rows, seen, strict=True))
                for i in range(self._width)
            ]
            costs = _least(squares, right)
            expected = [max(_product(costs, row), one.seconds * 1e-3) for row, one in zip(rows, seen, strict=True)]
            off = [max(one.seconds / e, e / one.seconds) - 1 for one, e in zip(seen, expected, strict=True)]
            error = max(LEAST_ERROR, 1.5 * _middle(off, age))
            trust = [min(1.0, FAR * error / max(o, 1e-9)) for o in off]
        scaled = _inverse(squares)
        inverse = [[scaled[i][j] / scale[i] / scale[j] for j in range(self._width)] for i in range(self._width)]
        return _Solved(self._count, tuple(c / s for c, s in zip(costs, scale, strict=True)), error + few, inverse)

    def _squares(self, rows: Sequence[Vector], weights: Vector, scale: Vector, longest: float, error: float) -> Matrix:
        """Of what was measured, and of what is known before: no more than its share of the longest work is due to any
        quantity, give or take."""
        squares = _zeros(self._width)
        for i in range(self._width):
            for j in range(i, self._width):
                squares[i][j] = squares[j][i] = sum(w * r[i] * r[j] for w, r in zip(weights, rows, strict=True))
        if self._alike is not None:
            i, j = self._alike
            hold = ALIKE * (squares[i][i] * scale[i] ** 2 + squares[j][j] * scale[j] ** 2)
            squares[i][i] += hold / scale[i] ** 2
            squares[j][j] += hold / scale[j] ** 2
            squares[i][j] = squares[j][i] = squares[i][j] - hold / scale[i] / scale[j]
        for i in range(self._width):
            squares[i][i] += (error / longest / self._shares[i]) ** 2
        return squares


def _least(squares: Matrix, right: Vector) -> list[float]:
    """The non-negative costs that leave least: those of the best subset of quantities, the others 0."""
    best, least = [0.0] * len(right), 0.0
    for kept in _subsets(len(right)):
        part = _solved([[squares[i][j] for j in kept] for i in kept], [right[i] for i in kept])
        left = -_product(part, [right[i] for i in kept])
        if min(part) >= 0 and left < least:
            least, best = left, [0.0] * len(right)
            for i, cost in zip(kept, part, strict=True):
                best[i] = cost
            if len(kept) == len(right):
                break  # nothing is better than what is best without bounds
    return best


def _subsets(width: int) -> Iterator[tuple[int, ...]]:
    for size in range(width, 0, -1):
        yield from combinations(range(width), size)


def _solved(matrix: Matrix, right: Vector) -> list[float]:
    """The solution of a symmetric, positive system, by elimination."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for at in range(size):
        for below in range(at + 1, size):
            factor = rows[below][at] / rows[at][at]
            for column in range(at, size + 1):
                rows[below][column] -= factor * rows[at][column]
            rows[below][below] = max(rows[below][below], 1e-30)
    found = [0.0] * size
    for at in reversed(range(size)):
        known = sum(rows[at][column] * found[column] for column in range(at + 1, size))
        found[at] = (rows[at][size] - known) / rows[at][at]
    return found


def _inverse(matrix: Matrix) -> Matrix:
    size = len(matrix)
    return [_solved(matrix, [float(i == j) for j in range(size)]) for i in range(size)]


def _middle(values: Vector, weights: Vector) -> float:
    """The weighted median."""
    half, passed = sum(weights) / 2, 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        passed += weight
        if passed >= half:
            return value
    return 0.0


def _product(one: Vector, other: Vector) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def _zeros(width: int) -> Matrix:
    return [[0.0] * width for _ in range(width)]
