"""Finding stored runs of tokens that stand anywhere in a new prompt, by their content.

Windows of tokens get rolling fingerprints; of every ``minimum - WINDOW + 1`` windows in a row the smallest is kept
(winnowing), so a run of ``minimum`` tokens that two texts share always has a kept fingerprint in common. What is found
so is compared token by token, and followed both ways as far as it goes.
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvstore.composition import NOTHING, Chain, Composition, Context, Part, Placement, Text
from kvstore.errors import BadInput
from kvstore.families import NONE
from kvstore.keys import TOKEN_BYTES, Namespace, common_tokens
from kvstore.layout import Layout
from kvstore.residency import Residency

WINDOW = 16  # tokens that one fingerprint covers
ENTRIES = 1 << 20  # fingerprints that are kept; the oldest go
MOST = 64  # namespaces, layouts and minimums that are looked into
LATE = 1 << 14  # new blocks that are remembered until somebody asks
SAME = 4  # places that are kept of one fingerprint
PRIME, BASE = (1 << 61) - 1, 0x1F3D5B79A6C8E213


class Where(NamedTuple):
    """Where a window ends: a block, and a token of it."""

    number: int
    sequence: int  # of the block; another one has the number by now if it differs
    last: int


class Discovery:
    """What is stored in one namespace, by content. Any thread."""

    def __init__(self, residency: Residency, namespace: Namespace, layout: Layout, minimum: int) -> None:
        """Knows what is stored now; ``published`` tells of what comes. The caller holds the store's lock."""
        # Numbers of new blocks; whoever holds the store's lock appends. Full, it has lost some.
        self.published: deque[int] = deque(maxlen=LATE)
        self._residency, self._namespace, self._layout, self._minimum = residency, namespace, layout, minimum
        self._lock = threading.Lock()  # guards the table; taken before the store's
        self._table: dict[int, list[Where]] = {}
        self._stored = self._all()  # and not looked at yet

    def _all(self) -> list[int]:
        """All blocks there are. Locked."""
        index = self._residency.index
        return [number for number in range(len(index.key)) if index.key[number]]

    def _catch_up(self) -> None:
        """Takes in what is new; where that was lost, everything once more."""
        if len(self.published) == LATE:
            self._table.clear()
            with self._residency.lock:
                self.published.clear()
                self._stored = self._all()
        for number in self._stored:
            self._learn(number)
        self._stored = []
        while self.published:
            self._learn(self.published.popleft())

    def compose(self, token_ids: bytes, known: int) -> Composition:
        """The prompt ``token_ids`` with every run that is stored somewhere as a placement; behind ``known`` tokens."""
        with self._lock:
            self._catch_up()
            parts: list[Part] = []
            done = 0
            for start, placed in self._runs(token_ids, known):
                if start > done:
                    parts.append(Text(token_ids[done * TOKEN_BYTES : start * TOKEN_BYTES], done))
                parts.append(placed)
                done = start + len(placed)
        if done * TOKEN_BYTES < len(token_ids):
            parts.append(Text(token_ids[done * TOKEN_BYTES :], done))
        return Composition(tuple(parts))

    def _runs(self, tokens: bytes, done: int) -> Iterator[tuple[int, Placement]]:
        """Stored runs, left to right, none reaching into the one before."""
        ids = array("I", tokens)
        for last, print_ in winnow(ids, self._minimum):
            if last - WINDOW + 1 < done or print_ not in self._table:
                continue
            found = [self._follow(where, tokens, last, done) for where in self._table[print_]]
            best = max((each for each in found if each is not None), key=lambda each: len(each[1]), default=None)
            if best is not None and len(best[1]) >= self._minimum:
                yield best
                done = best[0] + len(best[1])

    def _follow(self, where: Where, tokens: bytes, last: int, low: int) -> tuple[int, Placement] | None:
        """The run around a window that ends at token ``last`` of the prompt; None when it is not what it seemed."""
        residency, index = self._residency, self._residency.index
        with residency.lock:
            number = where.number
            if not (index.key[number] and index.sequence[number] == where.sequence and index.present(number)):
                return None
            chain = index.chain(number)
            root = index.root_key(index.parent[chain[0]])
            before = b"".join(index.tokens_of(each) for each in chain[:-1])
            block = index.tokens_of(number)
            text = before + block
            at = len(before) // TOKEN_BYTES + where.last  # the window's last token in its chain
            back = _common_ends(text[: (at + 1) * TOKEN_BYTES], tokens[low * TOKEN_BYTES : (last + 1) * TOKEN_BYTES])
            if back < WINDOW:
                return None
            # Forward: the rest of the block, then children.
            ahead = common_tokens(text[(at + 1) * TOKEN_BYTES :], tokens[(last + 1) * TOKEN_BYTES :])
            while (at + 1 + ahead) * TOKEN_BYTES == len(text):
                rest = tokens[(last + 1 + ahead) * TOKEN_BYTES :]
                child, common = index.best_child(number, rest, residency.wall())
                if child == NONE or not index.same_layout(child, self._layout):
                    break
                number, ahead = child, ahead + common
                text += index.tokens_of(child)
        start, stop = at + 1 - back, at + 1 + ahead
        context = NOTHING if root == self._namespace.root else Context(known=root)
        chained = Chain(text[: stop * TOKEN_BYTES], context)
        place = last + 1 - back
        return place, Placement(chained, start, stop, place)

    def _learn(self, number: int) -> None:
        """Keep the fingerprints of windows that end in a block."""
        residency, index = self._residency, self._residency.index
        with residency.lock:
            if not (index.key[number] and index.present(number) and index.same_layout(number, self._layout)):
                return
            if index.kind_of(number).namespace != self._namespace.digest:
                return
            block, sequence = index.tokens_of(number), index.sequence[number]
            before, parent = b"", index.parent[number]
            while parent >= 0 and len(before) < (self._minimum - 1) * TOKEN_BYTES:
                before = index.tokens_of(parent) + before
                parent = index.parent[parent]
        before = before[-(self._minimum - 1) * TOKEN_BYTES :]
        skip = len(before) // TOKEN_BYTES
        for last, print_ in winnow(array("I", before + block), self._minimum):
            if last >= skip:
                places = self._table.setdefault(print_, [])
                places.append(Where(number, sequence, last - skip))
                del places[:-SAME]
        while len(self._table) > ENTRIES:
            del self._table[next(iter(self._table))]


