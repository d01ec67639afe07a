"""What carries frames: a Unix socket, or a TLS one that is used in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Pipe(Protocol):
    """A connected socket, as far as frames need it; see ``socket.socket``."""

    def fileno(self) -> int: ...

    def setblocking(self, flag: bool, /) -> None: ...

    def settimeout(self, value: float | None, /) -> None: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def recvmsg_into(
        self, buffers: Iterable[memoryview], ancbufsize: int, flags: int, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]: ...

    def sendmsg(self, buffers: Iterable[memoryview], ancdata: Sequence[tuple[int, int, Any]], /) -> int: ...

    def sendall(self, data: bytes, /) -> None: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...
