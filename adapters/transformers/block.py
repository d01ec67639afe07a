"""A block under recording, and where it is kept until it is given to the store."""

from __future__ import annotations

from typing import Any

import torch

from kvstore.adapters.transformers.buffers import Payload, view


class Block:
    """A draft of the store, written in place. One thread at a time.

    While it is ``open``: a tensor view of each layer's keys and values, [heads, block tokens, dim], and where all
    layers are alike one of the ``whole``, [layers, K and V, heads, block tokens, dim].
    """

    def __init__(self, draft: Any, payload: Payload) -> None:
        self.draft = draft
        self.payload = payload
        self.host = view(draft.payload, payload.dtype, (payload.elements,))
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.whole: torch.Tensor | None = None
        self._place()

    @property
    def open(self) -> bool:
        """Whether it can be written."""
        return True

    def seed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin with these originals, [heads, tokens, dim]."""
        self.keys[layer].narrow(1, 0, keys.shape[1]).copy_(keys)
        self.values[layer].narrow(1, 0, values.shape[1]).copy_(values)

    def seal(self) -> None:
        """It is full, or as full as it gets: what was written may leave for the draft."""

    def reopen(self) -> str | None:
        """Make it open again, with what was written; or why that cannot be."""
        return None

    def release(self) -> Any:
        """The draft, with all that was written; waits for it. Nobody looks at its memory any more."""
        self._forget()
        return self.draft

    def discard(self) -> None:
        """Give the draft back; called by finalizers too: takes no lock, waits for nothing."""
        self._forget()
        self.draft.discard()

    def _place(self) -> None:
        """Have what is written go to its place: here, straight into the draft."""
        self._show(self.host)

    def _show(self, flat: torch.Tensor) -> None:
        """Set the views, over a payload of their own device."""
        with torch.inference_mode(False):  # later writes come from either mode
            for layer in range(len(self.payload.shapes)):
                keys, values = self.payload.layer(flat, layer)
                self.keys.append(keys)
                self.values.append(values)
            self.whole = self.payload.whole(flat)

    def _forget(self) -> None:
        """Drop the views: the store takes its memory back only when nobody looks at it."""
        self.keys.clear()
        self.values.clear()
        self.whole = None
        self.host = self.host.new_empty(0)
