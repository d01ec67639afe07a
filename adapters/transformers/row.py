"""One sequence as it is recorded: its token ids, and private blocks for the keys and values that are new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvstore.adapters.transformers.block import Block
from kvstore.adapters.transformers.buffers import LayerSpec, payload_of
from kvstore.adapters.transformers.passage import Passage
from kvstore.adapters.transformers.staging import TOO_SLOW, StagedBlock, Staging


@dataclass(frozen=True)
class Seat:
    """Where a chain stands in its prompt."""

    before: Sequence[int] = ()  # tokens of the prompt that come before it
    first: int = 0  # token of the chain that stands behind them
    position: int = 0  # of that token
    root: bytes | None = None  # key that the chain starts from; None: it was computed behind nothing
    source: int = 0  # which load has what is stored of it
    skipped: int = 0  # leading tokens whose blocks are no part of that load


class Copy(NamedTuple):
    """Stored tokens of another chain that go into this one as they are."""

    source: int  # which load has them
    first: int  # token of it
    at: int  # how far behind the chain's stored tokens they go
    tokens: int


class Row:
    """What is known of one chain. ``base`` of its tokens are stored already, the rest is in private blocks.

    ``staging``: where blocks are written before they leave for their drafts; None: straight into the drafts. A full
    block leaves when the forward pass after it begins, so that tokens which are rejected at once cost no way back.
    """

    def __init__(
        self,
        ids: Sequence[int],
        specs: Sequence[LayerSpec],
        dtype: torch.dtype,
        block_tokens: int,
        new_draft: Callable[[], Any],
        staging: Staging | None = None,
        seat: Seat | None = None,  # None: it is the whole prompt
    ) -> None:
        self.ids = list(ids)
        self.seat = seat or Seat()
        self.copies: list[Copy] = []  # to be made while the first forward pass runs
        self.base = len(self.ids)
        self.ended: str | None = None  # why nothing more is recorded
        self.reopen: Callable[[], bool] | None = None  # after a save: fetch the tail again, to go on recording
        self._dtype, self._size = dtype, block_tokens
        self._new_draft, self._staging = new_draft, staging
        self._blocks: dict[int, Block] = {}
        self._sealed = 0  # blocks before this one have left
        self._passage: Passage | None = None  # blocks that the forward pass that is running fills alone
        self.alike = are_alike(specs)  # so that ``write_token`` can be used

    @property
    def column(self) -> int:
        """Where its next token stands in the prompt."""
        return len(self.seat.before) + len(self.ids) - self.seat.first

    @property
    def position(self) -> int:
        """The position of its next token."""
        return self.seat.position + len(self.ids) - self.seat.first

    def end(self, reason: str) -> None:
        """Record nothing more; what was recorded stays."""
        if self.ended is None:
            self.ended = reason

    def prepare(self, tokens: int) -> int:
        """A forward pass begins. Make room behind the recorded tokens; how many of ``tokens`` there is room for."""
        start, whole = len(self.ids), range(0)
        if self._staging is not None:
            self._seal(start // self._size)
        if self._staging is not None and tokens > 1:
            whole = range(-(-start // self._size), (start + tokens) // self._size)
        for index in range(start // self._size, -(-(start + tokens) // self._size)):
            if self._block(index, index in whole) is None:
                tokens = max(0, index * self._size - start)
                break
        if self._staging is not None and whole:
            blocks = [block for index in whole if isinstance(block := self._blocks.get(index), StagedBlock)]
            self._passage = Passage(self._staging, whole.start, blocks)
        return tokens

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, *, at: int = 0) -> None:
        """Keys (before rotation) and values [heads, tokens, dim] of tokens ``at`` behind the recorded ones."""
        start, count, done = len(self.ids) + at, keys.shape[1], 0
        while done < count:
            index, offset = divmod(start + done, self._size)
            if self._passage is not None and index == self._passage.first and self._passage.blocks:
                size = self._passage.tokens
                self._passage.write(layer, keys.narrow(1, done, size), values.narrow(1, done, size))
                done += size
                continue
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

    def extend(self, ids: Sequence[int]) -> None:
        """The forward pass is over: these tokens of it are recorded."""
        passage, self._passage = self._passage, None
        if passage is not None:
            if passage.broken:
                passage.drop()
                return self.end(TOO_SLOW)
            passage.finish()
        self.ids.extend(ids)

    def tail(self) -> tuple[int, int]:
        """(block, tokens) of the stored tokens that lie in the block where the first new token goes."""
        return divmod(self.base, self._size)

    @property
    def wants_seed(self) -> bool:
        """Whether a block that begins with ``tail`` is being written, or may be: it is when memory ended behind it."""
        return self.ended is None or self.tail()[0] in self._blocks

    def seed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Originals of ``tail``, shape [heads, tokens, dim]: the block that new tokens go into begins with them."""
        block = self._block(self.tail()[0])
        if block is not None:
            block.seed(layer, keys, values)

    @property
    def staged(self) -> bool:
        """Whether the block that begins with ``tail`` is being written on a device."""
        block = self._blocks.get(self.tail()[0])
        return isinstance(block, StagedBlock) and block.open

    def seed_whole(self, payload: torch.Tensor) -> bool:
        """As ``seed``, in all layers, with the bytes of the full block that is stored; False: no longer ``staged``."""
        block = self._blocks.get(self.tail()[0])
        if not (isinstance(block, StagedBlock) and block.open):
            return False
        block.seed_whole(payload, self.tail()[1])
        return True

    def crop(self, tokens: int, unread: bool) -> None:
        """Forget the last ``tokens``. ``unread``: the stored part has not been read yet, so a seed is still to come."""
        if not tokens:
            return
        del self.ids[-tokens:]
        length = len(self.ids)
        index, offset = divmod(length, self._size)
        self._unseal(index, offset)
        if length < self.base:
            self.base = length
            if offset and index not in self._blocks and not unread:
                self.end("cropped into what was loaded")

    def take(self, tokens: int) -> dict[int, Any]:
        """Drafts of the blocks that hold new tokens among the first ``tokens``; every other one is given back."""
        if self._passage is not None:  # it was interrupted
            self._passage.drop()
            self._passage = None
        wanted = {index for index in self._blocks if index * self._size < tokens and tokens > self.base}
        for index in wanted:
            self._blocks[index].seal()
        drafts: dict[int, Any] = {}
        for index, block in self._blocks.items():
            if index in wanted:
                drafts[index] = block.release()
            else:
                block.discard()
        self._blocks.clear()
        return drafts

    def discard(self) -> None:
        """Give all private blocks back."""
        self.take(0)

    def _block(self, index: int, passing: bool = False) -> Block | None:
        """The block, a new one where there is none; None when it cannot be had, which ends the recording."""
        block = self._blocks.get(index)
        if passing and block is not None:  # left by tokens that were rejected
            self._blocks.pop(index).discard()
            block = None
        if block is None:
            draft = self._new_draft()
            if draft is None:
                self.end("the store has no memory left for recording, or is closed")
                return None
            if self._staging is None:
                block = Block(draft, payload_of(draft.layout, self._dtype))
            else:
                block = self._staging.passing(draft) if passing else self._staging.block(draft)
            if block is None:
                self.end(TOO_SLOW)
                return None
            self._blocks[index] = block
        return block

    def _seal(self, blocks: int) -> None:
        """Let the first ``blocks`` leave: they are full."""
        for index in range(self._sealed, blocks):
            if index in self._blocks:
                self._blocks[index].seal()
        self._sealed = max(self._sealed, blocks)

    def _unseal(self, index: int, offset: int) -> None:
        """The tokens from ``offset`` of block ``index`` on are gone: what has left of them comes back."""
        self._sealed = min(self._sealed, index)
        for number in [number for number, block in self._blocks.items() if number >= index and not block.open]:
            if number > index or not offset:
                self._blocks.pop(number).discard()
            elif self.ended is None and (reason := self._blocks[number].reopen()) is not None:
                self.end(reason)


def are_alike(specs: Sequence[LayerSpec]) -> bool:
    """Whether keys and values of all layers have one shape, on one device."""
    first = (specs[0].heads, specs[0].key_dim, specs[0].key_dim, specs[0].device)
    return all((spec.heads, spec.key_dim, spec.value_dim, spec.device) == first for spec in specs)
