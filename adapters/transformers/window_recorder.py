"""Recording a conversation that outgrows its context, as the two chains that the store holds of it.

The first ``context`` tokens are a chain like any other. Those behind them are another: what they see is decided by
the history and the policy alone, so these are its context, and it holds all of them, also those that were dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.row import Row
from kvstore.composition import Chain, Placement
from kvstore.policies.overflow import Window


def chains(history: Sequence[int], policy: Window) -> list[Chain]:
    """The chains of a history: one, or two when it is longer than the context."""
    head = Chain.of(history[: policy.context])
    if len(history) <= policy.context:
        return [head]
    return [head, Chain.of(history[policy.context :], (Placement(head, 0, len(head), -len(head)), policy.mark))]


class WindowRecorder:
    """What a model reads of a conversation; for a save like a ``Recorder`` of one sequence without padding.

    ``rows``: the chain that goes on; ``texts``: one that has ended. ``row`` makes the recording of the last chain of a
    history, of which so many tokens are stored.
    """

    columns = torch.ones((1, 0), dtype=torch.bool)  # no layout of its own: the tokens in order

    def __init__(
        self, history: Sequence[int], policy: Window, first: Row, row: Callable[[Sequence[int], int], Row]
    ) -> None:
        self.rows, self.texts = [first], list[Row]()
        self._policy, self._new_row = policy, row
        self._head = list(history[: policy.context])
        self._in_head = len(history) <= policy.context
        self._ids: list[int] = []  # of the pass that is running
        self._room = 0  # how many of them are recorded

    def begin(self, ids: list[int], read: int) -> None:
        """A forward pass over ``ids`` starts, behind ``read`` tokens; all of them belong to one chain."""
        if self._in_head and read == self._policy.context:
            self._in_head = False
            self.texts += self.rows
            self.rows = [self._new_row([*self._head, ids[0]], 0)]
        row = self.rows[0]
        self._ids, self._room = ids, row.prepare(len(ids)) if row.ended is None or Recorder.reopened(row) else 0

    def layer(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys before rotation and values of a slot, [heads, tokens, dim], of the pass that is running."""
        if self._room:
            self.rows[0].write(slot, keys.narrow(1, 0, self._room), values.narrow(1, 0, self._room))

    def finish(self, whole: bool) -> None:
        """The pass is over; its tokens count when it came through every layer."""
        if not whole:
            return self.end_all("a forward pass was interrupted")
        if self._room:
            self.rows[0].extend(self._ids[: self._room])
        if self._in_head:
            self._head += self._ids

    def end_all(self, reason: str) -> None:
        """Record nothing more."""
        for row in (*self.texts, *self.rows):
            row.end(reason)

    def discard(self) -> None:
        """Give all private blocks back."""
        for row in (*self.texts, *self.rows):
            row.end("the hit was dropped")
            row.discard()
