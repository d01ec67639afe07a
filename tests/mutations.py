"""Frames for a daemon that are not quite what it was promised: grown from its own table of verbs, then damaged."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack
from blocks import NS, SMALL, WIDE, ids, namespace
from xxhash import xxh3_64_intdigest

from kvstore import LayerShape, Layout
from kvstore.daemon.packed import pack_namespace, packed_layout
from kvstore.daemon.verbs import VERBS
from kvstore.daemon.wire import HEADER, MAGIC, VERSION, Kind

# What a fuzzer's own tenant may ask for, and what would take long or end the test's own chains.
LEFT_OUT = {"verify", "resize"}
EDGES = (0, 1, 2, -1, 255, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e-9, 1e308, float("inf"), float("-inf"), float("nan"))
TOKENS = struct.pack("<64I", *ids(9, 64))


# Layouts that are allowed and that nobody has.
HUGE = Layout((LayerShape(4096, 65536, 65536),) * 4096, "float64", block_tokens=65536, alignment=1 << 40)
MANY = Layout(tuple(LayerShape(1, n % 7 + 1, n % 5) for n in range(4096)), "uint8", block_tokens=1, alignment=512)


class Frames:
    """A stream of frames from one seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self._spaces = [pack_namespace(NS), pack_namespace(namespace("t")), packed_layout(SMALL), b""]
        self._layouts = [packed_layout(SMALL)] * 8 + [packed_layout(layout) for layout in (HUGE, MANY, WIDE)]
        self._kinds: dict[Any, Callable[[], object]] = {
            int: lambda: self.draw.choice(EDGES) if self.draw.random() < 0.4 else self.draw.randrange(40),
            float: lambda: self.draw.choice(FLOATS),
            str: self._text,
            bytes: self._bytes,
            bool: lambda: self.draw.random() < 0.5,
            list: self._list,
            type(None): lambda: None,
        }

    def next(self) -> tuple[bytes, bool]:
        """One frame, and whether it is one: its header is right, whatever the body is."""
        value = self._request() if self.draw.random() < 0.95 else self._anything(0)
        frame, damage = framed(value), self.draw.random()
        if damage < 0.1:
            return self._damaged(frame), False
        return framed(self._damaged(frame[HEADER.size :])) if damage < 0.3 else frame, True

    def event(self) -> bytes:
        """One frame for the second socket."""
        value: list[object] = [self._pairs(), self._numbers(), self._numbers(), self.draw.choice(FLOATS[:4])]
        if self.draw.random() < 0.2:
            value[self.draw.randrange(4)] = self._anything(0)
        frame = framed(value, 0, Kind.EVENT)
        return self._damaged(frame) if self.draw.random() < 0.1 else frame

    def _request(self) -> list[object]:
        verb = self.draw.choice([*VERBS, "", "hello", "quit", "\x00"])
        while verb in LEFT_OUT:
            verb = self.draw.choice([*VERBS])
        kinds = VERBS[verb].kinds if verb in VERBS else ()
        arguments = [self._argument(kind) for kind in kinds]
        if self.draw.random() < 0.8:  # what can be served
            meant = [
                self.draw.choice(self._spaces[:2]),
                self.draw.choice(self._layouts),
                TOKENS[: 4 * self.draw.randrange(65)],
            ]
            asked = [place for place, kind in enumerate(kinds) if kind is bytes]
            for place, value in zip(asked, meant[-2:-1] if len(asked) == 1 else meant, strict=False):
                arguments[place] = value
        if self.draw.random() < 0.1:
            arguments = [*arguments, self._anything(0)] if self.draw.random() < 0.5 else arguments[:-1]
        return [verb, *arguments]

    def _argument(self, kind: Any) -> object:
        if self.draw.random() < 0.1:
            return self._anything(0)
        return self._kinds[self.draw.choice(kind) if isinstance(kind, tuple) else kind]()

    def _anything(self, depth: int) -> object:
        if depth < 3 and self.draw.random() < 0.3:
            items = [self._anything(depth + 1) for _ in range(self.draw.randrange(5))]
            return items if self.draw.random() < 0.6 else {str(place): item for place, item in enumerate(items)}
        if self.draw.random() < 0.05:
            return msgpack.ExtType(self.draw.randrange(128), b"\x00" * self.draw.randrange(20))
        return self.draw.choice([*self._kinds.values()])() if depth < 3 else self.draw.choice(EDGES[:-1])

    def _text(self) -> str:
        words = ("", "a", "host", "disk", "device", "t", "policies/host", "namespace", "\0", "é" * 300, "x" * 5000)
        return self.draw.choice(words)

    def _bytes(self) -> bytes:
        found = self.draw.choice([*self._spaces, TOKENS, self.draw.randbytes(self.draw.randrange(80))])
        return self._damaged(found) if self.draw.random() < 0.2 else found

    def _list(self) -> list[object]:
        return self.draw.choice([self._numbers, self._pairs, self._drafts, self._jobs])()

    def _numbers(self) -> list[object]:
        return [self._kinds[int]() for _ in range(self.draw.randrange(6))]

    def _pairs(self) -> list[object]:
        return [[self._kinds[int](), self._kinds[int]()] for _ in range(self.draw.randrange(4))]

    def _drafts(self) -> list[object]:
        return [[place, self.draw.randrange(12), self.draw.random() < 0.5] for place in range(self.draw.randrange(6))]

    def _jobs(self) -> list[object]:
        none = (None, None, None, None)
        return [
            [name, self.draw.randrange(20), *none, 0, None, 0, None]
            if self.draw.random() < 0.5
            else [name, None, *self._spaces[:1], self._spaces[2], TOKENS, None, 0, 1.0, 0, self._kinds[float]()]
            for name in range(self.draw.randrange(4))
        ]

    def _damaged(self, data: bytes) -> bytes:
        """Some bytes changed, lost, doubled or added."""
        found = bytearray(data)
        for _ in range(self.draw.randrange(1, 4)):
            place, size = self.draw.randrange(len(found) + 1), self.draw.randrange(1, 9)
            match self.draw.randrange(4):
                case 0 if place < len(found):
                    found[place] ^= 1 << self.draw.randrange(8)
                case 1:
                    del found[place : place + size]
                case 2:
                    found[place:place] = found[place : place + size]
                case _:
                    found[place:place] = self.draw.randbytes(size)
        return bytes(found)


def head(length: int, check: int, number: int = 1, kind: int = Kind.REQUEST, version: int = VERSION) -> bytes:
    """A header that says so."""
    return HEADER.pack(MAGIC, version, kind, 0, number, length, check)


def framed(value: object, number: int = 1, kind: Kind = Kind.REQUEST) -> bytes:
    """A frame of a value, or of bytes that stand for one."""
    body: bytes = value if isinstance(value, bytes) else msgpack.packb(value)
    return head(len(body), xxh3_64_intdigest(body), number, kind) + body
