"""Whether what is cached of prompts is loaded, and how long a load is waited for: as was decided from measurements."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.adapters.transformers.pace import Pace
from kvstore.errors import KVStoreError
from kvstore.load import Load
from kvstore.match import Match, Miss
from kvstore.policies.split import Decision
from kvstore.store import Store

# Beyond what was expected, and what computing everything would take, a load that is late is waited for so long: where
# all of that is a moment, a busy machine is no reason to give up.
GRACE = 2.0
TAKEN = 0.8  # of the patience, that a load may be expected to take
LATE = 1.5  # times as long as expected, that its first layer must take then
WORSE = 1.25  # times as long as computing everything, that a load must look like taking when it is given up


@dataclass(frozen=True)
class Choice:
    """What was decided of a load before it began."""

    decision: Decision
    at: float  # when (``time.perf_counter``)
    patience: float  # seconds that the model waits for layers in all
    store: Store

    def cut(self, matches: Sequence[Match]) -> None:
        """Leaves of each match only what is to be loaded, and a miss that says so."""
        for match, kept in zip(matches, self.decision.cuts, strict=True):
            if kept < match.tokens:
                left = match.tokens - kept
                match.cut(kept)
                text = f"from token {kept} on, recomputing {left} tokens is quicker than loading them"
                match.miss = Miss("recompute", kept, text)

    def came(self) -> None:
        """All that was decided to be loaded was: the store hears what that spared, by what was expected of both."""
        expected, anew = self.decision.first_token_seconds, self.decision.all_computed_seconds
        if expected is not None and anew is not None:
            with contextlib.suppress(KVStoreError):  # it was closed meanwhile; the model goes on
                self.store.saved(max(anew - expected, 0.0))

    def waits_for(self, load: Load, match: Match, pace: Pace) -> bool:
        """Waits for the first layer; False: by what it takes, computing everything is quicker than what is left.

        So a disk that is much slower than expected costs what its first layer takes, at most."""
        opening, anew = self.decision.opening, self.decision.all_computed_seconds
        limit = self.patience
        if opening is not None and opening < 1 and anew is not None and len(self.decision.cuts) == 1:
            limit = max(WORSE * anew * opening / (1 - opening), LATE * (self.decision.load_seconds or 0.0) * opening)
        load.wait(0, timeout=min(limit, self.patience))
        took = time.perf_counter() - self.at
        if took < limit or opening is None or load.good_tokens() < load.tokens:
            return True
        pace.fetched(self.decision, took / opening)
        text = f"loading took longer than expected, and recomputing all {match.tokens} tokens is quicker"
        match.miss = Miss("recompute", 0, text)
        return False


def choose(
    store: Store, pace: Pace, tokens: Sequence[int], matches: Sequence[Match], device: bool, patience: float
) -> Choice | None:
    """For matches of prompts of so many ``tokens``, loaded together, to a ``device`` or not.

    ``patience``: seconds that the model waits for layers at most; what would take longer is not begun. None: nothing
    matched, or nothing is to be decided.
    """
    if not (pace.decides and any(match.tokens for match in matches)):
        return None
    at = time.perf_counter()
    decision = pace.decide(tokens, store.prospect(matches, device), TAKEN * patience)
    expected, anew = decision.first_token_seconds, decision.all_computed_seconds
    if expected is not None and anew is not None:
        patience = min(patience, expected + anew + GRACE)
    return Choice(decision, at, patience, store)
