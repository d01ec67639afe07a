"""A chain of which some blocks hold keys before rotation, and others keys that are turned; and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from blocks import NS, SMALL, drafts, found, ids, marks, recount, rows
from gates import MIB, PATIENCE
from hosted import hosted

import kvstore
from kvstore.load import Load
from kvstore.local import LocalStore
from kvstore.save import Saved
from kvstore.store import Store

TOKENS = ids(1, 70)  # four blocks of SMALL, and six tokens
WRITERS = {"pre": "alpha/1", "rotated": "beta/2"}  # a form's engine, and the number of its bytes
NUMBERS = {"pre": 0, "rotated": 1}
MIXED = ["pre", "pre", "rotated", "rotated", "pre"]  # of TOKENS, as ``mix`` saves them


def stored(store: Store, tokens: list[int], form: str) -> Saved:
    """Saves what is not stored of a chain, as the engine does that has keys in this form."""
    made = drafts(store, NS, SMALL, tokens, NUMBERS[form])
    return store.save(NS, SMALL, tokens, made, writer=WRITERS[form], form=form)


def mix(store: Store) -> None:
    """Two engines, in turns, save ``TOKENS``."""
    assert stored(store, TOKENS[:32], "pre").tokens == 32
    assert stored(store, TOKENS[:64], "rotated").tokens == 64
    assert stored(store, TOKENS, "pre").tokens == 70


def told(store: Store, tokens: list[int]) -> list[str]:
    """The form of each block that is found, the same by match, pieces and places, whose every byte is its engine's."""
    match = found(store, tokens)
    load = store.load(match)
    try:
        assert load.tokens == len(tokens)
        assert all(load.wait(layer, PATIENCE) for layer in range(len(SMALL.layers)))
        forms = [origin.form for origin in match.origins]
        assert set(match.forms) == set(forms)
        for layer in range(len(SMALL.layers)):
            places = load.places(layer)
            assert [place.rotated for place in places] == [piece.rotated for piece in load.pieces(layer)]
            assert [place.rotated for place in places] == [form == "rotated" for form in forms]
            assert [place.position for place in places] == list(range(0, len(tokens), 16))
        assert wrong_bytes(load, tokens, forms) == []
        return forms
    finally:
        load.release()


def wrong_bytes(load: Load, tokens: list[int], forms: list[str]) -> list[str]:
    """Where a block's bytes are not those that the engine of its form saved."""
    faults = []
    for layer, shape in enumerate(SMALL.layers):
        for block, (piece, form) in enumerate(zip(load.pieces(layer), forms, strict=True)):
            made = marks(NS, tokens, NUMBERS[form])[block * 16 : block * 16 + piece.tokens]
            for kind, view in enumerate((piece.keys, piece.values)):
                size = len(view) // shape.heads
                for head in range(shape.heads):
                    expected = rows(SMALL, layer, kind, head, made)
                    if bytes(view[head * size : head * size + len(expected)]) != expected:
                        faults.append(f"block {block} layer {layer} kind {kind}")
    return faults


@contextmanager
def daemon(path: Path) -> Iterator[Store]:
    """A client of a daemon with a disk, whose accounts must be right at the end."""
    with hosted(path, host=8 * MIB, disk=64 * MIB) as there, there.connect() as client:
        yield client
        client.flush()
        assert recount(cast(LocalStore, client)) == []


def opened(path: Path) -> LocalStore:
    """A store in this process."""
    return kvstore.open(path, host="8MiB", disk="64MiB")
