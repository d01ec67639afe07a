"""What a load hands to the caller, and what a save hands back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvstore.adapters.transformers.batch import Plan
from kvstore.adapters.transformers.cache import ReuseCache
from kvstore.adapters.transformers.timeline import Span
from kvstore.adapters.transformers.window import WindowCache
from kvstore.policies.split import Decision


@dataclass(frozen=True)
class Hit:
    """A prompt with what was cached of it. For a batch, the results are lists, one item per row."""

    cache: ReuseCache | WindowCache
    cached_tokens: int | list[int]
    miss: Any  # why it ended there; ``str`` gives the sentence, ``kind`` and ``field`` what to act on
    cached_by_tier: dict[str, int]
    plan: Plan
    exact: bool = True  # nothing is reused out of the context that it was computed in
    decision: Decision | None = None  # how much of what matched to load, and what was expected; None: nothing matched
    writers: tuple[str, ...] = ()  # the engines that wrote what is loaded, as far as is known

    @property
    def timeline(self) -> list[Span]:
        """When each layer was fetched, loaded and computed, as far as it has been."""
        return self.cache.timeline.spans()

    @property
    def inputs(self) -> dict[str, Any]:
        """For ``model.generate``: the whole prompt (of which it reads only what is left), mask, positions, cache."""
        return {
            "input_ids": self.plan.ids,
            "attention_mask": self.plan.mask,
            "position_ids": self.plan.positions,
            "past_key_values": self.cache,
        }

    @property
    def forward_inputs(self) -> dict[str, Any]:
        """For a plain forward pass: the tokens that are left, the mask of all, positions, cache.

        Afterwards go on with new tokens and the same cache.
        """
        start = self.plan.columns
        return {
            "input_ids": self.plan.ids[:, start:],
            "attention_mask": self.plan.mask,
            "position_ids": self.plan.positions[:, start:],
            "past_key_values": self.cache,
            "use_cache": True,
        }


class Nothing(NamedTuple):
    """What is durable of a save that was refused."""

    tokens: int = 0
    blocks: int = 0
    bytes: int = 0


class Refused:
    """One row's save that did not happen."""

    tokens = new_tokens = 0

    def wait(self, timeout: float | None = None) -> Nothing:
        """Nothing to wait for."""
        return Nothing()


class SavedTurn:
    """A save under way. ``tokens`` are visible to the next load already; for a batch, lists, one item per row."""

    def __init__(
        self, saves: Sequence[Any], single: bool, refused: str | None = None, beside: Sequence[Any] = ()
    ) -> None:
        self._saves = list(saves)
        self._beside = list(beside)  # chains that end inside a composed prompt
        self._single = single
        self.refused = refused  # why nothing was saved, or None

    @property
    def tokens(self) -> Any:
        """Leading tokens of the sequence that are cached now."""
        return self._each([save.tokens for save in self._saves])

    @property
    def new_tokens(self) -> Any:
        """Those of them that came from this save."""
        return self._each([save.new_tokens for save in self._saves])

    def wait(self, timeout: float | None = None) -> Any:
        """Blocks until what can be durable is; says what is (``tokens``, ``blocks``, ``bytes``)."""
        for save in self._beside:
            save.wait(timeout)
        return self._each([save.wait(timeout) for save in self._saves])

    def _each(self, values: list[Any]) -> Any:
        return values[0] if self._single else values


def add_tiers(tiers: dict[str, int], load: Any, stop: int, first: int = 0) -> None:
    """Adds where tokens ``first`` to ``stop`` of a load come from; of None, nothing."""
    for tier, part in load.tokens_by_tier(stop, first).items() if load is not None else ():
        tiers[tier] = tiers.get(tier, 0) + part


def release(loads: Sequence[Any]) -> None:
    """Ends all leases."""
    for load in loads:
        if load is not None:
            load.release()


def sequences_of(out: Any) -> list[list[int]]:
    """Token ids of each row, from what ``generate`` returned or a caller put together."""
    out = getattr(out, "sequences", out)
    if isinstance(out, torch.Tensor):
        out = out.tolist()
    rows = list(out)
    if rows and not isinstance(rows[0], list | tuple | torch.Tensor):
        rows = [rows]
    return [row.tolist() if isinstance(row, torch.Tensor) else list(row) for row in rows]
