"""Where clients from other machines come in: TCP with TLS, and only with a tenant's token.

Who has not shown one costs a socket for a few seconds. Beyond ``STRANGERS`` of those the one that has waited longest
is cut off for the next, and none of them keeps a client of this machine out.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from kvstore.daemon.ears import Ears
from kvstore.daemon.link import Link
from kvstore.daemon.packed import checked
from kvstore.daemon.peer import Peer
from kvstore.daemon.pieces import part
from kvstore.daemon.secured import Secured
from kvstore.daemon.server import MAX_HELLO, Server
from kvstore.daemon.session import Session
from kvstore.daemon.wire import Kind, error_of
from kvstore.errors import BadInput

log = logging.getLogger("kvstore")

STRANGERS = 64  # connections that have not said whose they are
REFUSAL = 0.5  # seconds after which those who are nobody's learn it: guessing takes time
JOINING = 5.0  # seconds within which a client's second connection must be there
MAX_FRAME = 4 << 20  # bytes of a message
SECRET_BYTES = 16
_NOBODY = -1  # no user, no process of this machine


class SecuredLink(Link):
    """A link through TLS."""

    def __init__(self, pipe: Secured, heard: Callable[[Kind, int, Any], None], lost: Callable[[str], None]) -> None:
        """See ``Link``."""
        self._secured = pipe
        super().__init__(pipe, MAX_HELLO, heard, lost)

    def go_on(self) -> None:
        super().go_on()
        self._look()

    def _read(self) -> None:
        if not self._closed and not self._held:
            super()._read()
            self._look()

    def _look(self) -> None:
        """What has been decrypted already, no poll tells of."""
        if not self._closed and not self._held and self._secured.pending:
            self._loop.call_soon(self._read)


class Door:
    """Takes connections from other machines for a server. Belongs to the server's loop."""

    def __init__(
        self, server: Server, context: ssl.SSLContext, tenant_of: Callable[[Peer, str | None], str | None]
    ) -> None:
        """``tenant_of``: see ``Server``; it is asked only about who gives a token."""
        self._server, self._context, self._tenant_of = server, context, tenant_of
        self._ears = Ears(self._taken)
        self._strangers: dict[SecuredLink, Peer] = {}  # oldest first
        self._joining: dict[bytes, Session] = {}  # by the secret that its second connection will tell

    def listen(self, sock: socket.socket) -> None:
        """Takes connections of a listening TCP socket, which is the door's from now on."""
        self._ears.listen(sock)

    def close(self) -> None:
        """Takes no more; sessions go on."""
        self._ears.close()
        for link in list(self._strangers):
            link.close()

    def _taken(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            secured = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:  # who connects may be gone again
            sock.close()
            log.info("a connection from outside could not be taken: %s", error)
            return
        peer = Peer(_NOBODY, _NOBODY, f"{address[0]} port {address[1]}")
        if len(self._strangers) >= STRANGERS:
            next(iter(self._strangers)).close("others came")
        link: SecuredLink

        def heard(kind: Kind, number: int, value: Any) -> None:
            try:
                self._greet(link, peer, kind, number, value)
            except BadInput as error:
                self._refuse(link, peer, number, error)

        def lost(why: str) -> None:
            if self._strangers.pop(link, None) is not None and why:
                self._server.refused += 1
                log.info("%s is refused: %s", peer, why)

        link = SecuredLink(Secured(secured), heard, lost)
        self._strangers[link] = peer

    def _greet(self, link: SecuredLink, peer: Peer, kind: Kind, number: int, value: Any) -> None:
        """The first frame of a connection. Raises ``BadInput``."""
        if kind != Kind.REQUEST or not isinstance(value, list):
            raise BadInput("it did not say hello")
        if value[:1] == ["join"]:
            self._join(link, peer, number, checked(value, (str, bytes))[1])
            return
        hello, _, token = checked(value, (str, int, (str, type(None))))
        name = self._tenant_of(peer, token) if token is not None else None
        if hello != "hello" or name is None:
            raise BadInput("its token is nobody's that is served here")
        if self._server.full:
            raise BadInput("there are as many clients as there may be")
        del self._strangers[link]
        session = self._server.seat(name, peer, link, MAX_FRAME)
        secret = secrets.token_bytes(SECRET_BYTES)
        self._joining[secret] = session
        self._server.loop.call_later(JOINING, self._late, secret)
        link.send(Kind.ANSWER, number, self._server.welcome(session, MAX_FRAME, join=secret))
        link.hold()  # until it can be told of what happens

    def _join(self, link: SecuredLink, peer: Peer, number: int, secret: bytes) -> None:
        """The second connection of a session."""
        session = self._joining.pop(secret, None)
        if session is None or session.ended:
            raise BadInput("no client waits for this connection")
        del self._strangers[link]
        session.events = link
        link.redirect(partial(self._told, session), partial(self._server.end, session), MAX_FRAME)
        link.send(Kind.ANSWER, number, None)
        session.link.go_on()

    def _late(self, secret: bytes) -> None:
        session = self._joining.pop(secret, None)
        if session is not None:
            self._server.end(session, "its second connection did not come")

    def _refuse(self, link: SecuredLink, peer: Peer, number: int, error: BadInput) -> None:
        def refuse() -> None:
            link.send(Kind.ERROR, number, error_of(error))
            link.close()

        self._server.refused += 1
        log.warning("%s is refused: %s", peer, error)
        link.hold()
        self._server.loop.call_later(REFUSAL, refuse)

    def _told(self, session: Session, kind: Kind, number: int, value: Any) -> None:
        """What comes on a second connection: events, and requests for bytes."""
        link = session.events
        if kind != Kind.REQUEST or link is None:
            self._server.told(session, kind, number, value)
            return
        session.seen = time.monotonic()
        try:
            name, ranges = checked(value, (int, list))
            link.send(Kind.ANSWER, number, part(session, name, ranges))
        except BadInput as error:
            link.send(Kind.ERROR, number, error_of(error))
