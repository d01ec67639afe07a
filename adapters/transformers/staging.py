"""Blocks under recording in the device's own memory, and how they leave for the host while generation goes on.

A full block is one buffer on the device, laid out as its payload, which the engine's stream writes. It leaves in one
copy on a side stream. The race that the events here rule out: (1) the engine's stream has been asked for the last
tokens of a block, but has not come to them yet; (2) the side stream copies the buffer; (3) the next block is written
into it. So (2) starts behind an event of the engine's stream, and (3) behind one of the side stream: a buffer whose
event is not over is not handed out. The engine's stream itself never waits.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from kvstore.adapters.transformers.block import Block
from kvstore.adapters.transformers.buffers import payload_of
from kvstore.layout import Layout
from kvstore.metrics import Counters
from kvstore.tensors.streams import CudaStream, Event, Stream, current

log = logging.getLogger("kvstore")

LEAVING_BYTES = 512 << 20  # that may wait for the host link
TOO_SLOW = "the link to the host is too slow for what is recorded"
NO_MEMORY = "the device has no memory left for recording"

Cargo = Sequence[tuple[torch.Tensor, torch.Tensor]]  # from (on the device) and to (in a draft), both contiguous


class Leaving(NamedTuple):
    """A buffer that may be written again as soon as ``left`` is over; ``filled``: the engine had written it."""

    buffer: torch.Tensor
    filled: Event
    left: Event


class Staging:
    """Device buffers of one block each, and the side stream on which they leave. Any thread.

    As many buffers may be leaving as take ``leaving_bytes``, or one for each row if those are more: the rows of a batch
    may fill their blocks in the same step. Counts ``blocks_recorded_directly`` (there was no device
    memory, so that every write waits for the host) and ``recordings_cut`` (the link was too slow).
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        side: Stream,  # closed with the staging
        *,
        engine: Callable[[], Stream] | None = None,  # the stream that writes, as the calling thread has it now
        leaving_bytes: int = LEAVING_BYTES,
        allocate: Callable[..., torch.Tensor] = torch.empty,
    ) -> None:
        self.payload = payload_of(layout, dtype)
        self.counters = Counters()
        self.short = False  # the device had no memory for a buffer, so nobody asks it again
        self._device, self._side, self._allocate = device, side, allocate
        self._engine: Callable[[], Stream] = engine or (lambda: current(device))
        self._most_leaving = max(2, leaving_bytes // (self.payload.elements * dtype.itemsize))
        self._lock = threading.Lock()  # guards taking buffers from _leaving
        # Finalizers put into these three; each does it in one step, and takes no lock.
        self._leaving: deque[Leaving] = deque()
        self._written: set[int] = set()  # addresses of the buffers that are being written
        self._dropped: deque[tuple[Any, Event]] = deque()  # drafts that something may still look at
        self.close = weakref.finalize(self, _close, side, self._dropped)
        self.close.atexit = False

    # -- blocks -------------------------------------------------------------------------------------------------------

    def block(self, draft: Any) -> Block | None:
        """A block to record into; None when too many are leaving already. Takes over the draft.

        Without device memory it is written straight into the draft.
        """
        buffer = self.buffer()
        if buffer is not None:
            return StagedBlock(self, draft, buffer)
        if self.short:
            self.counters.add("blocks_recorded_directly")
            return Block(draft, self.payload)
        self.counters.add("recordings_cut")
        draft.discard()
        return None

    def passing(self, draft: Any) -> StagedBlock:
        """A block that one forward pass fills: see ``Passage``. It has no buffer of its own."""
        return StagedBlock(self, draft, None)

    # -- buffers ------------------------------------------------------------------------------------------------------

    def buffer(self, ahead: bool = False) -> torch.Tensor | None:
        """A buffer of one payload that nobody uses; None when ``short``, or when too many are leaving.

        ``ahead``: while a long prompt is read, the host may be layers ahead of the device, and all that the device has
        not come to yet seems to be leaving. Then the host waits for one of them: for the device, and for the link only
        while the device has other work queued.
        """
        self._settle()
        buffer = self._take()
        if buffer is None and ahead and not self.short and self._leaving:
            here, oldest = self._engine().record(), self._leaving[0]
            oldest.filled.wait()
            if not here.done():
                oldest.left.wait()
            buffer = self._take()
        return buffer

    def send(self, buffer: torch.Tensor, cargo: Cargo) -> Event:
        """Have the side stream copy what the engine's stream has written so far; then the buffer is free again.

        The event is over when the copies are.
        """

        def leave() -> None:
            for source, target in cargo:
                target.copy_(source, non_blocking=True)

        filled = self._engine().record()
        self._side.wait(filled)
        self._side.run(leave)
        left = self._side.record()
        self.give_back(buffer, filled, left)
        return left

    def fetch(self, buffer: torch.Tensor, host: torch.Tensor, left: Event | None) -> None:
        """Bring back what has left for ``host``. Only rewinding does this, and it is the one case where the engine's
        stream waits for the side stream."""
        if left is not None:
            self._engine().wait(left)
        buffer.copy_(host, non_blocking=True)

    def engine(self) -> Stream:
        """The stream that writes, for the calling thread."""
        return self._engine()

    def give_back(self, buffer: torch.Tensor, filled: Event, left: Event) -> None:
        """The buffer is free as soon as ``left`` is over."""
        self._leaving.append(Leaving(buffer, filled, left))
        self._written.discard(buffer.data_ptr())

    def drop(self, draft: Any, after: Event | None) -> None:
        """Give a draft back to the store as soon as ``after`` is over: until then a copy may write to it, or read."""
        if after is None or after.done():
            draft.discard()
        else:
            self._dropped.append((draft, after))

    def _take(self) -> torch.Tensor | None:
        with self._lock:
            most = max(self._most_leaving, len(self._written) + 1)  # one for each row that is being recorded
            if self._leaving and self._leaving[0].left.done():
                buffer = self._leaving.popleft().buffer
                while len(self._leaving) > most and self._leaving[0].left.done():
                    self._leaving.popleft()  # of a batch that is gone
            elif not self.short and len(self._leaving) <= most:
                made = self._made()
                if made is None:
                    return None
                buffer = made
            else:
                return None
            self._written.add(buffer.data_ptr())
            return buffer

    def _made(self) -> torch.Tensor | None:
        """A new buffer. The first time that there is none is the last that the device is asked."""
        try:
            with torch.inference_mode(False):  # later writes come from either mode
                buffer = self._allocate(self.payload.elements, dtype=self.payload.dtype, device=self._device)
        except torch.OutOfMemoryError as error:
            self.short = True
            log.warning("%s; blocks go straight to host memory, which slows generation: %s", NO_MEMORY, error)
            return None
        if buffer.is_cuda:
            # Should the buffer be dropped, its memory is nobody else's before the side stream is done with it.
            device = self._device
            self._side.run(lambda: buffer.record_stream(torch.cuda.current_stream(device)))
        return buffer

    def _settle(self) -> None:
        for _ in range(len(self._dropped)):
            try:
                draft, after = self._dropped.popleft()
            except IndexError:  # another thread was quicker
                return
            self.drop(draft, after)


class StagedBlock(Block):
    """A block that is written into a device buffer, while it is ``open``, and then leaves for its draft."""

    def __init__(self, staging: Staging, draft: Any, buffer: torch.Tensor | None) -> None:
        self.left: Event | None = None  # over when all that was sent is in the draft
        self._staging = staging
        self._buffer = buffer
        self._engine = staging.engine()
        super().__init__(draft, staging.payload)

    @property
    def open(self) -> bool:
        """See ``Block``."""
        return self._buffer is not None

    def seed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See ``Block``. Host tensors may change as soon as this returns: what the device reads is a copy, side by
        side in the draft's own memory, which the block itself overwrites later."""
        if keys.device.type == "cpu":
            start, sizes = self.payload.starts[layer], (keys.numel(), values.numel())
            kept = self.host.narrow(0, start, sum(sizes)).split(sizes)
            keys = kept[0].view(keys.shape).copy_(keys)
            values = kept[1].view(values.shape).copy_(values)
        self.keys[layer].narrow(1, 0, keys.shape[1]).copy_(keys, non_blocking=True)
        self.values[layer].narrow(1, 0, values.shape[1]).copy_(values, non_blocking=True)

    def seed_whole(self, payload: torch.Tensor, tokens: int) -> None:
        """``seed`` of all layers, with the first ``tokens`` of a full block, of which these are the bytes. They must
        stay until the engine's stream has read them."""
        assert self._buffer is not None
        there = payload.to(self._buffer.device, non_blocking=True).view(self.payload.dtype)
        whole = self.payload.whole(there)
        if whole is not None and self.whole is not None:
            self.whole.narrow(3, 0, tokens).copy_(whole.narrow(3, 0, tokens))
            return
        for layer in range(len(self.keys)):
            for mine, stored in zip(
                (self.keys[layer], self.values[layer]), self.payload.layer(there, layer), strict=True
            ):
                mine.narrow(1, 0, tokens).copy_(stored.narrow(1, 0, tokens))

    def seal(self) -> None:
        """See ``Block``."""
        if self._buffer is not None:
            self.left = self._staging.send(self._buffer, [(self._buffer, self.host)])
            self._close()

    def reopen(self) -> str | None:
        """See ``Block``."""
        if self._buffer is None:
            self._buffer = self._staging.buffer()
            if self._buffer is None:
                return NO_MEMORY if self._staging.short else TOO_SLOW
            self._engine = self._staging.engine()
            self._staging.fetch(self._buffer, self.host, self.left)
            self._show(self._buffer)
        return None

    def release(self) -> Any:
        """See ``Block``."""
        self.seal()
        if self.left is not None:
            self.left.wait()
        return super().release()

    def discard(self) -> None:
        """See ``Block``."""
        after = self.left
        if self._buffer is not None:
            # The engine's stream may still write to the buffer, or read seeds from the draft.
            after = self._engine.record()
            self._staging.give_back(self._buffer, after, after)
            self._close()
        self._forget()
        self._staging.drop(self.draft, after)

    def _place(self) -> None:
        if self._buffer is not None:
            self._show(self._buffer)

    def _close(self) -> None:
        self.keys.clear()
        self.values.clear()
        self.whole = self._buffer = None


def staging_on(layout: Layout, dtype: torch.dtype, device: torch.device) -> Staging | None:
    """What records on ``device``; None for the CPU, and whatever else has no streams of its own."""
    return Staging(layout, dtype, device, CudaStream(device)) if device.type == "cuda" else None


def _close(side: Stream, dropped: deque[tuple[Any, Event]]) -> None:
    side.close()
    while dropped:
        draft, after = dropped.popleft()
        after.wait()
        draft.discard()
