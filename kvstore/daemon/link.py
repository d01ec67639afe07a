"""One connection as the daemon has it: frames in, frames and descriptors out, nothing that waits.

A peer that sends half a frame and no more, or does not read what it is sent, is dropped; nobody else notices.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.daemon.pipe import Pipe
from kvstore.daemon.wire import HEADER, MAX_VALUES, BadFrame, Head, Kind, head_of, pack, unpack

log = logging.getLogger("kvstore")

UNREAD = 4 << 20  # bytes beyond one answer that a peer may leave unread
PATIENCE = 10.0  # seconds within which a frame that has begun must be there
GREETING = 5.0  # and the first one
AT_ONCE = 256 << 10  # bytes that are read in one go
MAX_FDS = 250  # that one message can carry


class Link:
    """A connected socket on the loop of the thread that made it; all methods are called there."""

    def __init__(
        self,
        sock: Pipe,
        limit: int,
        heard: Callable[[Kind, int, Any], None],
        lost: Callable[[str], None],
    ) -> None:
        """``heard`` gets each frame, ``lost`` why there will be no more, once. ``limit``: bytes of a body."""
        sock.setblocking(False)
        self._socket, self._limit, self._heard, self._lost = sock, limit, heard, lost
        self._loop = asyncio.get_running_loop()
        self._head: Head | None = None
        self._buffer, self._filled = bytearray(HEADER.size), 0
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._out_bytes, self._last = 0, 0
        self._held, self._closed = False, False
        self._timer = self._loop.call_later(GREETING, self._late)
        self._loop.add_reader(sock.fileno(), self._read)

    @property
    def unread(self) -> int:
        """Bytes that the peer has not taken yet."""
        return self._out_bytes

    def redirect(self, heard: Callable[[Kind, int, Any], None], lost: Callable[[str], None], limit: int) -> None:
        """Others hear from now on, and take bodies of so many bytes."""
        self._heard, self._lost, self._limit = heard, lost, limit

    def hold(self) -> None:
        """Hears nothing more until ``go_on``."""
        if not self._closed and not self._held:
            self._held = True
            self._loop.remove_reader(self._socket.fileno())

    def go_on(self) -> None:
        """Hears again."""
        if not self._closed and self._held:
            self._held = False
            self._loop.add_reader(self._socket.fileno(), self._read)

    def send(self, kind: Kind, number: int, value: object, fds: Sequence[int] = ()) -> None:
        """Sends a frame, and descriptors, which it closes; at once, or as the peer reads."""
        frames = [fds[start : start + MAX_FDS] for start in range(0, len(fds), MAX_FDS)] or [()]
        data = memoryview(pack(kind, number, value))
        if self._closed:
            for fd in fds:
                os.close(fd)
            return
        for some in frames[:-1]:  # more than fit: an empty event in front carries them
            self._push(memoryview(pack(Kind.EVENT, 0, [])), list(some))
        self._push(data, list(frames[-1]))
        self._write()
        if self._out_bytes > UNREAD + self._last:
            self.close(f"it left {self._out_bytes} bytes unread")

    def close(self, why: str = "") -> None:
        """Ends the connection; ``lost`` is told, unless it knows."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        for _, fds in self._out:
            for fd in fds:
                os.close(fd)
        self._out.clear()
        self._socket.close()
        self._lost(why)

    def _push(self, data: memoryview, fds: list[int]) -> None:
        self._out.append((data, fds))
        self._out_bytes += len(data)
        self._last = len(data)

    def _write(self) -> None:
        try:
            while self._out:
                data, fds = self._out[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._socket.sendmsg([data], rights)
                for fd in fds:
                    os.close(fd)
                fds.clear()
                self._out_bytes -= sent
                if sent < len(data):
                    self._out[0] = data[sent:], fds
                    break
                self._out.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(str(error))
            return
        if self._out:
            self._loop.add_writer(self._socket.fileno(), self._write)
        else:
            self._loop.remove_writer(self._socket.fileno())

    def _read(self) -> None:
        """Takes what is there, one frame at most, so that one peer does not keep the loop from others."""
        view = memoryview(self._buffer)
        try:
            got = self._socket.recv_into(view[self._filled : self._filled + AT_ONCE])
        except BlockingIOError:
            return
        except OSError as error:
            self.close(str(error))
            return
        finally:
            view.release()
        if not got:
            self.close("" if self._head is None and not self._filled else "it broke off")
            return
        if not self._filled and self._head is None:
            self._expect(PATIENCE)
        self._filled += got
        if self._filled < len(self._buffer):
            return
        try:
            if self._head is None:
                self._head = head_of(self._buffer, self._limit)
                self._buffer, self._filled = bytearray(min(self._head.length, AT_ONCE)), 0
                if self._head.length:
                    self._read()  # the rest is mostly there already
                    return
            head, body = self._head, self._buffer
            if self._filled < head.length:  # what was announced takes memory as it comes, not before
                body.extend(bytes(min(head.length - self._filled, max(self._filled, AT_ONCE))))
                return
            value = unpack(head, body, MAX_VALUES)
        except BadFrame as error:
            self.close(str(error))
            return
        self._head, self._buffer, self._filled = None, bytearray(HEADER.size), 0
        self._timer.cancel()
        self._heard(head.kind, head.number, value)

    def _expect(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self.close("it did not finish its message in time")
