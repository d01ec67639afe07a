"""What a prompt is made of: runs of tokens, where they stand, and what each was computed behind.

A *chain* is a run of tokens computed seeing its context and itself. A *placement* puts a part of a chain at a position
of a prompt. A *composition* is a whole prompt: placements, and texts that are computed where they stand, behind all
that comes before them. Positions never go back; a gap is a part of the prompt that is not there.

Whatever is computed behind a composition is a chain again, whose context is the composition. So it is found only
behind the same one, and it never passes for what was computed behind the same tokens in one piece, or the other way.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from kvstore.errors import BadInput
from kvstore.keys import (
    KEY_BYTES,
    TOKEN_BYTES,
    Namespace,
    chain_digest,
    mark_item,
    placement_item,
    root_key,
    token_bytes,
)


@dataclass(frozen=True, eq=False)
class Context:
    """What the tokens of a chain see before them. Equal contexts have equal digests, and are compared by them.

    ``parts``: placements whose positions count from the chain's first token (so they are below 0), and marks: words for
    what else its bytes depend on. ``known``: instead, the root key of a chain that was found in a store.
    """

    parts: tuple[Placement | str, ...] = ()
    known: bytes = b""

    @cached_property
    def digest(self) -> bytes:
        """32 bytes, or none of an empty context."""
        if self.known or not self.parts:
            return self.known
        hashed = blake2b(digest_size=KEY_BYTES)
        for part in self.parts:
            hashed.update(mark_item(part) if isinstance(part, str) else part.item)
        return hashed.digest()

    def root(self, namespace: Namespace) -> bytes:
        """The key that blocks behind it start from."""
        if self.known:
            return self.known
        return root_key(namespace, [self.digest]) if self.parts else namespace.root

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Context) or len(self.parts) != len(other.parts):
            return False
        return self is other or self.digest == other.digest

    def __hash__(self) -> int:
        return int.from_bytes(self.digest[:8], "little")


NOTHING = Context()


@dataclass(frozen=True)
class Chain:
    """Tokens at consecutive positions, and what they see before them."""

    token_ids: bytes  # little-endian uint32, as ``keys.token_bytes`` gives them
    context: Context = NOTHING
    _digests: dict[int, bytes] = field(default_factory=dict, compare=False, repr=False)  # by number of tokens

    @classmethod
    def of(cls, token_ids: object, context: Iterable[Placement | str] = ()) -> Chain:
        """From a list of ints or an integer buffer. Raises ``BadInput`` for what is no token id."""
        parts = tuple(context)
        return cls(token_bytes(token_ids), Context(parts) if parts else NOTHING)

    def __len__(self) -> int:
        return len(self.token_ids) // TOKEN_BYTES

    def digest(self, tokens: int) -> bytes:
        """32 bytes over its first ``tokens`` and their context."""
        if tokens not in self._digests:
            self._digests[tokens] = chain_digest(self.context.digest, self.token_ids[: tokens * TOKEN_BYTES])
        return self._digests[tokens]

    def upto(self, tokens: int) -> Chain:
        """Its first ``tokens``."""
        return Chain(self.token_ids[: tokens * TOKEN_BYTES], self.context)


@dataclass(frozen=True)
class Placement:
    """Tokens ``start`` to ``stop`` of a chain, the first of them at ``position``."""

    chain: Chain
    start: int
    stop: int
    position: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= len(self.chain):
            raise BadInput(f"tokens {self.start} to {self.stop} are no part of a chain of {len(self.chain)}")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def item(self) -> bytes:
        """As contexts are made of it."""
        return placement_item(self.chain.digest(self.stop), self.start, self.position)

    @property
    def token_ids(self) -> bytes:
        """The tokens that are placed."""
        return self.chain.token_ids[self.start * TOKEN_BYTES : self.stop * TOKEN_BYTES]

    def moved(self, by: int) -> Placement:
        """The same, ``by`` positions further on."""
        return Placement(self.chain, self.start, self.stop, self.position + by)


@dataclass(frozen=True)
class Text:
    """Tokens that are computed where they stand, behind all that comes before them."""

    token_ids: bytes
    position: int

    def __len__(self) -> int:
        return len(self.token_ids) // TOKEN_BYTES

    def moved(self, by: int) -> Text:
        """The same, ``by`` positions further on."""
        return Text(self.token_ids, self.position + by)


Part = Placement | Text


@dataclass(frozen=True)
class Composition:
    """A prompt in parts, in order. Raises ``BadInput`` for positions that go back, or below 0, and for empty ones.

    ``mark`` names how it is assembled where that changes bytes (the share that is recomputed): what is computed
    behind it is found again only behind the same. Immutable; any thread.
    """

    parts: tuple[Part, ...]
    mark: str = ""

    def __post_init__(self) -> None:
        position = 0
        for number, part in enumerate(self.parts):
            if not len(part):
                raise BadInput(f"part {number} of the prompt has no tokens; leave it out")
            if part.position < position:
                raise BadInput(f"part {number} of the prompt is at position {part.position}, before {position}")
            position = part.position + len(part)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def token_ids(self) -> list[int]:
        """All tokens in order, as the model reads them."""
        return array("I", b"".join(part.token_ids for part in self.parts)).tolist()

    @cached_property
    def position_ids(self) -> list[int]:
        """The position of each token."""
        return [place for part in self.parts for place in range(part.position, part.position + len(part))]

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.parts[-1].position + len(self.parts[-1]) if self.parts else 0

    def columns(self) -> Iterator[tuple[int, Part]]:
        """Each part with the number of tokens before it."""
        column = 0
        for part in self.parts:
            yield column, part
            column += len(part)

    @classmethod
    def of_segments(
        cls, segments: Sequence[object], behind: Callable[[int], Sequence[int]] | None = None
    ) -> Composition:
        """Segments one behind the other; all but the last, which is text, are looked for as chains of their own.

        ``behind``: tokens that are computed behind each segment but the last, by its number.
        """
        parts: list[Part] = []
        position = 0
        for number, segment in enumerate(segments):
            chain = Chain(token_bytes(segment))
            if not len(chain):
                raise BadInput(f"segment {number} has no tokens; leave it out")
            last = number == len(segments) - 1
            parts.append(Text(chain.token_ids, position) if last else Placement(chain, 0, len(chain), position))
            position += len(chain)
            if behind is not None and not last and (more := token_bytes(behind(number))):
                parts.append(Text(more, position))
                position += len(more) // TOKEN_BYTES
        return cls(tuple(parts))
