"""TLS sockets for the daemon's frames, used as Unix sockets are: in a loop on one side, with deadlines on the other.

No descriptor can be passed through one, and none is expected.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvstore.errors import BadInput, Unreachable

SLICE = 64 << 10  # bytes that are encrypted in one go; what could not be sent must be offered again just so
AT_ONCE = 256 << 10  # that are sent or read before others have their turn


class Secured:
    """One TLS connection; see ``Pipe``. One thread at a time, but for ``shutdown``."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._socket = sock

    @property
    def pending(self) -> bool:
        """Whether bytes are there that the system does not know of any more: no poll tells of them."""
        return self._socket.pending() > 0

    def fileno(self) -> int:
        """See ``socket.socket``; so with all that follows."""
        return self._socket.fileno()

    def setblocking(self, flag: bool, /) -> None:
        self._socket.setblocking(flag)

    def settimeout(self, value: float | None, /) -> None:
        self._socket.settimeout(value)

    def recv_into(self, buffer: memoryview, /) -> int:
        """As much as is there, for sockets that do not block."""
        got = 0
        try:
            while got < len(buffer) and (some := self._socket.recv_into(buffer[got:])):
                got += some
        except ssl.SSLWantReadError:
            if not got:
                raise BlockingIOError from None
        except ssl.SSLWantWriteError as error:
            raise ConnectionAbortedError("it does not read what it is sent") from error
        return got

    def recvmsg_into(
        self, buffers: Iterable[memoryview], ancbufsize: int, flags: int, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """One record or less, for sockets that do block."""
        (buffer,) = buffers
        return self._socket.recv_into(buffer), [], 0, None

    def sendmsg(self, buffers: Iterable[memoryview], ancdata: Sequence[tuple[int, int, Any]], /) -> int:
        """As much as goes now, for sockets that do not block."""
        (data,) = buffers
        sent, stop = 0, min(len(data), AT_ONCE)
        try:
            while sent < stop:
                sent += self._socket.send(data[sent : sent + SLICE])
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            if not sent:
                raise BlockingIOError from None
        return sent

    def sendall(self, data: bytes, /) -> None:
        """All of it within the timeout, unlike ``ssl.SSLSocket.sendall``, which has it for every part."""
        view, timeout = memoryview(data), self._socket.gettimeout()
        deadline = time.monotonic() + (timeout or 0.0)
        for start in range(0, len(view), SLICE):
            if timeout is not None:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            self._socket.send(view[start : start + SLICE])

    def shutdown(self, how: int, /) -> None:
        """Of what is below TLS: another thread may be reading, and must not go on in the clear."""
        socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        self._socket.close()


def server_context(certificate: Path, private_key: Path) -> ssl.SSLContext:
    """What the daemon is, for who connects. Raises ``BadInput``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # every connection says who it is anew
    try:
        context.load_cert_chain(certificate, private_key, password=b"")  # no password is ever asked for
    except (OSError, ValueError) as error:
        said = "tcp.certificate and tcp.private_key must be a certificate and its key, in PEM and without a password"
        raise BadInput(f"{said}: {error}") from error
    return context


def client_context(ca: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """Whom a client trusts: who is certified by ``ca`` (a file in PEM), or else by whom the system trusts.

    Raises ``BadInput``."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise BadInput(f"ca={os.fspath(ca or '')!r} is no file of certificates in PEM: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def dialled(host: str, port: int, context: ssl.SSLContext, deadline: float) -> Secured:
    """A connection to a daemon that is who it should be, within the deadline. Raises ``Unreachable``."""
    failed: OSError = TimeoutError("no answer")
    sock: socket.socket | None = None
    places = _addresses(host, port, deadline)
    for number, (family, address) in enumerate(places):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(0.001, (deadline - time.monotonic()) / (len(places) - number)))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            secured = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sock = secured
            secured.settimeout(max(0.001, deadline - time.monotonic()))
            secured.do_handshake()
            return Secured(secured)
        except OSError as error:
            failed = error
            sock.close()
    text = failed.verify_message if isinstance(failed, ssl.SSLCertVerificationError) else failed.strerror or str(failed)
    raise Unreachable(f"no daemon that is trusted here listens at {host}:{port} ({text})") from failed


def _addresses(host: str, port: int, deadline: float) -> list[tuple[int, Any]]:
    """Where a host is. A name server that is silent is not waited for: its answer finds nobody."""
    found: list[tuple[int, Any]] = []
    failures: list[OSError] = []

    def ask() -> None:
        try:
            known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            failures.append(OSError(str(error)))
        else:
            found.extend((family, address) for family, _, _, _, address in known)

    asking = threading.Thread(target=ask, name="kvstore-name", daemon=True)
    asking.start()
    asking.join(max(0.0, deadline - time.monotonic()))
    if not found:
        text = str(failures[0]) if failures else "no answer"
        raise Unreachable(f"where {host} is cannot be found out ({text})")
    return list(found)


def listening(host: str, port: int, backlog: int) -> socket.socket:
    """A listening TCP socket. Raises ``BadInput``."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=backlog)
    except (OSError, UnicodeError) as error:
        raise BadInput(f"{host}:{port} cannot be listened at ({error}); give another tcp.listen") from error
