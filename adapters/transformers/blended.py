"""The chain that a blend becomes, so that it is made once: from the first module on, everything that stands there.

Which tokens are computed anew depends on all modules of the prompt, so the chain's context names them all, beside the
share. It is used whole or not at all, and never found behind anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from kvstore.assembly import Assembly
from kvstore.composition import Chain, Composition, Context, Part, Placement, Text
from kvstore.keys import TOKEN_BYTES
from kvstore.walk import Walk


def mark_of(composition: Composition, share: float) -> str:
    """The word for a blend of these modules."""
    placed = b"".join(part.item for part in composition.parts if isinstance(part, Placement))
    return f"blend {share:g} {blake2b(placed, digest_size=16).hexdigest()}"


@dataclass(frozen=True, eq=False)
class Blended:
    """``chain`` begins at ``column`` and ``position``; modules end before its token ``modules``."""

    chain: Chain
    column: int
    position: int
    modules: int

    @classmethod
    def of(cls, assembly: Assembly) -> Blended | None:
        """Of a prompt that reuses modules; None when it has gaps behind the first, so that it is no chain."""
        composition, walk = assembly.composition, Walk()
        first = next(run for run in assembly.runs if run.modular)
        for run in assembly.runs[: assembly.runs.index(first)]:
            walk.start(run.position).token_ids += run.chain.token_ids
        walk.close()
        context = Context((*(placed.moved(-first.position) for placed in walk.before), composition.mark))
        if composition.end - first.position != len(composition) - first.column:
            return None
        tokens = b"".join(part.token_ids for part in composition.parts)[first.column * TOKEN_BYTES :]
        last = max(run.stop for run in assembly.runs if run.modular)
        return cls(Chain(tokens, context), first.column, first.position, last - first.column)

    def instead(self, composition: Composition, tokens: int) -> Composition:
        """The prompt with the chain's first ``tokens`` in the place of what they were made of."""
        stop = self.column + tokens
        parts: list[Part] = []
        for column, part in composition.columns():
            if column + len(part) <= self.column:
                parts.append(part)
            elif column < self.column:  # a text that goes on into the chain
                parts.append(Text(part.token_ids[: (self.column - column) * TOKEN_BYTES], part.position))
        parts.append(Placement(self.chain, 0, tokens, self.position))
        for column, part in composition.columns():
            if column + len(part) > stop:
                done = max(0, stop - column)
                parts.append(Text(part.token_ids[done * TOKEN_BYTES :], part.position + done))
        return Composition(tuple(parts), composition.mark)
