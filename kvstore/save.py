"""The life of a save: drafts become blocks that ``match`` sees at once; the writer takes them to disk later."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kvstore.block import address_of, copy_checked
from kvstore.errors import BadInput
from kvstore.families import NONE
from kvstore.keys import APART, TOKEN_BYTES, Namespace, check_names, links
from kvstore.kinds import Kind, Origin
from kvstore.layout import Layout
from kvstore.residency import Residency, Resident
from kvstore.room import keep_free, reserve_hosts
from kvstore.writer import Durable, Writer


class Slots(Protocol):
    """Memory in slots."""

    def view(self, address: int) -> memoryview:
        """The slot's bytes."""

    def pointer(self, address: int) -> int:
        """Where they begin."""


class Home(Protocol):
    """What a draft needs of the store that it is of."""

    @property
    def host(self) -> Slots:
        """Where the draft is."""

    def slot_abandoned(self, address: int) -> None:
        """The draft was dropped; called by finalizers, so it takes no lock."""


class Draft:
    """A private host slot to write one block into. Belongs to one thread until it is given to ``save``.

    Dropping it gives the slot back.
    """

    __slots__ = ("_home", "_owned", "_pointer", "address", "checksums", "layout")

    def __init__(self, home: Home, layout: Layout, address: int) -> None:
        self.layout = layout
        self.address = address
        self.checksums: array[int] | None = None
        self._pointer = home.host.pointer(address) + layout.header_bytes
        self._home = home
        self._owned = True

    def __del__(self) -> None:
        self.discard()

    def layer(self, layer: int) -> tuple[memoryview, memoryview]:
        """Writable keys and values of a layer, each ``[head][block_tokens][dim]``."""
        layout = self.layout
        start = layout.header_bytes + layout.layer_offsets(layout.block_tokens)[layer]
        middle = start + layout.key_bytes(layer, layout.block_tokens)
        end = middle + layout.value_bytes(layer, layout.block_tokens)
        view = self._home.host.view(self.address)
        return view[start:middle], view[middle:end]

    @property
    def payload(self) -> memoryview:
        """Writable payload of the whole block."""
        header = self.layout.header_bytes
        return self._home.host.view(self.address)[header : header + self.layout.payload_bytes(self.layout.block_tokens)]

    def fill(self, payload: memoryview, check: bool = False) -> None:
        """Copies a whole block's payload in. With ``check`` its checksums are taken in the same pass over memory.

        ``payload`` must be a writable buffer (its address is needed) of the layout's payload size.
        """
        size = self.layout.payload_bytes(self.layout.block_tokens)
        if len(payload) != size:
            raise BadInput(f"a block of this layout has {size} bytes of payload, not {len(payload)}")
        if check:
            self.checksums = copy_checked(self.payload, payload, self.layout, self.layout.block_tokens)
        else:
            ctypes.memmove(self._pointer, address_of(payload), size)

    def discard(self) -> None:
        """Gives the slot back; again is no error."""
        if self._owned:
            self._owned = False
            self._home.slot_abandoned(self.address)

    def usable(self, home: Home) -> bool:
        """Whether it is its holder's still, in this store."""
        return self._owned and self._home is home

    def take(self) -> int:
        """The slot's address, which the caller owns from now on."""
        self._owned = False
        return self.address


class Saved:
    """A save under way. ``tokens`` are visible to ``match`` already; ``new_tokens`` of them came from this save."""

    def __init__(self, writer: Writer, chain: list[tuple[int, int, int]], new: list[int], tokens: int, new_tokens: int):
        self._writer = writer
        self._chain = chain  # (number, sequence, tokens of it)
        self._new = new
        self._tokens, self._new_tokens = tokens, new_tokens

    @property
    def tokens(self) -> int:
        """Leading tokens of the chain that are stored."""
        return self._tokens

    @property
    def new_tokens(self) -> int:
        """How many of them this save has stored."""
        return self._new_tokens

    def settled(self, timeout: float) -> bool:
        """Whether it is known by then what is stored; in the store's own process it is known at once."""
        return True

    def wait(self, timeout: float | None = None) -> Durable:
        """Writes what is still only in memory, waits for it, and tells what is durable. Without a disk: nothing is."""
        return self._writer.wait(self._chain, set(self._new), timeout)


