"""Pages of one pool in the store: each is a block of its own, whose tokens are the 32 bytes of its key.

A batch of pages is one call of the store, whichever of them are there.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.adapters.sglang.identity import DIGEST_BYTES, digest
from kvstore.keys import APART, TOKEN_BYTES, Namespace
from kvstore.layout import LayerShape, Layout
from kvstore.match import Match

if TYPE_CHECKING:
    from kvstore import Store
    from kvstore.adapters.sglang.form import Ends
    from kvstore.save import Draft, Saved

BATCH = 128  # pages of one call: what SGLang asks for at once
KEY_TOKENS = DIGEST_BYTES // TOKEN_BYTES
STEP = 512 << 10  # bytes of a page that are read and checked together


def layout_of(size: int) -> Layout:
    """An opaque block of ``size`` bytes, in runs of ``STEP``; the last is padded to whole tokens."""
    whole, rest = divmod(max(size, 1), STEP)
    widths = [STEP // KEY_TOKENS] * whole + [-(-rest // KEY_TOKENS)] * bool(rest)
    return Layout(tuple(LayerShape(1, width, 0) for width in widths), "uint8", KEY_TOKENS)


class Pages:
    """The pages of one pool. Any thread; a call is over after ``timeout`` seconds, but for a copy that has begun."""

    def __init__(self, store: Store, namespace: Namespace, size: int, owner: str, timeout: float) -> None:
        """``size``: bytes of a page. Raises ``BadInput`` for pages that no store can hold."""
        self.namespace, self.size, self.layout = namespace, size, layout_of(size)
        self._store, self._owner, self._timeout = store, owner, timeout
        self._saved: Saved | None = None  # the last one
        store.expect(self.layout)

    def present(self, keys: Sequence[object]) -> list[bool]:
        """Which of these pages are stored."""
        found, deadline = [False] * len(keys), self._deadline()
        for start in range(0, len(keys), BATCH):
            if time.monotonic() >= deadline:
                break
            match = self._match([digest(key) for key in keys[start : start + BATCH]])
            for place in _there(match, len(keys[start : start + BATCH])):
                found[start + place] = True
            match.release()
        return found

    def leading(self, keys: Sequence[object]) -> int:
        """How many of these pages are stored before the first that is not."""
        deadline = self._deadline()
        for start in range(0, len(keys), BATCH):
            found = self.present(keys[start : start + BATCH])
            if not all(found):
                return start + found.index(False)
            if time.monotonic() >= deadline:
                return min(start + BATCH, len(keys))
        return len(keys)

    def read(self, keys: Sequence[object], ends: Ends) -> list[bool]:
        """Brings pages to where they belong; False for those that are not stored, not intact, or late. The bytes of
        such a page may have been written over all the same."""
        digests, done, deadline = [digest(key) for key in keys], [False] * len(keys), self._deadline()
        for start in range(0, len(keys), BATCH):
            self._read(digests, list(range(start, min(start + BATCH, len(keys)))), ends, done, deadline)
        return done

    def _read(self, digests: Sequence[bytes], left: list[int], ends: Ends, done: list[bool], deadline: float) -> None:
        most = len(left)
        while left and most and time.monotonic() < deadline:
            some, left = left[:most], left[most:]
            match = self._match([digests[place] for place in some])
            some = [some[number] for number in _there(match, len(some))]
            if not some:
                continue
            load, good = self._store.load(match), list[int]()
            try:
                room = len(load.sources)
                for place, source in zip(some, load.sources, strict=False):
                    if source.whole(deadline):
                        ends.bring(place, source.base + self.layout.header_bytes)
                        good.append(place)
                if load.intact():
                    for place in good:
                        done[place] = True
            finally:
                load.release()
            if room < len(some):  # memory is short: fewer at a time leave more of it to the others
                left, most = some[room:] + left, most // 2

    def write(self, keys: Sequence[object], ends: Ends) -> list[bool]:
        """Stores pages that are not there; False for those that could not be. What is stored is found at once."""
        digests, done, deadline = [digest(key) for key in keys], [False] * len(keys), self._deadline()
        for start in range(0, len(keys), BATCH):
            self._write(digests, list(range(start, min(start + BATCH, len(keys)))), ends, done, deadline)
        return done

    def _write(self, digests: Sequence[bytes], left: list[int], ends: Ends, done: list[bool], deadline: float) -> None:
        waited = False
        left = self._lacking(digests, left, done) if time.monotonic() < deadline else []
        while left and time.monotonic() < deadline:
            tried, stored = self._put(digests, left, ends, deadline)
            if tried == stored:
                for place in left[:tried]:
                    done[place] = True
                left = left[tried:]
            else:
                left = self._lacking(digests, left, done)
            if not stored and (waited or self._saved is None):
                return
            if not stored and self._saved is not None:  # memory is full of what is not on disk yet
                self._saved.wait(max(0.0, deadline - time.monotonic()))
            waited = not stored

    def _lacking(self, digests: Sequence[bytes], places: Sequence[int], done: list[bool]) -> list[int]:
        """Those of the pages that are not stored; notes those that are."""
        match = self._match([digests[place] for place in places])
        there = set(_there(match, len(places)))
        match.release()
        for number in there:
            done[places[number]] = True
        return [place for number, place in enumerate(places) if number not in there]

    def _put(self, digests: Sequence[bytes], places: Sequence[int], ends: Ends, deadline: float) -> tuple[int, int]:
        """Saves as many of these pages as there is memory for, the first ones: how many, and how many of them are
        stored, as far as that is known in time."""
        drafts: list[Draft] = self._store.drafts(self.layout, len(places))
        for place, draft in zip(places, drafts, strict=False):
            payload = draft.payload
            payload[self.size :] = bytes(len(payload) - self.size)
            ends.take(place, ctypes.addressof(ctypes.c_char.from_buffer(payload)))
        if not drafts:
            return 0, 0
        tokens = b"".join(digests[place] for place in places[: len(drafts)])
        given = dict(enumerate(drafts))
        saved = self._store.save(self.namespace, self.layout, tokens, given, root=APART, owner=self._owner)
        if not saved.settled(max(0.0, deadline - time.monotonic())):
            return len(drafts), 0
        self._saved = saved if saved.tokens else self._saved
        return len(drafts), saved.tokens // KEY_TOKENS

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _match(self, digests: Sequence[bytes]) -> Match:
        return self._store.match(self.namespace, self.layout, b"".join(digests), root=APART, whole=True)


def _there(match: Match, asked: int) -> list[int]:
    """Which of the pages that were asked for a match found."""
    lacking = set(match.lacking)
    return [number for number in range(asked) if number not in lacking] if match.blocks else []
