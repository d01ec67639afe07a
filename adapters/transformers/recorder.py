"""Recording a batch while the model runs: which tokens pass, and their keys before rotation and values, layer by layer.

A recorder never guesses. A forward pass whose tokens, positions or mask it cannot account for ends the recording of
the rows concerned, with a reason; what was recorded before stays good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvstore.adapters.transformers.capture import heard
from kvstore.adapters.transformers.rotation import Rotation
from kvstore.adapters.transformers.row import Row


class Step(NamedTuple):
    """What one row takes from the forward pass that is running."""

    row: Row
    place: int  # in the batch
    runs: list[tuple[int, int, int]]  # column, distance behind its recorded tokens, length
    ids: list[int]


class Take(NamedTuple):
    """What one row takes of the first pass over a composed prompt: ``ids``, of which the pass reads ``runs``."""

    row: Row
    ids: list[int]
    runs: list[tuple[int, int, int]]  # place among what is read, distance behind the row's stored tokens, length


class Opening(NamedTuple):
    """What the first forward pass over a composed prompt reads: tokens of several chains, of which the last goes on."""

    ids: list[int]
    takes: list[Take]


class Recorder:
    """The rows of one cache. ``places[i]`` is the row that the batch's i-th sequence continues."""

    def __init__(
        self,
        rows: Sequence[Row],
        columns: torch.Tensor,
        rotations: Sequence[Rotation],
        dtype: torch.dtype,
        windows: bool,
        opening: Opening | None = None,
    ) -> None:
        self.rows = list(rows)
        self._opening = opening  # until the first forward pass
        self.texts = [take.row for take in opening.takes if take.row not in self.rows] if opening else []  # end with it
        self.places = list(range(len(self.rows)))
        self.calls = heard()
        self._known = columns  # [rows, columns]: which columns hold a token
        self._more = 0  # columns behind them, which all hold one in all rows
        self._full: list[bool] | None = None  # whether all of a row's known columns hold one; None: to be looked at
        self._total = columns.shape[1]  # columns of the cache; more than are known once recording has ended
        self._rotations = rotations
        self._dtype = dtype
        self._windows = windows  # holes between tokens would shift index-based windows
        self._steps: list[Step] | None = None
        self._layers = 0
        self._width = 0
        self._fresh: torch.Tensor | None = None
        # This pass reads one token: of each layer its number, keys, values and the calls that may have made the keys,
        # put here by the cache. They are looked at when all layers are known. None: ``layer`` is to be called.
        self.seen: list[tuple[Any, ...]] | None = None

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def begin(self, ids: Any, mask: Any, positions: Any) -> None:
        """A forward pass over ``ids`` starts, with what the model was given besides."""
        self._steps, self._layers, self._width, self._fresh, self.seen = [], 0, 0, None, None
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return self.end_all("the model was not given token ids")
        opening, self._opening = self._opening, None
        if opening is not None:
            return self._open(opening, on_host(ids))
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            return self.end_all("the attention mask was not two-dimensional")
        if ids.device.type != "cpu":  # all rows at once: every trip waits for the device
            ids, mask, positions = on_host(ids), on_host(mask), on_host(positions)
        past, new = self._past, ids.shape[1]
        if mask is not None and mask.shape[1] != past + new:
            return self.end_all(f"the attention mask has {mask.shape[1]} columns for {past + new} tokens")
        live = [index for index, row in enumerate(self.rows) if row.ended is None or self.reopened(row)]
        fresh = torch.ones((len(self.rows), new), dtype=torch.bool)
        for index in live:
            places = [place for place, row in enumerate(self.places) if row == index]
            if not places:
                self.rows[index].end("its sequence was dropped from the batch")
                continue
            if any(not torch.equal(ids[places[0]], ids[place]) for place in places[1:]):
                self.rows[index].end("sequences that continue it parted")
                continue
            if mask is not None:
                given = mask[places[0]].to("cpu", torch.bool)
                if not torch.equal(given[:past], self.columns[index]):
                    self.rows[index].end("the attention mask hides or shows other tokens than were read")
                    continue
                fresh[index] = given[past:]
            elif not self._unpadded(index):
                self.rows[index].end("no attention mask was given for a padded row")
                continue
            self._begin_row(self.rows[index], places[0], ids[places[0]], fresh[index], positions)
        self._fresh = fresh
        if new == 1 and self._steps and all(step.row.alike for step in self._steps):
            self.seen = []

    def _open(self, opening: Opening, ids: torch.Tensor) -> None:
        """The first forward pass over a composed prompt starts."""
        if any(row != opening.ids for row in ids.tolist()):
            return self.end_all("the prompt was not read in one piece")
        assert self._steps is not None
        for row, tokens, runs in opening.takes:
            room = row.prepare(len(tokens))
            if room == len(tokens):
                self._steps.append(Step(row, 0, runs, tokens))
            elif room and not row.copies:
                self._steps.append(Step(row, 0, [(*runs[0][:2], room)], tokens[:room]))
        self._fresh = torch.ones((1, len(opening.ids)), dtype=torch.bool)

    @staticmethod
    def reopened(row: Row) -> bool:
        """Whether a row that was saved can go on: the same cache is used for the next turn."""
        reopen, row.reopen = row.reopen, None
        return reopen is not None and reopen()

    def _begin_row(self, row: Row, place: int, ids: torch.Tensor, fresh: torch.Tensor, positions: Any) -> None:
        size = ids.shape[0]
        count = int(fresh.sum()) if size > 1 else int(fresh[0])
        if not count:
            return
        first, position = size - count, row.position
        if count < size and (not bool(fresh[first:].all()) or (self._windows and row.column)):
            return row.end("the attention mask has holes between tokens")
        if isinstance(positions, torch.Tensor):
            if positions.ndim != 2:
                return row.end("positions were not two-dimensional")
            given = positions[place if positions.shape[0] > 1 else 0, -size:][first:].tolist()
            if given[0] != position or given != list(range(position, position + count)):
                return row.end(f"positions do not follow the {position} before")
        elif self._past + first != position:
            return row.end("no position ids were given for a padded row")
        wanted = ids[first:].tolist()
        room = row.prepare(count)
        if room:
            assert self._steps is not None
            self._steps.append(Step(row, place, [(first, 0, room)], wanted[:room]))

    def layer(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """``Cache.update`` was given these new keys (what turns) and values of a slot."""
        if self._steps is None:
            self.end_all("tokens passed through a model that is not attached to this cache")
        elif self._steps:
            originals = self._rotations[slot].originals(self.calls, keys)
            if originals is None or originals.dtype != self._dtype or values.dtype != self._dtype:
                self.stop(f"layer {slot} made its keys in another way than at the attach test")
            else:
                self._write(slot, originals.detach(), values.detach())
        self._layers += 1
        self._width = keys.shape[-2]
        self.calls.clear()

    def _write_together(self, seen: list[tuple[Any, ...]]) -> None:
        """One token in all layers: one gather and one copy instead of two for each layer."""
        self._layers, self._width = len(seen), 1
        states: list[torch.Tensor] = []
        for number, (slot, keys, values, *calls) in enumerate(seen):
            originals = self._rotations[number].originals(calls, keys) if slot == number else None
            if originals is None or originals.dtype != self._dtype or values.dtype != self._dtype:
                return self.stop(f"layer {slot} made its keys in another way than at the attach test")
            states += (originals, values)
        if len(seen) == len(self._rotations):
            with torch.no_grad():
                token = torch.cat(states).view(len(seen), 2, -1, *states[0].shape[1:])
                for row, place, _, _ in self._steps or ():
                    row.write_token(token[:, :, place].squeeze(-2))

    def _write(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self._steps is not None
        for row, place, runs, _ in self._steps:
            for first, at, count in runs:
                row.write(slot, keys[place].narrow(1, first, count), values[place].narrow(1, first, count), at=at)

    def finish(self) -> None:
        """The forward pass is over; its tokens count when every layer was seen."""
        seen, self.seen = self.seen, None
        if seen is not None:
            self._write_together(seen)
        steps, self._steps = self._steps, None
        self.calls.clear()
        self._total += self._width
        if self._layers != len(self._rotations):
            self.end_all("a forward pass was interrupted")
        elif self._fresh is not None:
            self._add(self._fresh)
            for row, _, _, ids in steps or ():
                row.extend(ids)
            for row in self.texts:
                row.end("it is whole")

    # -- what the cache is told ---------------------------------------------------------------------------------------

    def select(self, places: Sequence[int]) -> None:
        """The batch is now these of its sequences (beams reordered, repeated or dropped)."""
        self.places = [self.places[place] for place in places]

    def repeat(self, times: int) -> None:
        """Every sequence of the batch is now there ``times`` times."""
        self.places = [place for place in self.places for _ in range(times)]

    def crop(self, tokens: int, unread: bool) -> None:
        """The last ``tokens`` columns were removed."""
        self._total = max(0, self._total - tokens)
        self._known, self._full = self.columns[:, : self._total], None
        for row, left in zip(self.rows, self._known.sum(dim=1).tolist(), strict=True):
            if left < row.column - len(row.ids):
                row.end("cropped to before where it begins")
            row.crop(min(len(row.ids), max(0, row.column - left)), unread)

    def end_all(self, reason: str) -> None:
        """Record nothing more in any row."""
        for row in (*self.texts, *self.rows):
            row.end(reason)

    def stop(self, reason: str) -> None:
        """Record nothing more, and nothing of the forward pass that is running."""
        if self._steps is not None:
            self._steps = []
        self.end_all(reason)

    def leave(self, row: Row, reason: str) -> None:
        """Record nothing more of one row, and nothing of it in the forward pass that is running."""
        if self._steps is not None:
            self._steps = [step for step in self._steps if step.row is not row]
        row.end(reason)

    def discard(self) -> None:
        """Give all private blocks back."""
        for row in (*self.texts, *self.rows):
            row.end("the hit was dropped")
            row.discard()

    # -- which columns hold a token -----------------------------------------------------------------------------------

    @property
    def columns(self) -> torch.Tensor:
        """[rows, columns known]: which columns hold a token that was read."""
        if self._more:
            behind = torch.ones((self._known.shape[0], self._more), dtype=torch.bool)
            self._known, self._more = torch.cat((self._known, behind), dim=1), 0
        return self._known

    @property
    def _past(self) -> int:
        return self._known.shape[1] + self._more

    def _unpadded(self, row: int) -> bool:
        if self._full is None:
            self._full = self._known.all(dim=1).tolist()
        return self._full[row]

    def _add(self, fresh: torch.Tensor) -> None:
        if bool(fresh.all()):
            self._more += fresh.shape[1]
        else:
            self._known, self._full = torch.cat((self.columns, fresh), dim=1), None


def on_host(value: Any) -> Any:
    """The tensor in host memory; what is no tensor as it is."""
    return value.to("cpu") if isinstance(value, torch.Tensor) else value