class Saver:
    """Publishes drafts. One per store."""

    def __init__(self, residency: Residency, writer: Writer) -> None:
        self._residency = residency
        self._writer = writer
        self.listeners = residency.listeners

    def drafts(self, layout: Layout, count: int) -> list[Draft]:
        """See ``Store.drafts``."""
        residency = self._residency
        with residency.lock:
            residency.check_open()
            residency.settle()
            slots = reserve_hosts(residency, layout.full_slot_bytes, count)
            drafts = [Draft(residency, layout, address) for address in slots]
            residency.drafts += len(drafts)
        return drafts

    def lacking(
        self, namespace: Namespace, root: bytes, layout: Layout, tokens: bytes, numbers: Sequence[int]
    ) -> list[int]:
        """Of these blocks of a chain, by their number in it, those that are not in memory."""
        keys = [key for _, key, _ in links(namespace, root, tokens, layout.block_tokens * TOKEN_BYTES)]
        with self._residency.lock:
            index, residents = self._residency.index, self._residency.residents
            return [i for i in numbers if i < len(keys) and index.number.get(keys[i], NONE) not in residents]

    def save(
        self,
        namespace: Namespace,
        root: bytes,
        layout: Layout,
        tokens: bytes,
        drafts: Mapping[int, Draft],
        owner: str,
        ttl: float | None,
        origin: Origin,
    ) -> Saved:
        """Publishes the blocks of a chain behind ``root``; takes over all ``drafts``. See ``Store.save``."""
        check_names(owner, namespace.tenant, origin.writer)
        shared = Kind(namespace.digest, namespace.fingerprint.digest, namespace.tenant, owner, layout, origin)
        residency, whole = self._residency, layout.block_tokens * TOKEN_BYTES
        blocks, now = list(links(namespace, root, tokens, whole)), residency.wall()
        expires = now + ttl if ttl is not None else 0.0
        chain, new, sequences = list[int](), list[int](), list[tuple[int, int, int]]()
        visible = fresh = 0
        with residency.lock:
            residency.check_open()
            residency.settle()
            index = residency.index
            kind = index.intern(shared)
            number = index.root(root) if root != APART else NONE
            for i, (above, key, piece) in enumerate(blocks):
                parent = number if root != APART else index.root(above)
                number, added = self._stored(key, parent, kind, piece, drafts.get(i), now, expires)
                if number == NONE and root == APART:
                    continue
                if number == NONE:
                    break
                if added:
                    new.append(number)
                    fresh += len(piece) // TOKEN_BYTES
                visible += len(piece) // TOKEN_BYTES
                chain.append(number)
                sequences.append((number, index.sequence[number], len(piece) // TOKEN_BYTES))
            residency.host_policy.arrange(chain, served=True)
            residency.disk_policy.arrange(chain, served=True)
            self._tell(new, chain)
            keep_free(residency, layout.full_slot_bytes)
        for draft in drafts.values():
            draft.discard()
        residency.counters.add("saved_tokens", fresh)
        residency.counters.add("saved_bytes", fresh * layout.token_payload)
        return Saved(self._writer, sequences, new, visible, fresh)

    def _stored(
        self, key: bytes, parent: int, kind: int, piece: bytes, draft: Draft | None, now: float, expires: float
    ) -> tuple[int, bool]:
        """One block of a save, and whether it is new; NONE when it is neither stored nor drafted. Locked."""
        index = self._residency.index
        layout, number = index.kinds[kind].layout, index.number.get(key, NONE)
        if number != NONE and not index.same_layout(number, layout):
            return NONE, False  # the namespace holds this chain in another layout
        if number != NONE and not index.same(number, parent, piece):
            return NONE, False  # cannot be, unless the hash is broken
        if number != NONE and index.present(number):
            if index.expires[number] and (not expires or expires > index.expires[number]):
                index.expires[number] = expires
            if index.kind_of(number).origin.form == index.kinds[kind].origin.form:  # else it is not what is on disk
                self._adopt(number, draft, piece)
            return number, False
        if len(piece) < layout.block_tokens * TOKEN_BYTES and (cover := self._cover(parent, piece, layout)) != NONE:
            return cover, False
        if draft is None:
            return NONE, False
        return self._publish(number, key, parent, kind, piece, draft, now, expires), True

    def _tell(self, new: list[int], chain: list[int]) -> None:
        """New blocks are there, in a chain that was used. Locked."""
        for listener in self.listeners:
            listener.extend(new)
        for tell in (self._residency.admit, self._residency.share):
            tell(chain)

    def _cover(self, parent: int, piece: bytes, layout: Layout) -> int:
        """A stored sibling that starts with all tokens of this partial block, or NONE. Locked."""
        index = self._residency.index
        child, common = index.best_child(parent, piece, self._residency.wall())
        covers = child != NONE and common * TOKEN_BYTES == len(piece) and index.same_layout(child, layout)
        return child if covers else NONE

    def _adopt(self, number: int, draft: Draft | None, piece: bytes) -> None:
        """A block that is only on disk, or on other hosts, was computed again, as that was quicker: from now on it is
        in memory, too. Not while somebody holds it, who may be reading it. Locked."""
        residency = self._residency
        held = remote.taken if (remote := residency.index.remote.get(number)) else number in residency.index.leases
        if draft is None or number in residency.residents or held:
            return
        size, stride = residency.payload(number), draft.layout.block_tokens
        resident = Resident(draft.take(), draft.layout, stride, size, clean=remote is None)
        residency.drafts -= 1
        residency.put_host(number, resident, piece)
        residency.counters.add("host_adopted_blocks")

    def _publish(
        self, number: int, key: bytes, parent: int, kind: int, piece: bytes, draft: Draft, now: float, expires: float
    ) -> int:
        """Makes a draft a block that ``match`` sees. Locked."""
        residency, index = self._residency, self._residency.index
        count = len(piece) // TOKEN_BYTES
        sequence = next(residency.sequences)
        if number == NONE:
            number = index.insert(key, parent, kind, count, sequence, now, expires)
        else:  # absent, kept for its children
            index.renew(number, kind, sequence, now, expires)
        layout = draft.layout
        whole = draft.checksums if count == layout.block_tokens else None
        payload = layout.token_payload * count
        resident = Resident(draft.take(), layout, layout.block_tokens, payload, checksums=whole)
        residency.drafts -= 1
        residency.put_host(number, resident, piece)
        if expires:
            residency.expire_at(number, expires)
        if index.families.size(parent) == 1:
            return number
        family = index.families.children(parent)
        at = index.families.position(family, number)
        while at > 0 and piece.startswith(index.tokens_of(family[at - 1])):
            if not index.same_layout(family[at - 1], layout):
                break
            residency.keeping.pass_on(family[at - 1], number)
            residency.doom(family[at - 1], erase=False)  # a proper prefix: this block serves all that it served
            residency.counters.add("superseded_blocks")
            at -= 1
        return number


def check_drafts(layout: Layout, drafts: Mapping[int, Draft], ours: Callable[[Draft], bool]) -> None:
    """``BadInput`` where a draft is not the caller's to give, or not of this layout."""
    for draft in drafts.values():
        if draft.layout != layout:
            raise BadInput("a draft has another layout than the save; ask store.draft for one of this layout")
        if not ours(draft):
            raise BadInput("a draft is of another store, or was given away before; ask store.draft for a new one")
    if len({id(draft) for draft in drafts.values()}) < len(drafts):
        raise BadInput("a draft stands for two blocks; ask store.draft for one each")
