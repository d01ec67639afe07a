"""A small HTTP server whose cost is bounded, whoever calls: one request a connection, GET and HEAD only.

Idle and slow callers cost a socket for a few seconds. Beyond ``CONNECTIONS`` the one that has waited longest with its
request is cut off for the next, so that callers who do send one are served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import parse_qsl

CONNECTIONS = 64
BACKLOG = 512  # that the system has ready meanwhile; those beyond would try again a second later
HEAD_BYTES = 8192  # of a request's line and headers
HEAD_SECONDS = 5.0  # for all of them
SEND_SECONDS = 10.0  # for the answer
FIELDS = 8  # of a query

# A page of ours loads nothing, is framed by nobody, and is read by no other page.
ALWAYS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Connection": "close",
}


@dataclass(frozen=True, slots=True)
class Request:
    """``path`` as it was sent, without the query; ``host``: the Host header."""

    path: str
    query: Mapping[str, str]
    host: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent back; ``headers`` beside those that are always there."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


class BadRequest(Exception):
    """Not what this server understands; ``status`` says how so."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Listener:
    """One listening socket. Belongs to the loop that it is opened in."""

    def __init__(self, answer: Callable[[Request], Awaitable[Reply]]) -> None:
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._tasks = set[asyncio.Task[None]]()
        self._waiting: dict[asyncio.StreamWriter, None] = {}  # have not sent their request yet, oldest first
        self._open = 0

    async def open(self, host: str, port: int) -> tuple[str, int]:
        """Listens; where. Port 0: any. Raises ``OSError``, or ``UnicodeError`` for what is no host's name."""
        self._server = await asyncio.start_server(self._connected, host, port, limit=HEAD_BYTES, backlog=BACKLOG)
        name: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return name

    async def close(self) -> None:
        """Ends all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= CONNECTIONS:
            oldest = next(iter(self._waiting), writer)
            oldest.transport.abort()
            if oldest is writer:
                return
            del self._waiting[oldest]
        self._open += 1
        self._waiting[writer] = None
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head, reply = await self._answered(reader, writer)
            await asyncio.wait_for(_send(writer, reply, head), SEND_SECONDS)
        except (TimeoutError, OSError, EOFError):  # gone, or too slow
            pass
        finally:
            self._waiting.pop(writer, None)
            self._open -= 1
            writer.transport.abort()

    async def _answered(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[bool, Reply]:
        """Whether only the head is wanted, and the reply."""
        try:
            text = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_SECONDS)
            self._waiting.pop(writer, None)
            method, request = _parsed(text)
            return method == "HEAD", await self._answer(request)
        except asyncio.LimitOverrunError:
            return False, _refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except BadRequest as error:
            return False, _refused(error.status)


def _parsed(head: bytes) -> tuple[str, Request]:
    """Method and request. Raises ``BadRequest``."""
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0") or not words[1].startswith("/"):
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    if words[0] not in ("GET", "HEAD"):
        raise BadRequest(HTTPStatus.METHOD_NOT_ALLOWED)
    hosts = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or any(ord(letter) < 32 for letter in line.replace("\t", " ")):
            raise BadRequest(HTTPStatus.BAD_REQUEST)
        if name.lower() == "host":
            hosts.append(value.strip())
    if len(hosts) != 1:
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    path, _, query = words[1].partition("?")
    try:
        return words[0], Request(path, dict(parse_qsl(query, max_num_fields=FIELDS)), hosts[0])
    except ValueError as error:
        raise BadRequest(HTTPStatus.BAD_REQUEST) from error


def _refused(status: int) -> Reply:
    allowed = {"Allow": "GET, HEAD"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}
    return Reply(status, f"{HTTPStatus(status).phrase}\n".encode(), headers=allowed)


async def _send(writer: asyncio.StreamWriter, reply: Reply, only_head: bool) -> None:
    """Returns when all of it is on its way."""
    headers = {
        "Content-Type": reply.content_type,
        "Content-Length": str(len(reply.body)),
        "Date": formatdate(usegmt=True),
        **ALWAYS,
        **reply.headers,
    }
    lines = [f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}", *(f"{n}: {v}" for n, v in headers.items())]
    writer.transport.set_write_buffer_limits(high=0)
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if only_head else reply.body))
    await writer.drain()
    writer.close()
    await writer.wait_closed()
