"""One layer of a windowed cache: buffers of constant size, in which what is kept moves up and is rotated anew.

Beside the keys that attention sees, a layer holds them as they were before rotation. When something is dropped, the
kept keys are rotated from these to their new index, so that no rounding adds up, however often that happens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from kvstore.adapters.transformers.buffers import LayerSpec, Pair
from kvstore.adapters.transformers.capture import Call, heard
from kvstore.adapters.transformers.rotation import Rotation
from kvstore.adapters.transformers.window_recorder import WindowRecorder
from kvstore.errors import BadInput, Unsupported
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import transfer


@dataclass(eq=False)
class Reading:
    """How far a conversation is read; one for all layers of a cache."""

    read: int = 0  # tokens of the history
    held: int = 0  # of which so many are in the cache
    new: int = 0  # that the forward pass reads which is running; 0: none is
    layers: int = 0  # that it has come through
    calls: deque[Call] = field(default_factory=heard)
    recorder: WindowRecorder | None = None  # of what is new


class WindowLayer(CacheLayerMixin):
    """One layer: keys before rotation, keys at their index, and values, each [1, heads, context, dim].

    Written in place; ``update`` returns views. No gradients go through it.
    """

    def __init__(
        self, spec: LayerSpec, rotation: Rotation, dtype: torch.dtype, context: int, reading: Reading, number: int
    ) -> None:
        super().__init__()
        self._spec, self._rotation, self._reading, self._number = spec, rotation, reading, number
        with torch.inference_mode(False):  # later writes come from either mode
            self._originals, self._turned, self._others = (
                torch.zeros((1, spec.heads, context, dim), dtype=dtype, device=spec.device)
                for dim in (spec.key_dim, spec.key_dim, spec.value_dim)
            )
        self.dtype, self.device, self.is_initialized = dtype, spec.device, True
        self._show(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new states; gives all that is held, as views. Raises ``BadInput`` outside a joined model's pass."""
        reading = self._reading
        if key_states.shape[0] != 1 or key_states.shape[2] != reading.new:
            raise BadInput("tokens passed through a model that is not joined to this cache; use its own")
        turned, others = self._spec.exchanged(key_states.detach(), value_states.detach())
        originals = self._rotation.originals(reading.calls, turned)
        reading.calls.clear()
        if originals is None or originals.dtype != self.dtype or others.dtype != self.dtype:
            raise Unsupported(f"layer {self._number} made its keys in another way than at the attach test")
        originals = originals.detach()
        for buffer, states in ((self._originals, originals), (self._turned, turned), (self._others, others)):
            buffer.narrow(2, reading.held, reading.new).copy_(states)
        if reading.recorder is not None:
            reading.recorder.layer(reading.layers, originals[0], others[0])
        reading.layers += 1
        self._show(reading.held + reading.new)
        return self.keys, self.values

    def drop(self, first: int, count: int, held: int) -> None:
        """Of ``held`` columns, ``count`` go from ``first`` on. Those behind move up, and are rotated anew."""
        stay = held - count - first
        for buffer in (self._originals, self._others):
            buffer.narrow(2, first, stay).copy_(buffer.narrow(2, first + count, stay).clone())
        self._turn(first, stay)
        self._show(first + stay)

    def fill(self, originals: torch.Tensor, others: torch.Tensor) -> None:
        """Holds these keys before rotation and values, [1, heads, columns, dim], and nothing else."""
        columns = originals.shape[2]
        for buffer, states in ((self._originals, originals), (self._others, others)):
            buffer.narrow(2, 0, columns).copy_(states)
        self._turn(0, columns)
        self._show(columns)

    def _turn(self, first: int, count: int) -> None:
        """Rotates the originals of ``count`` columns, from ``first`` on, to where they are."""
        if not count:
            return
        form, originals, turned = self._rotation.form, self._originals, self._turned
        if form is not None and self.device.type == "cpu":
            run = (originals.data_ptr(), 0, originals.shape[2], first, count, first, first)
            target = Target(turned[0], turned[0, :, :, :0])  # no values: they have moved already
            transfer(np.array([run], dtype=np.int64), form.upto(first + count, self.device), target)
        else:
            turned.narrow(2, first, count).copy_(self._rotation.rotate(originals.narrow(2, first, count), first))

    def _show(self, columns: int) -> None:
        """What is held, as transformers calls it."""
        self.keys, self.values = self._spec.exchanged(
            self._turned.narrow(2, 0, columns), self._others.narrow(2, 0, columns)
        )

    def originals(self) -> Pair:
        """Keys before rotation and values of all that is held, as views [1, heads, columns, dim]."""
        held = self._reading.held
        return self._originals.narrow(2, 0, held), self._others.narrow(2, 0, held)

    @property
    def size(self) -> int:
        """Bytes that it takes, always."""
        return sum(buffer.nbytes for buffer in (self._originals, self._turned, self._others))

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Hold nothing."""
        self._show(0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the memory is there."""

    def get_seq_length(self) -> int:
        """Tokens of the history that were read, as a sliding layer counts them: ``generate`` passes the rest."""
        return self._reading.read

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and how far the first is from the start of the history."""
        return self._reading.held + query_length, self._reading.read - self._reading.held

    def get_max_length(self) -> int:
        """None: the history may go on for ever."""
        return -1
