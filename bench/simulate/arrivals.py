"""When the turns of sessions come, for logs that have no times: drawn, and the same for the same seed."""

from __future__ import annotations

import math
import random

SESSION_SECONDS = 30.0  # from one session's begin to the next's, on average
THINK_SECONDS = 60.0  # from one turn of a session to the next, median
THINK_SPREAD = 1.0  # standard deviation of its logarithm


class Arrivals:
    """Sessions begin as a Poisson process; turns follow each other in times with a lognormal distribution."""

    def __init__(self, seed: int) -> None:
        self.said = f"drawn, seed {seed}"  # of itself, in place of ``requests.RECORDED``
        self._draw = random.Random(seed)
        self._time = 0.0

    def begin(self) -> float:
        """When the next session begins, in seconds."""
        self._time += self._draw.expovariate(1 / SESSION_SECONDS)
        return self._time

    def think(self) -> float:
        """Seconds until a session's next turn."""
        return self._draw.lognormvariate(math.log(THINK_SECONDS), THINK_SPREAD)
