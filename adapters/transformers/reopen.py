"""Going on with the same cache after a save: its blocks belong to the store now, so the tail is fetched from there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.adapters.transformers.buffers import LayerSpec
from kvstore.adapters.transformers.row import Row
from kvstore.errors import StoreClosed
from kvstore.keys import Namespace
from kvstore.layout import Layout
from kvstore.store import Store
from kvstore.tensors.plain import at

CPU = torch.device("cpu")


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
            place = load.places(layer)[block - match.skipped // layout.block_tokens]
            if place.rotated:
                row.end("another engine has stored what it goes on from, with keys that are rotated")
                return False
            keys = at(place.keys, (spec.heads, place.stride, spec.key_dim), dtype, CPU)
            values = at(place.values, (spec.heads, place.stride, spec.value_dim), dtype, CPU)
            row.seed(layer, keys[:, :tokens], values[:, :tokens])
        if not load.intact():
            row.end("the tail of what was saved was let go while it was loaded")
    finally:
        load.release()
    return row.ended is None
