"""Verbs that find, load and save: a client's arguments, checked by ``verbs``, to the store, and its answers packed."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvstore.daemon.packed import (
    checked,
    layout_of,
    namespace_of,
    pack_composition,
    pack_match,
    pack_prospect,
    shard_of,
)
from kvstore.daemon.session import GONE, Session, packed_bits
from kvstore.errors import BadInput, TierError
from kvstore.fetch import Fetch
from kvstore.keys import Namespace
from kvstore.layout import Layout
from kvstore.residency import Resident
from kvstore.save import Draft
from kvstore.writer import Durable

_GIVEN = (int, int, bool)  # of a draft: its block, its number, and whether it was filled in one go
MAX_DRAFTS = 4096  # that are given at once


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back: the value, and descriptors of arenas."""

    value: object
    arenas: Sequence[object] = ()  # that the client gets to know: [staging, number, bytes] of each
    fds: Sequence[int] = ()


def match(
    session: Session, space: bytes, layout: bytes, tokens: bytes, root: bytes | None, first: int, whole: bool
) -> object:
    """See ``Store.match``."""
    found = session.store.match(namespace_of(space), layout_of(layout), tokens, root=root, first=first, whole=whole)
    return pack_match(found, session.keep(found) if found.blocks else 0)


def cut(session: Session, number: int, blocks: int) -> None:
    """See ``Match.cut``: what the client asks next of the match, it asks of what is left."""
    session.cut(number, blocks)


def load(session: Session, number: int) -> Reply:
    """See ``Store.load``: for each block its tokens, slot, place in the arena, stride, form, what is there of it."""
    name, begun = session.begin(number)
    sources, addresses = [], []
    for source in begun.sources:
        held = source.held
        assert held is not None
        resident, state = held, None
        if isinstance(held, Fetch):
            resident, state = held.resident, packed_bits(GONE if held.failed else held.ready)
        assert isinstance(resident, Resident)
        addresses.append(resident.address)
        place = session.tenant.host.offset(resident.address)
        form = source.origin.form
        sources.append([source.number, source.tokens, resident.address, place, resident.stride, form, state])
    try:
        arenas, fds = session.show(addresses)
    except TierError:
        session.release(name, 0)
        raise
    return Reply([name, sources], arenas, fds)


def sums(session: Session, name: int) -> object:
    """Checksums of the pieces of a load's blocks, where they are known."""
    begun = session.loads.get(name)
    if begun is None:
        raise BadInput("the load was released")
    found = []
    for source in begun.sources:
        held = source.held.resident if isinstance(source.held, Fetch) else source.held
        known: array[int] | None = None if held is None else held.checksums
        found.append(None if known is None else known.tobytes())
    return found


def drafts(session: Session, layout: bytes, count: int) -> Reply:
    """See ``Store.drafts``: slots of the client's own staging area."""
    shape, wanted = layout_of(layout), min(count, MAX_DRAFTS)
    found = session.area.reserve(shape, wanted)
    if len(found) < wanted:  # what others have taken and do not use
        for each in session.tenant.sessions:
            each.area.trim()
        found += session.area.reserve(shape, wanted - len(found))
    try:
        arenas, fds = session.show([address for _, address in found], staging=True)
    except TierError:
        session.area.discard([number for number, _ in found])
        raise
    places = [[number, address, session.area.offset(address)] for number, address in found]
    return Reply(places, arenas, fds)


def intake(session: Session, number: int) -> Draft | None:
    """A block that the client has filled, copied and checked in; None when memory is short. Any thread."""
    layout, payload = filled(session, number)
    draft = session.store.draft(layout)
    if draft is not None:
        draft.fill(payload, True)
    return draft


def filled(session: Session, number: int) -> tuple[Layout, memoryview]:
    """The payload of a block that the client has filled. Raises ``BadInput``."""
    layout, slot = session.area.draft(number)
    return layout, slot[layout.header_bytes : layout.header_bytes + layout.payload_bytes(layout.block_tokens)]


def _take_in(
    session: Session,
    namespace: Namespace,
    layout: Layout,
    tokens: bytes,
    root: bytes | None,
    drafts: Mapping[int, tuple[int, bool]],
    copies: dict[int, Draft],
) -> None:
    """Copies what is not in memory yet to ``copies``, as far as there is memory."""
    for block in session.store.lacking(namespace, layout, tokens, sorted(drafts), root=root):
        number, early = drafts[block]
        copy = session.area.copy_of(number) if early else None
        draft = intake(session, number) if copy is None else copy.result()
        if draft is None:
            break
        copies[block] = draft


def save(
    session: Session,
    space: bytes,
    layout: bytes,
    tokens: bytes,
    given: Sequence[Sequence[Any]],
    root: bytes | None,
    owner: str,
    ttl: float | None,
    writer: str,
    form: str,
    part: Sequence[Any] | None,
) -> object:
    """See ``Store.save``: what is not in memory yet is copied and checked in once; then nobody's drafts are needed."""
    namespace, shape, store = namespace_of(space), layout_of(layout), session.store
    shard = None if part is None else shard_of(part, shape)
    copies: dict[int, Draft] = {}
    drafts = {block: (number, early) for block, number, early in (checked(each, _GIVEN) for each in given)}
    try:
        own = shape if shard is None else shard.layout
        if any(session.area.draft(number)[0] != own for number, _ in drafts.values()):
            raise BadInput("a draft has another layout than the save; ask store.draft for one of this layout")
        if shard is None:
            _take_in(session, namespace, shape, tokens, root, drafts, copies)
        else:
            parts = {block: filled(session, number)[1] for block, (number, _) in drafts.items()}
            store.join(namespace, shape, tokens, parts, shard, root)
        named = partial(store.save, owner=owner, ttl=ttl, writer=writer)
        saved = named(namespace, shape, tokens, copies, root=root, form=form, shard=shard)
    finally:
        session.area.discard([number for number, _ in drafts.values()])
        for made in copies.values():
            made.discard()  # if it was not taken over
    return [session.remember(saved), saved.tokens, saved.new_tokens]


def wait(session: Session, number: int, timeout: float | None) -> object:
    """See ``Saved.wait``; of a save that was long ago nothing is known any more."""
    saved = session.saves.get(number)
    durable = saved.wait(timeout) if saved is not None else Durable(0, 0, 0)
    return [durable.tokens, durable.blocks, durable.bytes]


def prospect(session: Session, numbers: Sequence[int], device: bool) -> object:
    """See ``Store.prospect``."""
    if not numbers:
        raise BadInput("a prospect is of one match at least")
    matches = [session.match(number) for number in checked(numbers, [int] * len(numbers))]
    return pack_prospect(session.store.prospect(matches, device))


def discover(session: Session, space: bytes, layout: bytes, tokens: bytes, minimum: int) -> object:
    """See ``Store.discover``."""
    return pack_composition(session.store.discover(namespace_of(space), layout_of(layout), tokens, minimum))


def expect(session: Session, layout: bytes) -> None:
    """See ``Store.expect``."""
    session.store.expect(layout_of(layout))
