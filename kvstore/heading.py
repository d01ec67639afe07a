"""The header of a block as the index knows it, for whoever writes the block somewhere."""

from __future__ import annotations

from kvstore.block import Header
from kvstore.index import Index


def base_of(index: Index, number: int) -> int:
    """The position that a block's first key is turned for; 0 where keys are before rotation. Locked."""
    kind = index.kind_of(number)
    return (len(index.chain(number)) - 1) * kind.layout.block_tokens if kind.origin.rotated else 0


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
        form=kind.origin.form,
        base=base_of(index, number),
        writer=kind.origin.writer,
    )
