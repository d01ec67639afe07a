"""A load that comes out of tensors, for the attach test: the stored form of a prompt that no store has."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.adapters.transformers.buffers import Pair
from kvstore.load import Place


class Originals:
    """What a load of the store gives, out of tensors; it goes through the very code that serves loads."""

    lent = False  # they are this process's own
    sources = ()  # no blocks of a store

    def __init__(self, states: Sequence[Pair], device: torch.device) -> None:
        self._tokens = states[0][0].shape[2]
        self._states = [
            (one[0].detach().to(device).contiguous(), other[0].detach().to(device).contiguous())
            for one, other in states
        ]

    def wait(self, layer: int, timeout: float | None = None) -> bool:
        """Everything is there."""
        return layer < len(self._states)

    def places(self, layer: int) -> list[Place]:
        """The only block."""
        keys, values = self._states[layer]
        return [Place(keys.data_ptr(), values.data_ptr(), self._tokens, self._tokens)]

    def fetched(self, layer: int) -> None:
        """Nothing came from disk."""

    def release(self) -> None:
        """Nothing to give back."""
