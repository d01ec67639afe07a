"""The disk tier: slots in extent files, an index beside them, under one byte budget.

Data is durable before it is indexed, and what is forgotten is out of the index before its slot is written again, so an
indexed block is always whole, whenever the power goes. The slots' headers are the truth: an index that is lost or in
doubt is made anew from them. FORMAT.md is the prose.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from kvstore.block import Header
from kvstore.errors import BadInput, TierError
from kvstore.files import Files
from kvstore.sealed import SealedTokens
from kvstore.tiers import inventory, rebuild
from kvstore.tiers.base import Entry, Problem
from kvstore.tiers.extents import Extents
from kvstore.tiers.folder import Folder
from kvstore.tiers.pending import Pending
from kvstore.tiers.slab import SLOT_BITS
from kvstore.tiers.slots import Slots
from kvstore.vault import Vault

log = logging.getLogger(__name__)
MIB = 1 << 20
MIN_CAPACITY = 4 * MIB
SMALL_FILES = 64 << 10  # tag, lock, digest, folders
LEFT_TO_OTHERS = 256 * MIB  # of the filesystem, or a twentieth of it if that is less
Place = str | os.PathLike[str]


class DiskTier:
    """``Tier`` on a local disk. See ``base.Tier`` for what each method promises."""

    def __init__(
        self,
        files: Files,
        path: Place,
        capacity: int | None,
        *,
        create: bool = True,
        index_bytes: int | None = None,
        vault: Vault | None = None,
    ) -> None:
        """Takes the directory ``path`` with a budget of ``capacity`` bytes (None: all that is there, to look only).

        ``index_bytes`` is the index's part of the budget. ``vault``: what seals blocks; it closes with the tier.
        Raises ``BadInput``, ``StoreBusy`` or ``TierError``.
        """
        if capacity is not None and capacity < MIN_CAPACITY:
            raise BadInput(f"a disk tier needs at least {MIN_CAPACITY >> 20} MiB, but {capacity} bytes were given")
        self._files, self.vault = files, vault
        self._committing = threading.RLock()
        self._closed = False
        self._pid = os.getpid()
        self._pending = Pending(files.monotonic())
        self.problems: list[Problem] = []  # found and mended at open
        self._folder = Folder(files, path, create=create)
        self._extents = Extents(files, self._folder.data)
        try:
            with _translated():
                self._open(capacity, index_bytes)
        except BaseException:
            self._extents.close()
            self._folder.close()
            raise

    def _open(self, capacity: int | None, index_bytes: int | None) -> None:
        files, folder = self._files, self._folder
        space = files.space(folder.path)
        if capacity is not None and capacity > space.total:
            raise BadInput(
                f"the filesystem of {folder.path!r} has {space.total} bytes in all, not {capacity}; give less"
            )
        self._capacity = capacity if capacity is not None else max(space.total, MIN_CAPACITY)
        network = folder.network()
        reserve = 0 if network else index_bytes or max(MIB, self._capacity // 32)
        self._index_limit = reserve // 2  # while it is written anew there are two
        extents, spare = self._extents, min(LEFT_TO_OTHERS, space.total // 20)
        budget = self._capacity - reserve - SMALL_FILES
        self._slots = Slots(files, folder.data, extents, self._capacity, budget, spare)
        if self._extents.damaged:  # a loss only if blocks were in them, which `load` sees
            log.warning("%s: torn or cut: %s", folder.data, ", ".join(self._extents.damaged))
        if self._extents.foreign:
            log.warning("%s holds %d bytes that are not ours; they count", folder.data, self._extents.foreign)
        if network:
            log.warning("%s is on %s: the index is kept in memory and read anew", folder.data, network)
        place = None if network else f"{folder.data}/index"
        self._catalog = rebuild.catalog(
            files, place, self._index_limit, self.read, self._slots.slab.extents, self._note
        )

    def _note(self, what: str) -> None:
        log.warning("%s: %s", self._folder.data, what)
        self.problems.append(Problem(0, "", what))

    # --- room: under the store's lock

    @property
    def capacity(self) -> int:
        """Byte budget."""
        return self._capacity

    @property
    def used(self) -> int:
        """Bytes that are taken: extents, index, and what is not ours among them."""
        return self._slots.slab.used + self._catalog.size + self._extents.foreign + SMALL_FILES

    def reserve(self, slot_bytes: int) -> int | None:
        """See ``Tier``. Also None when the index has no room for one more block."""
        return self._slots.reserve(slot_bytes) if self._catalog.room(self._slots.taken + 1) else None

    def headroom(self, slot_bytes: int) -> int:
        """See ``Tier``."""
        return self._slots.headroom(slot_bytes)

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """See ``Tier``."""
        return self._slots.same_class(address, slot_bytes)

    def neighbours(self, address: int) -> Sequence[int]:
        """See ``Tier``."""
        return self._slots.neighbours(address)

    def free(self, address: int) -> None:
        """See ``Tier``. What lay there must have been forgotten before."""
        self._slots.free(address)

    # --- bytes: from any thread

    def write(self, address: int, slot: memoryview) -> None:
        """See ``Tier``."""
        if self._slots.named(address):
            self.commit(())
        offset, length = self._place(address, 0, len(slot))
        with _translated(), self._extents.use(address >> SLOT_BITS) as handle:
            self._files.write(handle, slot, offset)
            if len(slot) < length:  # so that a slot holds nothing of the block before
                self._files.zero(handle, offset + len(slot), length - len(slot))

    def read(self, address: int, offset: int, buffer: memoryview) -> None:
        """See ``Tier``."""
        start, _ = self._place(address, offset, len(buffer))
        with _translated(), self._extents.use(address >> SLOT_BITS) as handle:
            if self._files.read(handle, buffer, start) != len(buffer):
                raise TierError("the slot is cut short")

    def _place(self, address: int, offset: int, length: int) -> tuple[int, int]:
        place = self._slots.place(address, offset, length)
        if place is None:
            raise TierError("no such place in a slot")
        return place

    def commit(self, written: Sequence[tuple[int, Header]]) -> None:
        """See ``Tier``. Without blocks: writes down what was forgotten, used and remembered."""
        with _translated():
            self._extents.sync(sorted({address >> SLOT_BITS for address, _ in written}))
        self._apply(written)

    def _apply(self, written: Sequence[tuple[int, Header]], everything: bool = False) -> None:
        with self._committing:
            freed = self._slots.freed()  # before the change: what was freed had been forgotten by then
            change = self._pending.change(written, self._files.monotonic(), everything)
            try:
                self._catalog.apply(change)
            except TierError:
                if not change.used:
                    raise
                self._catalog.apply(replace(change, used={}))  # times of use are not worth a block
            self._pending.done(change)
            self._slots.rested(freed)

    def forget(self, sequences: Iterable[int]) -> None:
        """See ``Tier``."""
        self._pending.forget(sequences)

    def touch(self, sequences: Iterable[int], now: float) -> None:
        """See ``Tier``."""
        self._pending.touch(sequences, now)

    def tokens(self, sequence: int) -> bytes | None:
        """See ``Tier``."""
        found = self._catalog.tokens(sequence)
        if isinstance(found, SealedTokens):
            return None if self.vault is None else self.vault.tokens(sequence, found)
        return found

    def remember(self, name: str, value: str) -> None:
        """See ``Tier``."""
        self._pending.remember(name, value)

    def recall(self, name: str) -> str | None:
        """See ``Tier``."""
        value = self._pending.recall(name)
        return value if value is not None else self._catalog.recall(name)

    def erase(self, addresses: Sequence[int]) -> None:
        """See ``Tier``. Also zeroes every free slot that may hold old bytes, and writes the index anew."""
        with self._committing, _translated():
            self._apply((), everything=True)
            self._slots.zero(addresses)
            self._extents.tidy()
            self._catalog.rewrite()

    # --- the whole

    def load(self) -> Iterator[Entry]:
        """See ``Tier``. When the budget has become smaller, gives back the extents that were used longest ago."""
        snapshot = self._catalog.snapshot()
        slab = self._slots.slab
        gone = inventory.beyond(slab, snapshot, self._catalog.size, self._index_limit)
        for extent in gone:
            slab.drop(extent)
        lost = inventory.claim(slab, snapshot)
        self._slots.taken = len(snapshot.addresses()) - len(lost)
        if lost and not gone:
            self._note(f"{len(lost)} blocks are lost: their extents are not there or damaged")
        if lost or gone:
            log.info("%s: %d extents given back, for the budget is smaller now", self._folder.data, len(gone))
            self.forget(lost)
            with _translated():
                self._apply(())
                self._extents.tidy()
                if self._catalog.size > self._index_limit:
                    self._catalog.rewrite()
        entries = inventory.without(snapshot, lost)
        return entries if self.vault is None else inventory.revealed(entries, self.vault)

    def verify(self) -> Iterator[Problem]:
        """See ``Tier``. Begins with what was found and mended at open."""
        yield from self.problems
        entries, tokens = self._catalog.snapshot().entries(), self._catalog.tokens
        for problem, sequence in rebuild.check(self.read, entries, tokens, self.vault):
            if not self._pending.forgotten(sequence) and tokens(sequence) is not None:
                yield problem

    def close(self) -> None:
        """See ``Tier``."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        with ExitStack() as stack, _translated():
            if self.vault is not None:
                stack.callback(self.vault.close)
            stack.callback(self._folder.close)
            stack.callback(self._extents.close)
            stack.callback(self._catalog.close)
            self._apply((), everything=True)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TierError(f"disk: {error}") from error
