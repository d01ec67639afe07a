"""The daemon: listens, says who is who, and has the verbs of each client done, in order.

Everything but the work of stores happens in one thread, that of the loop, so what a session holds needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from kvstore.daemon.ears import Ears
from kvstore.daemon.link import Link
from kvstore.daemon.moving import Reply, intake
from kvstore.daemon.packed import checked
from kvstore.daemon.peer import Peer, peer_of
from kvstore.daemon.session import Session, Tenant, events_of
from kvstore.daemon.verbs import VERBS, Verb
from kvstore.daemon.wire import VERSION, BadFrame, Kind, error_of
from kvstore.errors import BadInput, KVStoreError

log = logging.getLogger("kvstore")

WORKERS, LONG_WORKERS = 4, 64
INTAKE = max(1, min(8, (os.cpu_count() or 2) // 2))  # copies at once: those who fill need cores, too
MAX_HELLO = 16 << 10  # bytes of a first message
MAX_WAITS = 256  # long requests of one client that are under way
NOTHING: Mapping[str, str] = MappingProxyType({})


class Server:
    """Serves tenants' stores to clients on Unix sockets. Made and used in the loop's thread."""

    def __init__(
        self,
        tenants: dict[str, Tenant],
        tenant_of: Callable[[Peer, str | None], str | None],
        lease_ttl: float = 10.0,
        max_sessions: int = 256,
        max_frame: int = 32 << 20,
        about: Mapping[str, str] = NOTHING,
    ) -> None:
        """``tenant_of``: the tenant that a peer is, by what the kernel says of it and the token that it gives; None: it
        is not served. ``about``: see ``House``."""
        self.tenants, self.sessions = tenants, dict[int, Session]()
        self.epoch = secrets.token_hex(8)  # of this daemon: another one holds other blocks under the same numbers
        self.started, self.open = time.monotonic(), True
        self._tenant_of, self.ttl, self.about = tenant_of, lease_ttl, about
        self._most, self._limit = max_sessions, max_frame
        self.loop = asyncio.get_running_loop()
        self._workers = ThreadPoolExecutor(WORKERS, "kvstore-work")
        self._intake = ThreadPoolExecutor(INTAKE, "kvstore-intake")
        self._long = ThreadPoolExecutor(LONG_WORKERS, "kvstore-long")
        self._ears = Ears(self._taken)
        self._links: set[Link] = set()  # that have not said hello
        self._next, self.refused = 1, 0
        self._tasks = set[asyncio.Task[None]]()
        self._reaper = self.loop.call_later(lease_ttl / 4, self._reap)
        for tenant in tenants.values():
            tenant.arenas.retired = partial(self.run_soon, self._retired, tenant)

    # -- connections ---------------------------------------------------------------------------------------------

    def listen(self, sock: socket.socket) -> None:
        """Takes connections of a listening Unix socket, which is the server's from now on."""
        self._ears.listen(sock)

    @property
    def full(self) -> bool:
        """Whether nobody else is taken in."""
        return len(self.sessions) + len(self._links) >= self._most

    def _taken(self, sock: socket.socket, _: object) -> None:
        peer = peer_of(sock)
        if self.full:
            self.refused += 1
            log.warning("%s is refused: there are %d clients", peer, self._most)
            sock.close()
            return
        link: Link | None = None

        def heard(kind: Kind, number: int, value: Any) -> None:
            assert link is not None
            self._links.discard(link)
            self._greet(link, peer, kind, number, value)

        link = Link(sock, MAX_HELLO, heard, lambda why: self._links.discard(link) if link else None)
        self._links.add(link)

    def _greet(self, link: Link, peer: Peer, kind: Kind, number: int, value: Any) -> None:
        """The first frame of a connection."""
        try:
            if kind != Kind.REQUEST or not isinstance(value, list):
                raise BadInput("it did not say hello")
            hello, _, token = checked(value, (str, int, (str, type(None))))
            name = self._tenant_of(peer, token)
            if hello != "hello" or name is None:
                raise BadInput("it is nobody's that is served here")
        except BadInput as error:
            self.refused += 1
            log.warning("%s is refused: %s", peer, error)
            link.send(Kind.ERROR, number, error_of(error))
            link.close()
            return
        try:
            session = self.seat(name, peer, link, self._limit)
        except OSError as error:  # no more descriptors, or no memory
            log.warning("%s cannot be served: %s", peer, error)
            link.close()
            return
        fds = list[int]()
        try:
            fds.append(events_of(session, self._limit, partial(self.told, session), partial(self.leaving, session)))
            fds.append(session.page_fd())
        except OSError as error:
            for fd in fds:
                os.close(fd)
            self.end(session, f"it cannot be served: {error}")
            return
        link.send(Kind.ANSWER, number, self.welcome(session, self._limit), fds)

    def seat(self, tenant: str, peer: Peer, link: Link, limit: int) -> Session:
        """A session for who has said hello through ``link``, and may send bodies of so many bytes."""
        session = Session(self._next, self.tenants[tenant], peer, link, self)
        self._next += 1
        self.sessions[session.number] = session
        session.tenant.sessions.append(session)
        link.redirect(partial(self._heard, session), partial(self.end, session), limit)
        return session

    def welcome(self, session: Session, limit: int, **more: object) -> list[object]:
        """What a new client is told."""
        limits = {"ttl": self.ttl, "frame": limit, **more}
        return [VERSION, self.epoch, session.number, session.tenant.name, limits]

    def end(self, session: Session, why: str = "") -> None:
        """A client is gone, or is to go: what it holds is let go at once."""
        if self.sessions.pop(session.number, None) is None:
            return
        if why:
            log.warning("the session of %s is over: %s", session.peer, why)
        session.tenant.sessions.remove(session)
        jobs = bool(session.jobs)
        session.end()
        session.link.close()
        session.store.stats()  # takes in what has ended
        if jobs:
            session.store.schedule([job for each in session.tenant.sessions for job in each.waiting()])

    def leaving(self, session: Session, why: str = "") -> None:
        """A client has closed its second socket. What it sent on the first before is still done: a save above all."""
        if why:
            self.end(session, why)
        elif not session.ended:
            session.let_go()
            session.store.stats()  # takes in what has ended

    def _reap(self) -> None:
        """Sessions that were silent too long end: their process is stopped, or stuck."""
        now = time.monotonic()
        for session in list(self.sessions.values()):
            if now - session.seen > self.ttl:
                self.end(session, f"nothing was heard of it for {self.ttl:g} seconds")
        for tenant in self.tenants.values():
            if tenant.host.used > tenant.host.capacity:  # its budget was made smaller while leases held it
                self._workers.submit(tenant.store.stats)
        self._reaper = self.loop.call_later(self.ttl / 4, self._reap)

    def run_soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Has the loop's thread call it. Any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is over, and so are all sessions
            self.loop.call_soon_threadsafe(function, *arguments)

    def _retired(self, tenant: Tenant, number: int) -> None:
        for session in tenant.sessions:
            session.retired(number)

    # -- requests ------------------------------------------------------------------------------------------------

    def told(self, session: Session, kind: Kind, number: int, value: Any) -> None:
        """An event from a client: it is alive, and perhaps lets go of something."""
        session.seen = time.monotonic()
        try:
            if not isinstance(value, list) or kind != Kind.EVENT:
                raise BadInput("an event is a list")
            gone, drafts, filled, saved = checked(value, [list, list, list, (int, float)])
            for name, start in checked(gone, [list] * len(gone)):
                session.release(*checked([name, start], [int, int]))
            session.area.discard(checked(drafts, [int] * len(drafts)))
            if saved:
                session.store.saved(saved)
            for draft in checked(filled, [int] * len(filled)):
                session.area.copying(draft, partial(self._intake.submit, intake, session, draft))
        except (BadInput, TypeError, ValueError) as error:
            self.end(session, f"it sent an event that is none: {error}")

    def _heard(self, session: Session, kind: Kind, number: int, value: Any) -> None:
        session.seen = time.monotonic()
        if kind != Kind.REQUEST or not isinstance(value, list) or not value or not isinstance(value[0], str):
            self.end(session, "it sent what is no request")
            return
        verb = VERBS.get(value[0])
        try:
            if verb is None:
                raise BadInput(f"this daemon knows no {value[0][:40]!r}; it is of another version")
            arguments = checked(value[1:], verb.kinds)
        except BadInput as error:
            self._fail(session, number, error)
            return
        if verb.pace == "quick" and value[0] == "match" and session.tenant.remote:
            verb = replace(verb, pace="slow")
        if verb.pace == "quick":
            self._answer(session, number, self._run(verb, session, arguments))
            return
        if verb.pace == "long" and session.waits >= MAX_WAITS:
            self._fail(session, number, BadInput(f"this client waits for {MAX_WAITS} answers already"))
            return
        session.waits += verb.pace == "long"
        session.saving += verb.pace == "save"
        if verb.pace != "long":
            session.link.hold()
        if verb.pace != "slow":
            self._answer(session, number, Reply(number))
        task = self.loop.create_task(self._later(session, number, verb, arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _later(self, session: Session, number: int, verb: Verb, arguments: Sequence[Any]) -> None:
        pool = self._long if verb.pace == "long" else self._workers
        try:
            reply = await self.loop.run_in_executor(pool, self._run, verb, session, arguments)
            if verb.pace == "slow":
                self._answer(session, number, reply)
            elif isinstance(reply, Reply):
                session.tell("done", number, reply.value)
            else:
                session.tell("failed", number, error_of(reply))
        except BadFrame as error:
            session.tell("failed", number, error_of(error))
        finally:
            session.waits -= verb.pace == "long"
            if verb.pace == "save":
                session.save_over()
            if verb.pace != "long":
                session.link.go_on()

    def _run(self, verb: Verb, session: Session, arguments: Sequence[Any]) -> Reply | Exception:
        """What a verb says. Any thread."""
        try:
            value = verb.run(session, *arguments)
            return value if isinstance(value, Reply) else Reply(value)
        except KVStoreError as error:
            return error
        except Exception as error:  # top loop: the daemon outlives a broken request
            log.exception("a request failed")
            return error

    def _answer(self, session: Session, number: int, reply: Reply | Exception) -> None:
        if isinstance(reply, Exception):
            self._fail(session, number, reply)
            return
        try:
            session.link.send(Kind.ANSWER, number, [reply.value, list(reply.arenas)], reply.fds)
        except BadFrame as error:
            for fd in reply.fds:
                os.close(fd)
            self._fail(session, number, error)

    def _fail(self, session: Session, number: int, error: Exception) -> None:
        session.link.send(Kind.ERROR, number, error_of(error))

    # -- its end -------------------------------------------------------------------------------------------------

    async def stop(self, drain: float) -> None:
        """Takes no new connections, lets requests finish within ``drain`` seconds, ends all sessions."""
        self.open = False
        self._reaper.cancel()
        self._ears.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=drain)
        for session in list(self.sessions.values()):
            self.end(session)
        for link in list(self._links):
            link.close()
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._intake.shutdown(wait=True, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)
