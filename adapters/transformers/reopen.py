"""Going on with the same cache after a save: its blocks belong to the store now, so the tail is fetched from there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.adapters.transformers.buffers import LayerSpec, view
from kvstore.adapters.transformers.row import Row
from kvstore.errors import StoreClosed
from kvstore.keys import Namespace
from kvstore.layout import Layout
from kvstore.store import Store


def reopen(
    row: Row,
    store: Store,
    namespace: Namespace,
    layout: Layout,
    specs: Sequence[LayerSpec],
    dtype: torch.dtype,
    patience: float,
) -> bool:
    """Make ``row`` record again behind its saved tokens; False when they are not in the store any more."""
    row.base = len(row.ids)
    block, tokens = row.tail()
    try:
        first = row.base - tokens
        match = store.match(namespace, layout, row.ids, root=row.seat.root, first=first, whole=True)
        if match.tokens < row.base:
            match.release()
            return False
        load = store.load(match)
    except StoreClosed:
        return False
    try:
        if match.skipped + load.tokens < row.base:
            return False
        row.ended = None
        for layer, spec in enumerate(specs) if tokens else ():
            if not load.wait(layer, patience):
                row.end("the tail of what was saved could not be loaded again")
                return False
            piece = load.pieces(layer)[block - match.skipped // layout.block_tokens]
            keys = view(piece.keys, dtype, (spec.heads, piece.stride, spec.key_dim))
            values = view(piece.values, dtype, (spec.heads, piece.stride, spec.value_dim))
            row.seed(layer, keys[:, :tokens], values[:, :tokens])
    finally:
        load.release()
    return row.ended is None
