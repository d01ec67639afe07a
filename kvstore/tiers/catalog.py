"""The port of the disk tier's index, and its naive twin that lives in memory.

A catalog knows which block lies at which address, and its token ids. It is only ever a copy of what stands in the
slots' headers: whoever doubts one makes a new one from them.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.block import Header
from kvstore.errors import TierError
from kvstore.sealed import SealedTokens
from kvstore.tiers.base import Entry


class Doubt(TierError):
    """The catalog on the medium cannot be trusted, or is not there; the message says why."""


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction: what came (address, header), which sequences went, when which were used, small strings."""

    added: Sequence[tuple[int, Header]] = ()
    forgotten: Collection[int] = ()
    used: Mapping[int, float] = field(default_factory=dict)
    memos: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.forgotten or self.used or self.memos)


class Snapshot(Protocol):
    """All blocks of a catalog at one moment, in order of sequence."""

    def addresses(self) -> array[int]:
        """Their addresses."""

    def entries(self) -> Iterator[Entry]:
        """Their entries; keys and parents of sealed ones as they stand in their headers."""


class Catalog(Protocol):
    """Any method may be called from any thread. All but the properties raise ``TierError``."""

    @property
    def size(self) -> int:
        """Bytes that it takes on the medium."""

    def room(self, blocks: int) -> bool:
        """Whether it can hold so many blocks altogether, as far as it can tell."""

    def snapshot(self) -> Snapshot:
        """All blocks as they are now."""

    def tokens(self, sequence: int) -> bytes | SealedTokens | None:
        """Token bytes of a block, as its header has them; None when it is not known, or its bytes are not what was
        written."""

    def recall(self, name: str) -> str | None:
        """A small string that was kept."""

    def apply(self, change: Change) -> None:
        """Makes a change, whole or not at all; durable when it returns."""

    def rewrite(self) -> None:
        """Moves to a fresh medium and destroys the old one, so that nothing forgotten is left on it."""

    def close(self) -> None:
        """Lets go of everything."""


def entry_of(address: int, header: Header) -> Entry:
    """What a catalog says of a block that was just written."""
    return Entry(
        sequence=header.sequence,
        address=address,
        key=header.key,
        parent=header.parent,
        namespace=header.namespace,
        tenant=header.tenant,
        owner=header.owner,
        layout=header.layout,
        tokens=header.token_count,
        stride=header.stride,
        created=header.created,
        expires=header.expires,
        used=header.created,
        root=header.root,
        form=header.form,
        seal=header.seal.mark if header.seal is not None else 0,
    )


class MemorySnapshot:
    """``Snapshot`` of plain entries."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    def addresses(self) -> array[int]:
        """See ``Snapshot``."""
        return array("Q", [entry.address for entry in self._entries])

    def entries(self) -> Iterator[Entry]:
        """See ``Snapshot``."""
        return iter(self._entries)


class MemoryCatalog:
    """Two dicts. Where no index can be kept on the medium, the slots' headers are read anew at each opening."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._tokens: dict[int, bytes | SealedTokens] = {}
        self._memos: dict[str, str] = {}

    @property
    def size(self) -> int:
        """Nothing: it takes no room on the medium."""
        return 0

    def room(self, blocks: int) -> bool:
        """Always."""
        return True

    def snapshot(self) -> MemorySnapshot:
        """See ``Catalog``."""
        return MemorySnapshot(sorted(self._entries.values()))

    def tokens(self, sequence: int) -> bytes | SealedTokens | None:
        """See ``Catalog``."""
        return self._tokens.get(sequence)

    def recall(self, name: str) -> str | None:
        """See ``Catalog``."""
        return self._memos.get(name)

    def apply(self, change: Change) -> None:
        """See ``Catalog``."""
        for sequence in change.forgotten:
            self._entries.pop(sequence, None)
            self._tokens.pop(sequence, None)
        for sequence, when in change.used.items():
            if sequence in self._entries:
                self._entries[sequence] = self._entries[sequence]._replace(used=when)
        for address, header in change.added:
            self._entries[header.sequence] = entry_of(address, header)
            self._tokens[header.sequence] = header.indexed_tokens
        self._memos.update(change.memos)

    def rewrite(self) -> None:
        """Nothing to do: what was forgotten is gone."""

    def close(self) -> None:
        """Nothing to do."""
