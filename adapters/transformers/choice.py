"""Whether what is cached of prompts is loaded, and how long a load is waited for: as was decided from measurements."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.adapters.transformers.pace import Pace
from kvstore.match import Match, Miss
from kvstore.policies.split import Decision
from kvstore.store import Store

# Beyond what was expected, and what computing everything would take, a load that is late is waited for so long: where
# all of that is a moment, a busy machine is no reason to give up.
GRACE = 2.0
TAKEN = 0.8  # of the patience, that a load may be expected to take


@dataclass(frozen=True)
class Choice:
    """What was decided of a load before it began."""

    decision: Decision
    at: float  # when (``time.perf_counter``)
    patience: float  # seconds that the model waits for layers in all

    def cut(self, matches: Sequence[Match]) -> list[Miss]:
        """Leaves of each match only what is to be loaded; why each ends where it ends then."""
        return [self._cut(match, kept) for match, kept in zip(matches, self.decision.cuts, strict=True)]

    def _cut(self, match: Match, kept: int) -> Miss:
        if kept == match.tokens:
            return match.miss
        left = match.tokens - kept
        match.cut(kept)
        return Miss("recompute", kept, f"from token {kept} on, recomputing {left} tokens is quicker than loading them")


def choose(
    store: Store, pace: Pace, tokens: Sequence[int], matches: Sequence[Match], device: bool, patience: float
) -> Choice | None:
    """For matches of prompts of so many ``tokens``, loaded together, to a ``device`` or not; None: nothing matched.

    ``patience``: seconds that the model waits for layers at most. What would take longer is not begun.
    """
    if not any(match.tokens for match in matches):
        return None
    at = time.perf_counter()
    decision = pace.decide(tokens, store.prospect(matches, device), TAKEN * patience)
    expected, anew = decision.first_token_seconds, decision.all_computed_seconds
    if expected is not None and anew is not None:
        patience = min(patience, expected + anew + GRACE)
    return Choice(decision, at, patience)
