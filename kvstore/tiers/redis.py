"""The remote tier in Redis: one server, Sentinel's master, or a Cluster.

A block is ``PREFIX:{KEY}:h``, its header, and ``PREFIX:{KEY}:0`` and so on, its parts; the braces keep them on one
node. Parts are written to live for a minute, and only with the header, which comes last, as long as the block: what a
writer leaves unfinished goes by itself. With a budget ``PREFIX.used`` orders blocks by last use and ``PREFIX.bytes``
counts what they take; both are as exact as hosts that do not wait for each other make them.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis.exceptions import RedisClusterException, RedisError

from kvstore.errors import Corrupt, TierError
from kvstore.keys import KEY_BYTES
from kvstore.tiers import redis_client
from kvstore.tiers.base import Copy, Look, Missing, Wanted
from kvstore.tiers.bounded import bounded, time_left
from kvstore.tiers.seal import HEADER_PART, Envelope, Seal, unpack

UNFINISHED = 60.0  # seconds that parts without a header live
MOST_HEADER = 2 << 20  # bytes
REPLY = 1 << 12  # bytes that any other reply may take
SCANNED, LOOKED_AT = 1000, 64  # keys asked for at once, and headers
VICTIMS = 16  # blocks that go at once where there is no room
ROOMY = 0.95  # of the budget: so far victims go
_MEMBER = struct.Struct("<32sHQ")  # key, parts, bytes: what PREFIX.used holds
# What redis-py raises, and what its parsers do with replies that no Redis would send.
FAILURES = (RedisError, RedisClusterException, OSError, ValueError, TypeError, LookupError, AttributeError)
Command = tuple[Any, ...]


class RedisTier:
    """``Remote`` in Redis. See ``base.Remote`` for what each method promises. Connects with the first call."""

    def __init__(self, url: str, prefix: str, budget: int | None = None, secret: bytes | None = None) -> None:
        """``prefix``: of all keys, no characters that patterns know. Raises ``BadInput`` for a URL that is none."""
        self._target = redis_client.target(url)
        self._prefix, self._budget, self._seal = prefix.encode(), budget, Seal(secret)
        self._connecting = threading.Lock()
        self._client: Any = None
        self._used = self._refused = 0
        self._closed = False

    @property
    def place(self) -> str:
        """See ``Remote``."""
        return self._target.place

    def find(self, keys: Sequence[bytes], seconds: float) -> list[Envelope | None]:
        """See ``Remote``."""
        with self._within(seconds, len(keys) * MOST_HEADER):
            found = self._run([("GET", self._name(key, "h")) for key in keys])
        return [self._envelope(key, data) for key, data in zip(keys, found, strict=True)]

    def _envelope(self, key: bytes, data: Any) -> Envelope | None:
        if data is None:
            return None
        try:
            return unpack(bytes(self._open(key, HEADER_PART, data)))
        except Corrupt:
            self._refused += 1
            return None

    def _open(self, key: bytes, part: int, data: Any) -> memoryview:
        if not isinstance(data, bytes):
            raise Corrupt("a part is no string")
        return self._seal.open(key, part, data)

    def read(self, wanted: Sequence[Wanted], seconds: float) -> list[TierError | None]:
        """See ``Remote``."""
        size = sum(len(each.buffer) + self._seal.size + REPLY for each in wanted)
        with self._within(seconds, size):
            found = self._run([("GET", self._name(each.key, str(each.part))) for each in wanted])
        return [self._fill(each, data) for each, data in zip(wanted, found, strict=True)]

    def _fill(self, wanted: Wanted, data: Any) -> TierError | None:
        if data is None:
            return Missing("a part is not there any more")
        try:
            part = self._open(wanted.key, wanted.part, data)
        except Corrupt as error:
            self._refused += 1
            return error
        if len(part) != len(wanted.buffer):
            return Corrupt(f"a part has {len(part)} bytes, not {len(wanted.buffer)}")
        wanted.buffer[:] = part
        return None

    def refresh(self, copies: Sequence[Copy], seconds: float) -> list[bool]:
        """See ``Remote``."""
        commands: list[Command] = []
        for copy in copies:
            commands += [("PEXPIRE", name, _milliseconds(copy.ttl)) for name in self._names(copy)]
        if self._budget is not None:
            commands += [("ZADD", self._prefix + b".used", "XX", time.time(), _member(copy)) for copy in copies]
        with self._within(seconds, len(commands) * REPLY):
            results = self._run(commands)
        there, start = list[bool](), 0
        for copy in copies:
            end = start + copy.parts + 1
            there.append(all(result == 1 for result in results[start:end]))
            start = end
        return there

    def put(self, copy: Copy, envelope: Envelope, parts: Sequence[memoryview], seconds: float) -> None:
        """See ``Remote``."""
        key, ttl = copy.key, _milliseconds(copy.ttl)
        short = min(ttl, _milliseconds(UNFINISHED))
        names = self._names(copy)[1:]
        with self._within(seconds, (2 * len(parts) + 4 + VICTIMS) * REPLY):
            for number, (name, data) in enumerate(zip(names, parts, strict=True)):
                self._run([("SET", name, self._seal.close(key, number, data), "PX", short)])
            header = self._seal.close(key, HEADER_PART, envelope.pack())
            commit: list[Command] = [("PEXPIRE", name, ttl) for name in names]
            commit.append(("SET", self._name(key, "h"), header, "PX", ttl))
            if self._budget is not None:
                commit.append(("ZADD", self._prefix + b".used", time.time(), _member(copy)))
            results = self._run(commit)
            if any(result != 1 for result in results[: len(names)]):
                self._unlink([copy])
                raise TierError(f"redis at {self.place} let a part go before its header came")
            if self._budget is not None and results[-1] == 1:
                self._count(copy.bytes)

    def _count(self, size: int) -> None:
        """So many bytes came; what was used longest ago goes for what is too much."""
        assert self._budget is not None
        used, name = self._add(size), self._prefix + b".used"
        while used > self._budget:
            while used > self._budget * ROOMY:
                (popped,) = self._run([("ZPOPMIN", name, VICTIMS)])
                members = [item[0] if isinstance(item, tuple | list) else item for item in popped]
                copies = [_copy(member) for member in members if len(member) == _MEMBER.size]
                if not copies:  # the count has run away from what there is
                    self._run([("SET", self._prefix + b".bytes", 0)])
                    self._used = 0
                    return
                self._unlink(copies)
                used = self._add(-sum(copy.bytes for copy in copies))

    def _add(self, size: int) -> int:
        (used,) = self._run([("INCRBY", self._prefix + b".bytes", size)])
        self._used = max(int(used), 0)
        return self._used

    def drop(self, copies: Sequence[Copy], seconds: float) -> int:
        """See ``Remote``."""
        with self._within(seconds, (sum(copy.parts + 2 for copy in copies) + 2) * REPLY):
            gone = self._unlink(copies)
            if self._budget is not None and copies:
                removed = self._run([("ZREM", self._prefix + b".used", _member(copy)) for copy in copies])
                size = sum(copy.bytes for copy, was in zip(copies, removed, strict=True) if was == 1)
                if size:
                    self._add(-size)
        return gone

    def _unlink(self, copies: Sequence[Copy]) -> int:
        """Headers first: a block without one is gone. How many there were."""
        names = [self._names(copy) for copy in copies]
        results = self._run([("UNLINK", name) for several in names for name in several])
        starts = [sum(len(several) for several in names[:at]) for at in range(len(names))]
        return sum(results[start] == 1 for start in starts)

    def scan(self, look: Look, seconds: float) -> None:
        """See ``Remote``."""
        parts: dict[bytes, int] = {}
        headers: dict[bytes, None] = {}
        with self._within(seconds, 1 << 62):
            for name in self._scanned():
                key, _, kind = name[len(self._prefix) + 2 :].partition(b"}:")
                if len(key) != 2 * KEY_BYTES or not (kind == b"h" or kind.isdigit()):
                    continue
                block = bytes.fromhex(key.decode())
                parts.setdefault(block, 0)
                if kind == b"h":
                    headers[block] = None
                else:
                    parts[block] = max(parts[block], int(kind) + 1)
            orphans = [(key, count, None) for key, count in parts.items() if key not in headers]
            if orphans:
                look(orphans)
            keys = list(headers)
            for start in range(0, len(keys), LOOKED_AT):
                some = keys[start : start + LOOKED_AT]
                data = self._run([("GET", self._name(key, "h")) for key in some])
                found = [self._envelope(key, each) for key, each in zip(some, data, strict=True)]
                look([(key, parts[key], envelope) for key, envelope in zip(some, found, strict=True)])

    def _scanned(self) -> Iterator[bytes]:
        with self._said():
            yield from self._connected().scan_iter(match=self._prefix + b":{*}:*", count=SCANNED)

    def reset(self) -> None:
        """See ``Remote``."""
        made = self._client
        if made is not None:
            redis_client.disconnect(made)

    def gauges(self) -> dict[str, int]:
        """See ``Remote``."""
        return {"used": self._used, "capacity": self._budget or 0, "refused": self._refused}

    def close(self) -> None:
        """See ``Remote``."""
        self._closed = True
        self.reset()

    # -- talking to it ---------------------------------------------------------------------------------------------

    @contextmanager
    def _within(self, seconds: float, size: int) -> Iterator[None]:
        with bounded(seconds, size + (1 << 16)):
            yield

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What clients raise is said in our words, which show neither secrets nor what was stored."""
        try:
            yield
        except TierError:
            raise
        except FAILURES as error:
            raise TierError(f"redis at {self.place} does not answer: {type(error).__name__}") from None

    def _connected(self) -> Any:
        if self._client is not None:
            return self._client
        left = time_left()
        if not self._connecting.acquire(timeout=-1 if left is None else left):
            raise TimeoutError("another call is still connecting")
        try:
            if self._closed:
                raise TierError("the remote tier is closed")
            if self._client is None:
                self._client = redis_client.client(self._target)
            return self._client
        finally:
            self._connecting.release()

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Results of commands that go out together."""
        if not commands:
            return []
        with self._said():
            if self._closed:
                raise TierError("the remote tier is closed")
            with self._connected().pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                results: list[Any] = pipeline.execute(raise_on_error=False)
        for result in results:
            if isinstance(result, Exception):
                raise TierError(f"redis at {self.place} refuses: {type(result).__name__}")
        if len(results) != len(commands):
            raise TierError(f"redis at {self.place} gives {len(results)} answers to {len(commands)} questions")
        return results

    def _name(self, key: bytes, kind: str) -> bytes:
        return b"%b:{%b}:%b" % (self._prefix, key.hex().encode(), kind.encode())

    def _names(self, copy: Copy) -> list[bytes]:
        return [self._name(copy.key, kind) for kind in ("h", *map(str, range(copy.parts)))]


def _milliseconds(seconds: float) -> int:
    return max(int(seconds * 1000), 1)


def _member(copy: Copy) -> bytes:
    return _MEMBER.pack(copy.key, copy.parts, copy.bytes)


def _copy(member: bytes) -> Copy:
    key, parts, size = _MEMBER.unpack(member)
    return Copy(key, parts, size, 0.0)
