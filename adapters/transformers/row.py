"""One sequence as it is recorded: its token ids, and private blocks for the keys and values that are new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.adapters.transformers.buffers import LayerSpec, view


@dataclass(slots=True)
class Block:
    """A draft of the store with a tensor view of each layer, shape [heads, block tokens, dim]."""

    draft: Any
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    whole: torch.Tensor | None  # all layers at once, [layers, K and V, heads, block tokens, dim], when they are alike

    def release(self) -> Any:
        """Drop the views and give the draft away; the store takes its memory back only when nobody looks at it."""
        self.keys.clear()
        self.values.clear()
        self.whole = None
        return self.draft


class Row:
    """What is known of one sequence. ``base`` of its tokens are stored already, the rest is in private blocks."""

    def __init__(
        self,
        ids: Sequence[int],
        specs: Sequence[LayerSpec],
        dtype: torch.dtype,
        block_tokens: int,
        new_draft: Callable[[], Any],
    ) -> None:
        self.ids = list(ids)
        self.base = len(self.ids)
        self.ended: str | None = None  # why nothing more is recorded
        self.reopen: Callable[[], bool] | None = None  # after a save: fetch the tail again, to go on recording
        self._specs, self._dtype, self._size = specs, dtype, block_tokens
        self._new_draft = new_draft
        self._blocks: dict[int, Block] = {}
        self.alike = are_alike(specs)  # so that ``write_token`` can be used

    def end(self, reason: str) -> None:
        """Record nothing more; what was recorded stays."""
        if self.ended is None:
            self.ended = reason

    def prepare(self, tokens: int) -> int:
        """Make room behind the recorded tokens; how many of ``tokens`` there is room for."""
        start = len(self.ids)
        for index in range(start // self._size, -(-(start + tokens) // self._size)):
            if self._block(index) is None:
                self.end("the store has no memory left for recording")
                return max(0, index * self._size - start)
        return tokens

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys (before rotation) and values of shape [heads, tokens, dim] of the tokens behind the recorded ones."""
        start, count, done = len(self.ids), keys.shape[1], 0
        while done < count:
            index, offset = divmod(start + done, self._size)
            size = min(self._size - offset, count - done)
            block = self._blocks[index]
            block.keys[layer].narrow(1, offset, size).copy_(keys.narrow(1, done, size))
            block.values[layer].narrow(1, offset, size).copy_(values.narrow(1, done, size))
            done += size

    def write_token(self, states: torch.Tensor) -> None:
        """The next token's keys and values in all layers, [layers, K and V, heads, dim]; only if layers are alike."""
        index, offset = divmod(len(self.ids), self._size)
        whole = self._blocks[index].whole
        assert whole is not None
        whole.select(3, offset).copy_(states)

    def tail(self) -> tuple[int, int]:
        """(block, tokens) of the stored tokens that lie in the block where the first new token goes."""
        return divmod(self.base, self._size)

    @property
    def wants_seed(self) -> bool:
        """Whether a block that begins with ``tail`` is being written, or may be: it is when memory ended behind it."""
        return self.ended is None or self.tail()[0] in self._blocks

    def seed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Originals of ``tail``, shape [heads, tokens, dim]: the block that new tokens go into begins with them."""
        index, _ = self.tail()
        block = self._block(index)
        if block is None:
            self.end("the store has no memory left for recording")
            return
        block.keys[layer].narrow(1, 0, keys.shape[1]).copy_(keys)
        block.values[layer].narrow(1, 0, values.shape[1]).copy_(values)

    def crop(self, tokens: int, unread: bool) -> None:
        """Forget the last ``tokens``. ``unread``: the stored part has not been read yet, so a seed is still to come."""
        if not tokens:
            return
        del self.ids[-tokens:]
        length = len(self.ids)
        if length < self.base:
            self.base = length
            index, offset = divmod(length, self._size)
            if offset and index not in self._blocks and not unread:
                self.end("cropped into what was loaded")

    def take(self, tokens: int) -> dict[int, Any]:
        """Drafts of the blocks that hold new tokens among the first ``tokens``; every other one is given back."""
        drafts: dict[int, Any] = {}
        for index, block in self._blocks.items():
            draft = block.release()
            if index * self._size < tokens and tokens > self.base:
                drafts[index] = draft
            else:
                draft.discard()
        self._blocks.clear()
        return drafts

    def discard(self) -> None:
        """Give all private blocks back."""
        self.take(0)

    def _block(self, index: int) -> Block | None:
        block = self._blocks.get(index)
        if block is None:
            draft = self._new_draft()
            if draft is None:
                return None
            block = self._blocks[index] = Block(draft, [], [], None)
            for layer, spec in enumerate(self._specs):
                keys, values = draft.layer(layer)
                block.keys.append(view(keys, self._dtype, (spec.heads, self._size, spec.key_dim)))
                block.values.append(view(values, self._dtype, (spec.heads, self._size, spec.value_dim)))
            if self.alike:
                block.whole = self._whole(draft.payload, block)
                self.alike = block.whole is not None
        return block

    def _whole(self, payload: memoryview, block: Block) -> torch.Tensor | None:
        """One view of all layers; None where they do not follow each other in even steps."""
        first, spec = block.keys[0].data_ptr(), self._specs[0]
        size = block.keys[0].element_size()
        layers = [keys.data_ptr() - first for keys in block.keys]
        step = layers[1] if len(layers) > 1 else 0
        if layers != [step * layer for layer in range(len(layers))] or step % size:
            return None
        per_head = self._size * spec.key_dim
        flat = view(payload, self._dtype, (len(payload) // size,))
        shape = (len(layers), 2, spec.heads, self._size, spec.key_dim)
        return flat.as_strided(shape, (step // size, spec.heads * per_head, per_head, spec.key_dim, 1))


def are_alike(specs: Sequence[LayerSpec]) -> bool:
    """Whether keys and values of all layers have one shape."""
    return all((s.heads, s.key_dim, s.value_dim) == (specs[0].heads, specs[0].key_dim, specs[0].key_dim) for s in specs)
