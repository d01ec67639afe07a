"""Looks up which blocks the remote tier has; nobody waits longer for it than was said, and nobody asks twice."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile

from kvstore.errors import Corrupt, TierError
from kvstore.keys import KEY_BYTES
from kvstore.metrics import Counters
from kvstore.mover import Mover, Priority
from kvstore.remote.block import RemoteBlock, opened
from kvstore.remote.breaker import Breaker
from kvstore.remote.options import RemoteOptions
from kvstore.tiers.base import Remote

log = logging.getLogger("kvstore")

FOUND_SECONDS, FOUND_BYTES = 30.0, 16 << 20  # answers are good for so long, and headers kept of so many bytes
MISSING_SECONDS, MISSING_KEYS = 2.0, 1 << 15
FIRST_ASKED, MORE_ASKED, MOST_ASKED = 16, 4, 256  # keys in the first exchange, times as many in each one after it
MOST_LOOKUPS = 64  # under way or waiting


@dataclass(eq=False)
class Lookup:
    """One exchange about a run of keys, and those who wait for it. ``judged``: how quick it was is known, or clear."""

    keys: Sequence[bytes]
    judged: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    blocks: dict[bytes, RemoteBlock] = field(default_factory=dict)  # that are there, leading ones


class Seeker:
    """One per store with a remote tier. Any thread, without the store's lock."""

    def __init__(
        self, remote: Remote, options: RemoteOptions, breaker: Breaker, mover: Mover, counters: Counters
    ) -> None:
        self._remote, self._options, self._breaker = remote, options, breaker
        self._mover, self._counters = mover, counters
        self._lock = threading.Lock()  # guards the fields below
        self._found: OrderedDict[bytes, tuple[RemoteBlock, float]] = OrderedDict()  # until when; oldest first
        self._found_bytes = 0
        self._missing: OrderedDict[bytes, float] = OrderedDict()
        self._lookups: dict[bytes, Lookup] = {}  # by first key

    def greet(self) -> None:
        """Finds out beside whether anybody answers, and has a connection ready for the first who asks."""
        self._mover.submit(Priority.DEMAND, (0,), self._greet)

    def _greet(self) -> None:
        try:
            for _ in range(2):  # the first may have had to connect, which is no measure
                begin = time.monotonic()
                self._remote.find([bytes(KEY_BYTES)], self._options.timeout)
        except TierError as error:
            log.warning("blocks are not shared with other hosts for now: %s", error)
            self._counters.add("remote_failures")
            self._breaker.failed()
        else:
            if not self._breaker.closed:
                self._judge(time.monotonic() - begin)

    def asks(self) -> bool:
        """Whether it is worth asking now. Microseconds."""
        if self._breaker.closed:
            return True
        if self._breaker.try_again():
            self.greet()
        return False

    def _judge(self, seconds: float) -> None:
        """An answer took so long."""
        if seconds > self._options.lookup:
            self._breaker.failed()
        else:
            self._breaker.succeeded()

    def leading(self, keys: Sequence[bytes]) -> Mapping[bytes, RemoteBlock]:
        """Which of these keys, up to the first that is not there, the remote tier has, as far as it says so in time."""
        deadline = time.monotonic() + self._options.lookup
        found, rest = dict[bytes, RemoteBlock](), keys
        for _ in range(2):  # another's lookup, which begins with the same key, may have gone on with others
            known, rest = self._known(rest)
            found |= known
            left = deadline - time.monotonic()
            lookup = self._join(rest) if rest and left > 0 else None
            if lookup is None:
                break
            late = not lookup.over.wait(left)
            if late:
                self._late(lookup)
            found |= {key: lookup.blocks[key] for key in rest if key in lookup.blocks}
            rest = list(dropwhile(found.__contains__, rest))
            if late or not rest or lookup.keys == rest:
                break
        return found

    def lost(self, key: bytes) -> None:
        """A block that was found is not there."""
        with self._lock:
            self._let_go(key)
            self._miss(key)

    def stored(self, key: bytes) -> None:
        """A block is there from now on."""
        with self._lock:
            self._missing.pop(key, None)

    def clear(self) -> None:
        """No answer counts any more."""
        with self._lock:
            self._found.clear()
            self._missing.clear()
            self._found_bytes = 0

    def _known(self, keys: Sequence[bytes]) -> tuple[dict[bytes, RemoteBlock], Sequence[bytes]]:
        """What is known to be there, and of which keys behind it nothing is known."""
        found, now = dict[bytes, RemoteBlock](), time.monotonic()
        with self._lock:
            for key in keys:
                block, until = self._found.get(key, (None, 0.0))
                if block is None or until < now:
                    break
                found[key] = block
            rest = keys[len(found) :]
            end = next((at for at, key in enumerate(rest) if self._missing.get(key, 0.0) > now), len(rest))
        return found, rest[:end]

    def _late(self, lookup: Lookup) -> None:
        """Somebody has waited in vain, which counts once; a later answer serves the next who asks."""
        self._counters.add("remote_late_lookups")
        if self._unjudged(lookup):
            self._breaker.failed()

    def _unjudged(self, lookup: Lookup) -> bool:
        """True once: the caller judges it."""
        with self._lock:
            judged, lookup.judged = lookup.judged, True
        return not judged

    def _join(self, keys: Sequence[bytes]) -> Lookup | None:
        """The lookup of these keys that is under way, or one that begins now; None: there are too many."""
        with self._lock:
            lookup = self._lookups.get(keys[0])
            if lookup is not None or len(self._lookups) >= MOST_LOOKUPS:
                return lookup
            lookup = self._lookups[keys[0]] = Lookup(keys)
        if not self._mover.submit(Priority.DEMAND, (0,), lambda: self._run(lookup)):
            self._end(lookup)
        return lookup

    def _run(self, lookup: Lookup) -> None:
        try:
            if self._breaker.closed:
                self._counters.add("remote_lookups")
                self._ask(lookup)
        except TierError:
            self._counters.add("remote_failures")
            if self._unjudged(lookup):
                self._breaker.failed()
        finally:
            self._end(lookup)

    def _end(self, lookup: Lookup) -> None:
        with self._lock:
            del self._lookups[lookup.keys[0]]
        lookup.over.set()

    def _ask(self, lookup: Lookup) -> None:
        """Asks for keys, a few at first, until one is not there. How long the first answer takes is what counts: long
        prompts have many headers."""
        begin, keys = time.monotonic(), lookup.keys
        at, size = 0, FIRST_ASKED
        while at < len(keys):
            some = keys[at : at + size]
            left = begin + self._options.timeout - time.monotonic()
            if left <= 0:
                break
            envelopes = self._remote.find(some, left)
            blocks = list[RemoteBlock]()
            for key, envelope in zip(some, envelopes, strict=True):
                if envelope is None:
                    break
                try:
                    blocks.append(opened(key, envelope))
                except Corrupt:
                    self._counters.add("remote_corrupt_blocks")
                    self.lost(key)
                    raise
            if self._unjudged(lookup):
                self._judge(time.monotonic() - begin)
            self._take(some, blocks)
            lookup.blocks |= zip(some, blocks, strict=False)
            if len(blocks) < len(some):
                break
            at, size = at + size, min(size * MORE_ASKED, MOST_ASKED)

    def _take(self, keys: Sequence[bytes], blocks: Sequence[RemoteBlock]) -> None:
        """The leading ones of these keys are there, and the next is not."""
        until = time.monotonic() + FOUND_SECONDS
        with self._lock:
            for key, block in zip(keys, blocks, strict=False):
                self._let_go(key)
                self._found[key] = block, until
                self._found_bytes += block.size
            while self._found_bytes > FOUND_BYTES:
                self._let_go(next(iter(self._found)))
            if len(blocks) < len(keys):
                self._miss(keys[len(blocks)])

    def _let_go(self, key: bytes) -> None:
        block, _ = self._found.pop(key, (None, 0.0))
        if block is not None:
            self._found_bytes -= block.size

    def _miss(self, key: bytes) -> None:
        self._missing.pop(key, None)
        self._missing[key] = time.monotonic() + MISSING_SECONDS
        while len(self._missing) > MISSING_KEYS:
            self._missing.popitem(last=False)
