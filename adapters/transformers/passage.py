"""Blocks that one forward pass fills, all of them: a long prompt.

The device need not hold them whole. As soon as a layer is computed, its part of every block goes through a buffer to
the drafts: a few buffers do, however long the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.adapters.transformers.staging import StagedBlock, Staging


class Passage:
    """Consecutive blocks from number ``first`` on, none of them open, on their way to their drafts."""

    def __init__(self, staging: Staging, first: int, blocks: Sequence[StagedBlock]) -> None:
        self.first, self.blocks = first, list(blocks)
        self.broken = False  # a layer could not be taken: nothing of the forward pass may count
        self._staging, self._payload, self._engine = staging, staging.payload, staging.engine()
        self._buffer: torch.Tensor | None = None
        self._used = 0  # elements of it
        self._cargo: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._riders: list[StagedBlock] = []  # whose layers are in the buffer

    @property
    def tokens(self) -> int:
        """Of all its blocks."""
        return len(self.blocks) * self._payload.tokens

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """This layer's keys and values, [heads, tokens, dim], of all tokens."""
        size, tokens, done = self._payload.size(layer), self._payload.tokens, 0
        while done < len(self.blocks) and not self.broken:
            room = (self._payload.elements - self._used) // size
            if self._buffer is None or not room:
                self._send()
                self._buffer = self._staging.buffer(ahead=True)
                room = self._payload.elements // size
            count = min(room, len(self.blocks) - done)
            part = slice(done * tokens, (done + count) * tokens)
            blocks = self.blocks[done : done + count]
            if self._buffer is not None:
                self._load(layer, blocks, keys[:, part], values[:, part])
            elif self._staging.short:
                self._write_directly(layer, blocks, keys[:, part], values[:, part])
            else:
                self._staging.counters.add("recordings_cut")
                self.broken = True
            done += count

    def finish(self) -> None:
        """The forward pass is over: let go of what is left in the buffer."""
        self._send()

    def drop(self) -> None:
        """Nothing of the forward pass counts; called by finalizers too: takes no lock, waits for nothing."""
        if self._buffer is not None:
            written = self._engine.record()
            self._staging.give_back(self._buffer, written, written)
        self._clear()

    def _load(self, layer: int, blocks: Sequence[StagedBlock], keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self._buffer is not None
        size, start = self._payload.size(layer), self._payload.starts[layer]
        views = self._payload.pieces(self._buffer, layer, self._used, len(blocks))
        for view, states in zip(views, (keys, values), strict=True):
            view.copy_(states.unflatten(1, (len(blocks), -1)).transpose(0, 1))
        for block in blocks:
            self._cargo.append((self._buffer.narrow(0, self._used, size), block.host.narrow(0, start, size)))
            self._used += size
        self._riders += blocks

    def _write_directly(
        self, layer: int, blocks: Sequence[StagedBlock], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        tokens = self._payload.tokens
        for number, block in enumerate(blocks):
            host_keys, host_values = self._payload.layer(block.host, layer)
            host_keys.copy_(keys.narrow(1, number * tokens, tokens))
            host_values.copy_(values.narrow(1, number * tokens, tokens))

    def _send(self) -> None:
        if self._buffer is not None:
            left = self._staging.send(self._buffer, self._cargo)
            for block in self._riders:
                block.left = left
        self._clear()

    def _clear(self) -> None:
        self._buffer, self._used, self._cargo, self._riders = None, 0, [], []
