"""Layers of transformers' dynamic cache whose first part arrives when attention asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvstore.adapters.transformers.loaded import Loaded


class _Waiting(DynamicLayer):
    """What both kinds of layer share: ``waiting`` columns that are the cache's already, but not yet tensors."""

    source: Loaded | None
    slot: int
    waiting: int
    places: Sequence[int]

    def _expect(self, source: Loaded, slot: int) -> None:
        self.source = source if source.columns else None
        self.slot, self.waiting = slot, source.columns
        self.places = range(source.rows)

    def _taken(self, room: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.source is not None
        pair = self.source.take(self.slot, self.places, self.waiting, room, like)
        self.source, self.waiting = None, 0
        return pair

    def reset(self) -> None:
        """Forget everything."""
        self.source, self.waiting = None, 0
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences."""
        if self.waiting:
            self.places = [self.places[place] for place in beam_idx.tolist()]
        else:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.waiting:
            self.places = [place for place in self.places for _ in range(repeats)]
        else:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences."""
        if self.waiting:
            self.places = [self.places[place] for place in torch.as_tensor(indices).tolist()]
        else:
            super().batch_select_indices(indices)


class LazyLayer(_Waiting):
    """A full attention layer."""

    def __init__(self, source: Loaded, slot: int) -> None:
        super().__init__()
        self._expect(source, slot)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``DynamicLayer``; the first call brings the cached part in front."""
        if not self.waiting:
            result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return result
        self.lazy_initialization(key_states, value_states)
        size, room = self.waiting, key_states.shape[-2]
        keys, values = self._taken(room, key_states)
        # In place behind the cached part: the same tensor as a concatenation gives, without the second copy.
        keys[:, :, size:] = key_states
        values[:, :, size:] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def fetch(self, like: torch.Tensor) -> None:
        """Bring the cached part now, outside a forward pass."""
        if self.waiting:
            self.lazy_initialization(like, like)
            self.keys, self.values = self._taken(0, like)

    def get_seq_length(self) -> int:
        """Columns held, those that wait included."""
        return self.waiting or int(super().get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number, as transformers has it)."""
        if self.waiting and tokens_to_remove <= 0:
            self.waiting = max(0, self.waiting + tokens_to_remove)
        else:
            super().crop(tokens_to_remove)


class LazySlidingLayer(_Waiting, DynamicSlidingWindowLayer):
    """A sliding window layer: holds the last ``window - 1`` columns, as transformers' own would."""

    def __init__(self, source: Loaded, slot: int, window: int) -> None:
        super().__init__(sliding_window=window)
        self._expect(source, slot)
        self.cumulative_length = self.waiting

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``DynamicSlidingWindowLayer``; the first call brings the cached part in front."""
        self.fetch(key_states)
        result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return result

    def fetch(self, like: torch.Tensor) -> None:
        """Bring the cached part of the window now."""
        if self.waiting:
            self.lazy_initialization(like, like)
            self.keys, self.values = self._taken(0, like)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number, as transformers has it)."""
        if self.waiting and tokens_to_remove <= 0:
            # Nothing has left the window yet, so any number can go.
            self.waiting = self.cumulative_length = max(0, self.waiting + tokens_to_remove)
        else:
            super().crop(tokens_to_remove)