class Discoveries:
    """One ``Discovery`` for each of the last namespaces, layouts and minimums that were asked for. Any thread."""

    def __init__(self, residency: Residency, listeners: list[deque[int]]) -> None:
        """``listeners``: who is told of new blocks; guarded by the residency's lock."""
        self._residency, self._listeners = residency, listeners
        self._made: dict[tuple[bytes, Layout, int], Discovery] = {}  # likewise

    def of(self, namespace: Namespace, layout: Layout, minimum: int) -> Discovery:
        """The one for these; made when it is first asked for. ``BadInput``: a ``minimum`` below the window."""
        if minimum < WINDOW:
            raise BadInput(f"runs of {minimum} tokens are too short to look for; give at least {WINDOW}")
        key = (namespace.digest, layout, minimum)
        with self._residency.lock:
            made = self._made.pop(key, None)
            if made is None:
                made = Discovery(self._residency, namespace, layout, minimum)
                self._listeners.append(made.published)
            self._made[key] = made  # as the last that was asked for
            if len(self._made) > MOST:
                gone = self._made.pop(next(iter(self._made))).published
                self._listeners[:] = [each for each in self._listeners if each is not gone]
            return made


def winnow(ids: Sequence[int], minimum: int) -> list[tuple[int, int]]:
    """(last token, fingerprint) of the windows that are kept: the smallest of each group, of equals the last."""
    group = minimum - WINDOW + 1
    leaving = pow(BASE, WINDOW, PRIME)
    kept: list[tuple[int, int]] = []
    smallest: deque[tuple[int, int]] = deque()  # of the group that ends here, growing
    value = 0
    for place, token in enumerate(ids):
        value = (value * BASE + token + 1) % PRIME
        if place < WINDOW - 1:
            continue
        if place >= WINDOW:
            value = (value - (ids[place - WINDOW] + 1) * leaving) % PRIME
        while smallest and smallest[-1][1] >= value:
            smallest.pop()
        smallest.append((place, value))
        if smallest[0][0] <= place - group:
            smallest.popleft()
        if place >= WINDOW - 1 + group - 1 and (not kept or kept[-1] != smallest[0]):
            kept.append(smallest[0])
    return kept


def _common_ends(one: bytes, other: bytes) -> int:
    """How many last tokens both share."""
    size = min(len(one), len(other))
    if one[len(one) - size :] == other[len(other) - size :]:
        return size // TOKEN_BYTES
    low, high = 0, size // TOKEN_BYTES  # the last ``low`` are equal, the last ``high`` are not
    while high - low > 1:
        middle = (low + high) // 2
        if one[len(one) - middle * TOKEN_BYTES :] == other[len(other) - middle * TOKEN_BYTES :]:
            low = middle
        else:
            high = middle
    return low
