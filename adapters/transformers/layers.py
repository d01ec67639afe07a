"""Layers of transformers' dynamic cache whose first part arrives when attention asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvstore.adapters.transformers.composed import Scattered
from kvstore.adapters.transformers.loaded import Loaded
from kvstore.errors import Unsupported


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


def layer_for(source: Loaded, slot: int, window: int | None, scattered: Scattered | None) -> DynamicLayer:
    """The layer for a slot."""
    if scattered is None:
        return LazyLayer(source, slot) if window is None else LazySlidingLayer(source, slot, window)
    if window is None:
        return ScatteredLayer(source, slot, scattered)
    return ScatteredSlidingLayer(source, slot, scattered, window)


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


class _Scattered(_Waiting):
    """A layer that is brought with all columns; the first call puts what the model computed into its own."""

    scattered: Scattered

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers' own; the first call joins what is brought and what was computed."""
        if not self.waiting:
            result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return result
        self.lazy_initialization(key_states, value_states)
        keys, values = self._taken(0, key_states)
        columns = self.scattered.columns.to(keys.device)
        keys.index_copy_(2, columns, key_states)
        values.index_copy_(2, columns, value_states)
        self._keep(keys, values)
        return keys, values

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        """Before the first forward pass only the columns in front of it count: the caller gives all the others."""
        return self.scattered.leading if self.waiting else int(super().get_seq_length())

    def fetch(self, like: torch.Tensor) -> None:
        """Raises ``Unsupported`` before the first forward pass: what it computes is not there yet."""
        if self.waiting:
            raise Unsupported("a composed prompt cannot be looked at or copied before the model has read it")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number, as transformers has it)."""
        if self.waiting:
            raise Unsupported("a composed prompt cannot be cropped before the model has read it")
        super().crop(tokens_to_remove)


class ScatteredLayer(_Scattered):
    """A full attention layer of a scattered prompt."""

    def __init__(self, source: Loaded, slot: int, scattered: Scattered) -> None:
        super().__init__()
        self.scattered = scattered
        self._expect(source, slot)


class ScatteredSlidingLayer(_Scattered, DynamicSlidingWindowLayer):
    """A sliding window layer of a scattered prompt: all columns are there for the first pass, then the window's."""

    def __init__(self, source: Loaded, slot: int, scattered: Scattered, window: int) -> None:
        super().__init__(sliding_window=window)
        self.scattered = scattered
        self._expect(source, slot)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.cumulative_length = keys.shape[-2]
        kept = keys.shape[-2] if self.record_past else self.sliding_window - 1
        self.keys, self.values = keys[:, :, -kept:].contiguous(), values[:, :, -kept:].contiguous()
