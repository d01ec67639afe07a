"""A block that is known to be in the remote tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.block import Header, decode_header
from kvstore.errors import Corrupt
from kvstore.keys import Namespace
from kvstore.kinds import ROTATED
from kvstore.layout import Layout
from kvstore.remote.cutting import Group, cut, parts_of
from kvstore.tiers.seal import ENVELOPE_BYTES, MOST_PARTS, Envelope


@dataclass(slots=True, eq=False)
class RemoteBlock:
    """A full block, by its header, and how its payload is cut there. ``taken``: a fetch brings it."""

    header: Header
    part_bytes: int
    size: int  # bytes of the header as it came
    taken: bool = False

    @property
    def groups(self) -> Sequence[Group]:
        """Which layers come together."""
        layout = self.header.layout
        return cut(layout.layer_offsets(layout.block_tokens), self.part_bytes)

    def is_of(self, namespace: Namespace, layout: Layout, parent: bytes, tokens: bytes, position: int) -> bool:
        """Whether it is the block behind ``parent`` with these tokens, which begin at ``position`` of the chain."""
        header = self.header
        one = (header.namespace, header.fingerprint, header.tenant, header.layout, header.parent, header.tokens)
        stands = header.base == (position if header.form == ROTATED else 0)
        space = namespace.digest, namespace.fingerprint.digest, namespace.tenant
        return stands and one == (*space, layout, parent, tokens)


def opened(key: bytes, envelope: Envelope) -> RemoteBlock:
    """The block that an envelope under ``key`` stands for. Raises ``Corrupt`` when it is none, or another."""
    header = decode_header(envelope.header)
    layout = header.layout
    if header.key != key:
        raise Corrupt("the header is another block's")
    if header.stride != layout.block_tokens or header.token_count != header.stride:
        raise Corrupt("the header is that of a block that is not full")
    if layout.payload_bytes(header.stride) > MOST_PARTS * envelope.part_bytes:
        raise Corrupt("the block is larger than any that is stored")
    block = RemoteBlock(header, envelope.part_bytes, len(envelope.header))
    if parts_of(block.groups) != envelope.parts:
        raise Corrupt("the block was cut in another way than it says")
    return block


def copy_bytes(header: bytes, layout: Layout) -> int:
    """What a full block takes in a remote tier."""
    return ENVELOPE_BYTES + len(header) + layout.payload_bytes(layout.block_tokens)
