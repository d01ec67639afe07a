"""What many blocks share."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.layout import Layout


@dataclass(frozen=True, slots=True)
class Kind:
    """Namespace, owner, layout and writer of blocks. Interned, so that a block holds a small int for it."""

    namespace: bytes
    fingerprint: bytes  # empty for blocks that were found on disk
    tenant: str
    owner: str
    layout: Layout
    writer: str
