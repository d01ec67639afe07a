"""What is stored of the blocks that new tokens go into: it becomes the beginning of what is recorded."""

from __future__ import annotations

from kvstore.adapters.transformers.gather import Gather
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.row import Copy, Row


class Seeding:
    """Brings it while a load's layers are taken, for all rows of a recorder. In the thread in which the model runs.

    What the engine's stream is sent stands behind all that was sent for loads: seeds layer by layer would hold it up in
    each. So where a device records and the stored block is full, all its layers are sent at once. A single token is
    written when all layers are known, so its seed comes with the last of them.
    """

    def __init__(self, gather: Gather, recorder: Recorder, layers: int) -> None:
        self._gather, self._recorder, self._last = gather, recorder, layers - 1
        self._whole: dict[Row, int] = {}  # with which layer all layers of a row's seed come

    def bring(self, layer: int) -> None:
        """Of a layer that has just been taken; the load goes on."""
        gather = self._gather
        for row in (*self._recorder.texts, *self._recorder.rows):
            tokens = row.tail()[1]
            tail = Copy(row.seat.source, row.base - tokens - row.seat.skipped, 0, tokens)
            if not all(gather.has_originals(copy.source, copy.first, copy.tokens) for copy in (*row.copies, tail)):
                self._recorder.leave(row, "it goes on in a block whose keys another engine has stored rotated")
                continue
            for copy in row.copies if row.ended is None else ():
                at = copy.at
                for keys, values in gather.originals(layer, copy.source, copy.first, copy.tokens):
                    row.write(layer, keys, values, at=at)
                    at += keys.shape[1]
                gather.read(copy.source)
            if tokens and row.wants_seed and not self._comes_whole(layer, row, tail):
                for originals in gather.originals(layer, tail.source, tail.first, tokens):
                    row.seed(layer, *originals)  # they are all in one block
                gather.read(tail.source)

    def _comes_whole(self, layer: int, row: Row, tail: Copy) -> bool:
        """Whether all layers of a seed come at once, which is done when it is time."""
        if not layer and row.staged and self._gather.whole(tail.source, tail.first, tail.tokens) is not None:
            self._whole[row] = 0 if self._recorder.seen is None else self._last
        if layer == self._whole.get(row):
            payload = self._gather.whole(tail.source, tail.first, tail.tokens)
            if payload is None or not row.seed_whole(payload):
                self._recorder.stop("what a block begins with could not be brought")
            self._gather.read(tail.source)
        return row in self._whole
