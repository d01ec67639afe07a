"""The header of a block as the index knows it, for whoever writes the block somewhere."""

from __future__ import annotations

from kvstore.block import Header
from kvstore.index import Index


def heading(index: Index, number: int, stride: int) -> Header:
    """Header of a block that is in memory, with room for ``stride`` tokens; checksums are missing. Locked."""
    kind, parent = index.kind_of(number), index.parent[number]
    return Header(
        key=index.key[number],
        parent=index.key[parent] if parent >= 0 else index.root_key(parent),
        root=parent < 0,
        namespace=kind.namespace,
        fingerprint=kind.fingerprint,
        tenant=kind.tenant,
        owner=kind.owner,
        tokens=index.tokens[number],
        layout=kind.layout,
        stride=stride,
        sequence=index.sequence[number],
        created=index.created[number],
        expires=index.expires[number],
        writer=kind.writer,
    )
