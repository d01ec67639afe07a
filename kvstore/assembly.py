"""A composition as far as the store has it: which tokens come from where, and which are left to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.composition import Chain, Composition, Part, Placement, Text
from kvstore.keys import TOKEN_BYTES, Namespace
from kvstore.layout import Layout
from kvstore.match import Match
from kvstore.store import Store
from kvstore.walk import Walk


@dataclass
class Run:
    """Consecutive tokens of a prompt that belong to one chain; the first so many of them are stored.

    A *modular* run was computed elsewhere, and is stored whole. What is not stored of any other run is computed in
    this prompt, and belongs to ``chain`` from then on.
    """

    chain: Chain  # its tokens end where the run ends
    first: int  # token of the chain that the run begins with
    column: int  # of the prompt
    position: int
    match: Match
    modular: bool = False
    stored: int = -1  # tokens of the chain that can be had

    def __post_init__(self) -> None:
        self.stored = self.match.tokens if self.stored < 0 else self.stored

    @property
    def stop(self) -> int:
        """The column behind it."""
        return self.column + len(self.chain) - self.first

    @property
    def cached(self) -> int:
        """How many of its leading tokens are stored."""
        return max(0, self.stored - self.first)


@dataclass
class Assembly:
    """A prompt resolved against a store. Holds leases until its matches are loaded or released."""

    composition: Composition
    runs: list[Run]

    @property
    def exact(self) -> bool:
        """Whether nothing is reused out of the context that it was computed in."""
        return not any(run.modular for run in self.runs)

    def missing(self) -> list[int]:
        """The columns that are left to compute, in order."""
        return [column for run in self.runs for column in range(run.column + run.cached, run.stop)]

    def release(self) -> None:
        """End all leases."""
        for run in self.runs:
            run.match.release()

    def without(self, broken: Sequence[int], stored: Sequence[int]) -> Composition:
        """The prompt with less expected of these modular runs, of whose chains only so many tokens can be had."""
        parts = list(self.composition.parts)
        for number, tokens in zip(broken, stored, strict=True):
            run = self.runs[number]
            place, part = next((n, p) for n, p in enumerate(parts) if p.position == run.position)
            kept = max(0, tokens - run.first)
            rest: list[Part] = [Text(part.token_ids[kept * TOKEN_BYTES :], part.position + kept)]
            if kept and isinstance(part, Placement):
                rest.insert(0, Placement(part.chain, part.start, part.start + kept, part.position))
            parts[place : place + 1] = rest
        return Composition(tuple(parts), self.composition.mark)


def assemble(
    store: Store, namespace: Namespace, layout: Layout, composition: Composition, apart: bool = True
) -> Assembly:
    """Look up every part of a prompt: what goes on in its own context first, then what was encoded ``apart``.

    At least the last token is left to compute. Without ``apart`` only what was computed in this very context is used.
    Takes leases, moves nothing.
    """
    return Assembly(composition, list(_Assembler(store, namespace, layout, composition, apart).runs()))


class _Assembler:
    """One walk through a prompt."""

    def __init__(
        self, store: Store, namespace: Namespace, layout: Layout, composition: Composition, apart: bool
    ) -> None:
        self._store, self._namespace, self._layout = store, namespace, layout
        self._composition, self._apart = composition, apart
        self._walk = Walk(composition.mark)
        self._column = 0  # where the open chain's first token stands

    def runs(self) -> Iterator[Run]:
        """The runs, in order."""
        total = len(self._composition)
        for column, part in self._composition.columns():
            if isinstance(part, Text):
                yield from self._text(column, part)
                continue
            done = 0
            if self._apart and not self._is_next(part):
                match = self._elsewhere(column, part, total)
                if match is not None:
                    yield from self._closed(False)
                    done = match.tokens - part.start
                    placed = Placement(part.chain, part.start, match.tokens, part.position)
                    self._walk.place(placed)
                    yield Run(part.chain.upto(match.tokens), part.start, column, part.position, match, modular=True)
            if done < len(part):
                rest = Text(part.token_ids[done * TOKEN_BYTES :], part.position + done)
                yield from self._text(column + done, rest)
        yield from self._closed(True)

    def _is_next(self, part: Placement) -> bool:
        """Whether the part is what goes on here anyway: this very chain, in this very context."""
        return self._walk.at(part.position).goes_on_with(part)

    def _text(self, column: int, part: Text) -> Iterator[Run]:
        before = self._walk.open
        if before is not None and before.end != part.position:
            yield from self._closed(False)
        here = self._walk.start(part.position)
        if here is not before:
            self._column = column
        here.token_ids += part.token_ids

    def _closed(self, last: bool) -> Iterator[Run]:
        """The open chain ends: its run, with what is stored of it."""
        here = self._walk.open
        if here is None:
            return
        chain = here.chain
        match = self._match(chain, 0, whole=not last)
        self._walk.close()
        yield Run(chain, 0, self._column, here.position, match)

    def _elsewhere(self, column: int, part: Placement, total: int) -> Match | None:
        """What is stored of a part that was encoded apart: all of it, or it is no use, and more than goes on here.

        With less, what comes behind it would be found no more as soon as more is stored.
        """
        stop = part.stop - (column + len(part) == total)  # the prompt's last token is left
        found = self._match(part.chain.upto(stop), part.start, whole=True)
        if found.tokens == stop > part.start + self._covered(part):
            return found
        found.release()
        return None

    def _covered(self, part: Part) -> int:
        """How many tokens of a part are stored as computed right here."""
        here = self._walk.at(part.position)
        start = len(here.chain)
        match = self._match(Chain(here.token_ids + part.token_ids, here.context), start, whole=True)
        match.release()
        return max(0, match.tokens - start)

    def _match(self, chain: Chain, first: int, whole: bool) -> Match:
        root = chain.context.root(self._namespace)
        return self._store.match(self._namespace, self._layout, chain.token_ids, root=root, first=first, whole=whole)
