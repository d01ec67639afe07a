"""Going through a prompt part by part: which chain each of its tokens belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.composition import NOTHING, Chain, Composition, Context, Placement, Text
from kvstore.errors import BadInput
from kvstore.keys import TOKEN_BYTES


@dataclass
class Open:
    """The chain that goes on where a prompt has come to: everything behind ``context`` was computed in one piece."""

    context: Context
    token_ids: bytes
    position: int  # of its first token

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

    def placed(self) -> list[Placement]:
        """What of it stands in the prompt; nothing, as long as it is empty."""
        chain = self.chain
        return [Placement(chain, 0, len(chain), self.position)] if self.token_ids else []


class Walk:
    """Goes through a prompt part by part, and knows the chain of whatever is computed next."""

    def __init__(self, mark: str = "") -> None:
        self.mark = mark
        self.before: list[Placement] = []  # what stands in the prompt so far, but for ``open``
        self.open: Open | None = None
        self.modular = False  # something in ``before`` was not computed in this prompt

    def at(self, position: int) -> Open:
        """What a text at ``position`` would be computed behind: the open chain, or all that stands there."""
        if self.open is not None and self.open.end == position:
            return self.open
        before = [*self.before, *([] if self.open is None else self.open.placed())]
        context: list[Placement | str] = [placed.moved(-position) for placed in before]
        first = before[0].position if before else position
        if first:
            context.append(f"from {first}")  # what starts elsewhere has other bits
        if self.modular and self.mark:
            context.append(self.mark)
        return Open(Context(tuple(context)) if context else NOTHING, b"", position)

    def start(self, position: int) -> Open:
        """A text begins at ``position``; its chain is the open one from now on."""
        here = self.at(position)
        if here is not self.open:
            _ = here.context.digest  # now: those of the contexts within it are known, so this goes one level deep
            self.close()
            self.open = here
        return here

    def close(self) -> None:
        """The open chain ends here."""
        if self.open is not None:
            self.before += self.open.placed()
        self.open = None

    def place(self, part: Placement) -> None:
        """A part of a chain that was computed elsewhere stands here."""
        self.close()
        self.before.append(part)
        self.modular = True


def chains_read(composition: Composition) -> list[tuple[Chain, int]]:
    """What a prompt is read from when all of it is stored: chains, each from its first token that stands in it."""
    walk, read = Walk(composition.mark), list[tuple[Chain, int]]()
    for part in composition.parts:
        here = walk.at(part.position)
        if isinstance(part, Placement) and not here.goes_on_with(part):
            if walk.open is not None:
                read.append((walk.open.chain, 0))
            read.append((part.chain.upto(part.stop), part.start))
            walk.place(part)
            continue
        if here is not walk.open and walk.open is not None:
            read.append((walk.open.chain, 0))
        walk.start(part.position).token_ids += part.token_ids
    return read if walk.open is None else [*read, (walk.open.chain, 0)]


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
