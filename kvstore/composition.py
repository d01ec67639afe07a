"""What a prompt is made of: runs of tokens, where they stand, and what each was computed behind.

A *chain* is a run of tokens computed seeing its context and itself. A *placement* puts a part of a chain at a position
of a prompt. A *composition* is a whole prompt: placements, and texts that are computed where they stand, behind all
that comes before them. Positions never go back; a gap is a part of the prompt that is not there.

Whatever is computed behind a composition is a chain again, whose context is the composition. So it is found only
behind the same one, and it never passes for what was computed behind the same tokens in one piece, or the other way.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvstore.errors import BadInput
from kvstore.keys import TOKEN_BYTES, Namespace, mark_item, placement_item, root_key, token_bytes

MAX_DEPTH = 64  # contexts within contexts


@dataclass(frozen=True)
class Chain:
    """Tokens at consecutive positions, and what they see before them.

    ``context``: placements whose positions count from the chain's first token (so they are below 0), and marks: words
    for what else the chain's bytes depend on. Hashable; equal chains have equal keys.
    """

    token_ids: bytes  # little-endian uint32, as ``keys.token_bytes`` gives them
    context: tuple[Placement | str, ...] = ()

    @classmethod
    def of(cls, token_ids: object, context: Iterable[Placement | str] = ()) -> Chain:
        """From a list of ints or an integer buffer. Raises ``BadInput`` for what is no token id."""
        return cls(token_bytes(token_ids), tuple(context))

    def __len__(self) -> int:
        return len(self.token_ids) // TOKEN_BYTES

    def items(self, namespace: Namespace, depth: int = 0) -> list[bytes]:
        """The context as the store's calls take it. Raises ``BadInput`` for contexts nested too deeply."""
        if depth > MAX_DEPTH:
            raise BadInput(f"contexts are nested more than {MAX_DEPTH} deep; encode the parts in one piece")
        items = []
        for part in self.context:
            if isinstance(part, str):
                items.append(mark_item(part))
                continue
            root = root_key(namespace, part.chain.items(namespace, depth + 1))
            tokens = part.chain.token_ids[: part.stop * TOKEN_BYTES]
            items.append(placement_item(namespace, root, tokens, part.start, part.position))
        return items


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
    def token_ids(self) -> bytes:
        """The tokens that are placed."""
        return self.chain.token_ids[self.start * TOKEN_BYTES : self.stop * TOKEN_BYTES]

    def moved(self, by: int) -> Placement:
        """The same, ``by`` positions further on."""
        return Placement(self.chain, self.start, self.stop, self.position + by)


@dataclass(frozen=True)
class Text:
    """Tokens that are computed where they stand, behind all that comes before them.

    ``behind``: the chain that they go on, if that is not simply what comes before them here: when a conversation has
    outgrown its context, its chain still holds what was dropped.
    """

    token_ids: bytes
    position: int
    behind: Chain | None = None

    def __len__(self) -> int:
        return len(self.token_ids) // TOKEN_BYTES

    def moved(self, by: int) -> Text:
        """The same, ``by`` positions further on."""
        return Text(self.token_ids, self.position + by, self.behind)


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
    def of_segments(cls, segments: Sequence[object], position: int = 0, context: object = ()) -> Composition:
        """Segments one behind the other; all but the last are looked for as chains of their own.

        ``context``: tokens that each of them was encoded behind, and that are not placed (a beginning-of-sequence
        token). The last segment is text: it is computed behind the others.
        """
        before = token_bytes(context)
        parts: list[Part] = []
        for number, segment in enumerate(segments):
            tokens = token_bytes(segment)
            if not tokens:
                raise BadInput(f"segment {number} has no tokens; leave it out")
            if number < len(segments) - 1:
                chain = Chain(before + tokens)
                parts.append(Placement(chain, len(before) // TOKEN_BYTES, len(chain), position))
            else:
                parts.append(Text(tokens, position))
            position += len(tokens) // TOKEN_BYTES
        return cls(tuple(parts))


@dataclass
class Open:
    """The chain that goes on where a prompt has come to: everything behind ``context`` was computed in one piece."""

    context: tuple[Placement | str, ...]
    token_ids: bytes
    position: int  # of its first token, were it here
    first: int = 0  # token that stands in the prompt

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.position + len(self.token_ids) // TOKEN_BYTES

    def goes_on_with(self, part: Placement) -> bool:
        """Whether a placed chain is this very chain, and the part stands where it goes on."""
        return (
            part.position == self.end
            and part.chain.context == self.context
            and part.chain.token_ids[: part.start * TOKEN_BYTES] == self.token_ids
        )

    @property
    def chain(self) -> Chain:
        """As far as it has come."""
        return Chain(self.token_ids, self.context)


class Walk:
    """Goes through a prompt part by part, and knows the chain of whatever is computed next."""

    def __init__(self, mark: str = "") -> None:
        self.mark = mark
        self.before: list[Placement] = []  # what stands in the prompt so far, but for ``open``
        self.open: Open | None = None
        self.modular = False  # something in ``before`` was not computed in this prompt

    def start(self, position: int) -> Open:
        """The chain of a text at ``position``: the open one, or one behind all that stands there."""
        if self.open is None or self.open.end != position:
            self.close()
            context: list[Placement | str] = [placed.moved(-position) for placed in self.before]
            if not context and position:
                context.append(f"from {position}")  # what starts elsewhere has other bits
            if self.modular and self.mark:
                context.append(self.mark)
            self.open = Open(tuple(context), b"", position)
        return self.open

    def go_on(self, chain: Chain, position: int) -> Open:
        """What comes at ``position`` goes on a chain that was computed elsewhere, and whose end stands here."""
        self.close()
        self.open = Open(chain.context, chain.token_ids, position - len(chain), len(chain))
        return self.open

    def close(self) -> None:
        """The open chain ends here."""
        if self.open is not None:
            chain, first = self.open.chain, self.open.first
            if first < len(chain):
                self.before.append(Placement(chain, first, len(chain), self.open.position + first))
        self.open = None

    def place(self, part: Placement) -> None:
        """A part of a chain that was computed elsewhere stands here."""
        self.close()
        self.before.append(part)
        self.modular = True


def chains_of(composition: Composition) -> list[Placement]:
    """Of a composition that is computed whole, each part as a placement of the chain that it becomes.

    Texts one behind the other are one chain; a gap begins another, whose context is all that came before. The first
    part's position counts as 0. Raises ``BadInput`` for parts that are placements.
    """
    walk, placed = Walk(), []
    for part in composition.parts:
        if not isinstance(part, Text):
            raise BadInput("only texts are computed; a placement is stored already")
        open_chain = walk.start(part.position - composition.parts[0].position)
        start = len(open_chain.token_ids) // TOKEN_BYTES
        open_chain.token_ids += part.token_ids
        placed.append(Placement(open_chain.chain, start, start + len(part), part.position))
    return placed
