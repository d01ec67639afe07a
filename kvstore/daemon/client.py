"""A store that a daemon holds, as one of its clients has it.

What fails on the way to the daemon is a miss, a save of nothing, an answer that says why; only what cannot be answered
at all (``stats``, ``forget``, ``verify``) raises ``Unreachable``. A daemon that comes back is found with the next call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kvstore.composition import Composition, Text
from kvstore.daemon.caller import Caller
from kvstore.daemon.connection import Connection
from kvstore.daemon.lent import Lending, LentDraft, LentLoad, LentMatch, LentSaved, NotSaved
from kvstore.daemon.packed import composition_of, pack_namespace, pack_shard, packed_layout, prospect_of
from kvstore.daemon.pinning import Pinning
from kvstore.erasure import Receipt
from kvstore.errors import BadInput, Unreachable
from kvstore.job import Answer, Job
from kvstore.keeper import Demoted, Pinned, Retained, TierName, check_seconds
from kvstore.keys import Namespace, check_names, token_bytes
from kvstore.kinds import PRE, check_form, check_ttl
from kvstore.layout import Layout, Shard
from kvstore.load import Load
from kvstore.match import Match
from kvstore.prospect import Prospect
from kvstore.save import Draft, Saved, check_drafts
from kvstore.segments import Segment
from kvstore.store import CLOSE_SECONDS, Store
from kvstore.tensors.streams import ThreadStream
from kvstore.tiers.base import Problem
from kvstore.writer import Durable

log = logging.getLogger("kvstore")

FOREVER = 86400.0  # seconds that a wait without a bound is waited for, at most


class Client(Store):
    """Made by ``kvstore.connect``. ``timeout``: seconds that any call may take to be answered."""

    def __init__(self, path: Path, timeout: float, token: str | None = None, pinning: Pinning | None = None) -> None:
        """``pinning`` is closed with the client. Raises ``Unreachable`` when no daemon is there."""
        pinning = pinning or Pinning()
        caller = Caller(str(path), timeout, lambda deadline: Connection(path, deadline, token, pinning.add))
        self._begin(caller, timeout, Lending(pinning))

    def _begin(self, caller: Caller, timeout: float, lending: Lending) -> None:
        self._caller, self._timeout, self._lending = caller, timeout, lending
        self._lock = threading.Lock()  # guards the fields below
        self._worker: ThreadStream | None = None
        self._names: dict[object, int] = {}  # of jobs that wait

    def _held(self, match: Match) -> tuple[Connection, int] | None:
        """Where a match is held, and its number there; None when the daemon that had it is gone, or it has nothing."""
        if not isinstance(match, LentMatch):
            raise BadInput("this match is of another store")
        connection = self._caller.connected(self._caller.deadline())
        return (connection, match.number) if match.connection is connection and match.number else None

    # -- reading -------------------------------------------------------------------------------------------------

    def match(
        self,
        namespace: Namespace,
        layout: Layout,
        token_ids: object,
        *,
        root: bytes | None = None,
        first: int = 0,
        whole: bool = False,
    ) -> Match:
        tokens = token_bytes(token_ids)
        asked = (pack_namespace(namespace), packed_layout(layout), tokens, root, first, whole)
        try:
            connection, packed = self._caller.asked("match", *asked)
        except Unreachable as error:
            return LentMatch.missing(layout, str(error))
        return LentMatch.of(connection, layout, tokens, packed)

    def discover(self, namespace: Namespace, layout: Layout, token_ids: object, minimum: int) -> Composition:
        tokens = token_bytes(token_ids)
        asked = pack_namespace(namespace), packed_layout(layout), tokens, minimum
        packed = self._caller.instead(None, lambda: self._caller.call("discover", *asked))
        return Composition((Text(tokens, 0),) if tokens else ()) if packed is None else composition_of(packed)

    def prospect(self, matches: Sequence[Match], device: bool = False) -> Prospect:
        held = [self._caller.instead(None, partial(self._held, match)) if match.blocks else None for match in matches]
        numbers = [number for _, number in filter(None, held)]
        packed = self._caller.instead(None, lambda: self._caller.call("prospect", numbers, device)) if numbers else None
        if packed is None:  # nothing is to be loaded, or nobody can say what it would take
            layout = matches[0].layout
            return Prospect([[] for _ in matches], None, 0, [(0.0, 1.0)], layout.token_payload, len(layout.layers))
        said = prospect_of(packed)
        rows = iter(said.rows)
        return replace(said, rows=[next(rows) if each is not None else [] for each in held])

    def load(self, match: Match, device: bool = False) -> Load:
        try:
            held = self._held(match) if match.lease.active else None
            if held is None:
                return LentLoad.empty(match)
            connection, number = held
            name, sources = connection.channel.call("load", number, deadline=self._caller.deadline())[1]
        except Unreachable:
            return LentLoad.empty(match)
        assert isinstance(match, LentMatch)
        return self._lending.load(connection, match, name, sources, partial(self._sums, connection, name))

    def _sums(self, connection: Connection, name: int) -> list[bytes | None]:
        def asked() -> list[bytes | None]:
            found: list[bytes | None] = connection.channel.call("sums", name, deadline=self._caller.deadline())[1]
            return found

        return self._caller.instead([], asked)

    def schedule(self, waiting: Sequence[Job]) -> list[Answer]:
        self._caller.check()
        for place, job in enumerate(waiting):
            if not isinstance(job, Job):
                raise BadInput(f"number {place} in the queue is a {type(job).__name__}; give a list of kvstore.Job")
        with self._lock:
            fresh = max(self._names.values(), default=0) + 1
            self._names = {job.name: self._names.get(job.name, fresh + n) for n, job in enumerate(waiting)}
            names = self._names
        if len(names) < len(waiting):
            raise BadInput("two jobs in the queue have the same name; give each its own")
        try:
            answers = self._caller.call("schedule", [self._packed_job(names[job.name], job) for job in waiting])
        except Unreachable:
            return [Answer(job.name, "unknown", 0, {}) for job in waiting]
        return [Answer(job.name, *answer) for job, answer in zip(waiting, answers, strict=True)]

    def _packed_job(self, name: int, job: Job) -> list[object]:
        number = space = layout = tokens = None
        if job.match is not None:
            held = self._held(job.match)
            if not job.match.lease.active:
                raise BadInput(f"the match of job {job.name!r} was released; match again, or give its token_ids")
            number = held[1] if held is not None else None
        else:
            assert job.namespace is not None and job.layout is not None
            space, layout = pack_namespace(job.namespace), packed_layout(job.layout)
            tokens = token_bytes(job.token_ids)
        return [name, number, space, layout, tokens, job.root, job.first, job.start, job.priority, job.deadline]

    def expect(self, layout: Layout) -> None:
        self._caller.instead(None, lambda: self._caller.call("expect", packed_layout(layout)))

    def worker(self) -> ThreadStream:
        self._caller.check()
        with self._lock:
            if self._worker is None:
                self._worker = ThreadStream("kvstore-ahead", tells=False)
            return self._worker

    # -- writing -------------------------------------------------------------------------------------------------

    def drafts(self, layout: Layout, count: int) -> list[Draft]:
        try:
            connection, found = self._caller.asked("drafts", packed_layout(layout), count)
        except Unreachable:
            return []
        return self._lending.drafts(connection, layout, found)

    def save(
        self,
        namespace: Namespace,
        layout: Layout,
        token_ids: object,
        drafts: Mapping[int, Draft],
        *,
        root: bytes | None = None,
        owner: str = "",
        ttl: float | None = None,
        writer: str = "",
        form: str = PRE,
        shard: Shard | None = None,
    ) -> Saved:
        tokens, deadline, own = token_bytes(token_ids), self._caller.deadline(), shard.layout if shard else layout
        check_ttl(ttl)
        check_names(owner, namespace.tenant, writer)
        check_form(form, namespace, root)
        check_drafts(own, drafts, lambda draft: isinstance(draft, LentDraft) and draft.usable(draft.staging))
        try:
            connection = self._caller.connected(deadline)
            addresses, deadline = self._lending.give(connection, drafts, deadline)
            space, shape, part = pack_namespace(namespace), packed_layout(layout), pack_shard(shard, layout)
            number, _ = connection.channel.call(
                "save", space, shape, tokens, addresses, root, owner, ttl, writer, form, part, deadline=deadline
            )
        except Unreachable:
            return NotSaved()
        return LentSaved(self._durable, connection.ticket(number), self._timeout + CLOSE_SECONDS)

    def _durable(self, number: int, timeout: float | None) -> Durable:
        return Durable(*self._caller.long("wait", number, timeout, patience=FOREVER if timeout is None else timeout))

    # -- what stays and what goes --------------------------------------------------------------------------------

    def pin(self, match: Match, tier: TierName = "host", *, seconds: float) -> Pinned:
        match.held()
        check_seconds(seconds)
        try:
            held = self._held(match)
            if held is None:
                raise Unreachable("nothing of it is stored there any more")
            number, pinned_in, asked, tokens, period, until, why = self._caller.call("pin", held[1], tier, seconds)
        except Unreachable as error:
            return Pinned(tier, match.tokens, 0, seconds, time.time(), str(error), lambda: None)
        return Pinned(pinned_in, asked, tokens, period, until, why, partial(self._unpin, number))

    def _unpin(self, number: int) -> None:
        self._caller.instead(None, lambda: self._caller.call("unpin", number))

    def retain(self, match: Match, seconds: float) -> Retained:
        match.held()
        check_seconds(seconds)
        try:
            held = self._held(match)
            if held is None:
                raise Unreachable("nothing of it is stored there any more")
            return Retained(*self._caller.call("retain", held[1], seconds))
        except Unreachable as error:
            return Retained(match.tokens, 0, time.time(), str(error))

    def demote(self, match: Match) -> Demoted:
        match.held()
        try:
            held = self._held(match)
            demoted = Demoted(match.tokens, 0, 0) if held is None else Demoted(*self._caller.call("demote", held[1]))
        except Unreachable:
            demoted = Demoted(match.tokens, 0, 0)
        match.release()
        return demoted

    def forget(
        self,
        *,
        tenant: str | None = None,
        owner: str | None = None,
        older_than: float | None = None,
        match: Match | None = None,
    ) -> Receipt:
        number = None
        if match is not None:
            match.held()
            held = self._held(match)
            if held is None:
                raise BadInput("the match holds nothing that could be forgotten; match again")
            number = held[1]
        receipt = Receipt(*self._caller.long("forget", tenant, owner, older_than, number, patience=FOREVER))
        if match is not None:
            match.release()
        return receipt

    # -- the rest ------------------------------------------------------------------------------------------------

    def ping(self) -> float:
        """Seconds that the daemon takes to answer. Raises ``Unreachable``."""
        begin = time.perf_counter()
        self._caller.call("ping")
        return time.perf_counter() - begin

    def stats(self) -> dict[str, Any]:
        connection, found = self._caller.asked("stats")
        return {**found, "gauges": found["gauges"] | self._lending.gauges(connection)}

    def segments(self, limit: int = 100, tenant: str | None = None) -> list[Segment]:
        return [Segment(**fields) for fields in self._caller.call("segments", limit, tenant)]

    def saved(self, seconds: float) -> None:
        self._caller.instead(None, lambda: self._caller.connected(self._caller.deadline()).spared(seconds))

    def remember(self, name: str, value: str) -> None:
        self._caller.instead(None, lambda: self._caller.call("remember", name, value))

    def recall(self, name: str) -> str | None:
        found: str | None = self._caller.instead(None, lambda: self._caller.call("recall", name))
        return found

    def verify(self) -> list[Problem]:
        return [Problem(*problem) for problem in self._caller.long("verify", patience=FOREVER)]

    def flush(self, timeout: float | None = None) -> bool:
        patience = FOREVER if timeout is None else timeout
        return bool(self._caller.instead(False, lambda: self._caller.long("flush", timeout, patience=patience)))

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        if self._caller.close():
            self._lending.close()
            if self._worker is not None:
                self._worker.close()
