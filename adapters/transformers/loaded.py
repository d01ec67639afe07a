"""The cached part of a batch: turned into tensors layer by layer, when attention asks for it, and not before.

Columns are what the model's cache counts: row ``i`` with ``t`` cached tokens has them in the last ``t`` of the
``columns`` that are loaded; what lies before is padding, which the attention mask hides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvstore.adapters.transformers.buffers import LayerSpec, view
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.rotation import Rotation

Pair = tuple[torch.Tensor, torch.Tensor]


class Loaded:
    """What the store gives for each row of a batch, and what to do when it does not."""

    def __init__(
        self,
        loads: Sequence[Any],  # of the store, or None; one per row
        tokens: Sequence[int],
        columns: int,
        specs: Sequence[LayerSpec],
        rotations: Sequence[Rotation],
        dtype: torch.dtype,
        recorder: Recorder,
        recompute: Callable[[], list[Pair]],  # all layers of the cached columns, as the model would hold them
        patience: float,
    ) -> None:
        self.loads, self.tokens, self.columns = list(loads), list(tokens), columns
        self.recorder = recorder
        self.recomputed = 0  # layers that the model had to compute again
        self._specs, self._rotations, self._dtype = specs, rotations, dtype
        self._recompute = recompute
        self._instead: list[Pair] | None = None
        self._deadline: float | None = None
        self._patience = patience
        self._untaken = len(specs)

    def take(self, layer: int, places: Sequence[int], start: int, stop: int, room: int, like: torch.Tensor) -> Pair:
        """Keys and values of columns ``start`` to ``stop``, with ``room`` for more behind them.

        ``places`` says which row each sequence of the batch continues, ``like`` gives dtype and device.
        """
        spec, size = self._specs[layer], stop - start
        keys = like.new_empty((len(places), spec.heads, size + room, spec.key_dim))
        values = like.new_empty((len(places), spec.heads, size + room, spec.value_dim))
        first: dict[int, int] = {}
        stored = self._wait(layer)
        for place, row in enumerate(places):
            if row in first:
                keys[place, :, :size] = keys[first[row], :, :size]
                values[place, :, :size] = values[first[row], :, :size]
                continue
            first[row] = place
            into = (keys[place].narrow(1, 0, size), values[place].narrow(1, 0, size))
            if stored:
                self._fill(layer, row, start, into)
            else:
                assert self._instead is not None
                for target, source in zip(into, self._instead[layer], strict=True):
                    target.copy_(source[row, :, start:stop])
        self._untaken -= 1
        if not self._untaken:
            self.release()
        return keys, values

    def release(self) -> None:
        """End the leases; what was taken is the model's."""
        for load in self.loads:
            if load is not None:
                load.release()
        self.loads = [None] * len(self.loads)
        self._instead = None

    def _wait(self, layer: int) -> bool:
        """Whether this layer came from the store; otherwise it has been computed again."""
        if self._instead is None and not self._arrives(layer):
            # Inside the forward pass the cut is out of reach: masks and positions count on these tokens.
            self.recorder.stop(f"layer {layer} could not be loaded and was computed again")
            self._instead = self._recompute()
        self.recomputed += self._instead is not None
        return self._instead is None

    def _arrives(self, layer: int) -> bool:
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._patience
        left = max(0.0, self._deadline - now)
        return all(load is None or load.wait(layer, timeout=left) for load in self.loads)

    def _fill(self, layer: int, row: int, start: int, into: Pair) -> None:
        """Rotate this row's keys and copy its values into tensors of shape [heads, columns, dim]."""
        keys, values = into
        load, first = self.loads[row], self.columns - self.tokens[row]  # column of the row's first token
        hole = min(max(0, first - start), keys.shape[1])
        keys[:, :hole], values[:, :hole] = 0, 0
        if load is None:
            return
        spec, token, stop = self._specs[layer], 0, start + keys.shape[1]
        tail, tail_tokens = self.recorder.rows[row].tail()
        for number, piece in enumerate(load.pieces(layer)):
            size = min(piece.tokens, self.tokens[row] - token)
            low, high = max(0, start - first - token), min(size, stop - first - token)
            needed = tail_tokens if number == tail else 0
            if low < high or needed:
                originals = view(piece.keys, self._dtype, (spec.heads, piece.stride, spec.key_dim))
                given = view(piece.values, self._dtype, (spec.heads, piece.stride, spec.value_dim))
                if needed and self.recorder.rows[row].wants_seed:
                    self.recorder.rows[row].seed(layer, originals[:, :needed], given[:, :needed])
                if low < high:
                    column = first + token + low - start
                    turning = originals[None, :, low:high].to(keys.device)
                    turned = self._rotations[layer].rotate(turning, token + low)
                    keys[:, column : column + high - low] = turned[0]
                    values[:, column : column + high - low] = given[:, low:high]
            token += size
