"""Chains whose every byte tells what it is: any wrong byte, of whatever origin, is recognised.

A token's bytes in one (layer, K or V, head) are drawn from all tokens before it, as real keys and values are: equal
prefixes have equal bytes, and a byte of another chain, token, layer, head or namespace differs.
"""

from __future__ import annotations

import gc
import random
from array import array
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_digest, xxh3_64_intdigest

from kvstore import Fingerprint, LayerShape, Layout, Namespace
from kvstore.load import Load
from kvstore.local import LocalStore
from kvstore.match import Match
from kvstore.save import Draft, Saved
from kvstore.store import Store

JUNK = b"\xee"  # what a draft holds behind its last token: it must never come back

# Slots of 12 KiB that hold 16 tokens; keys and values differ in width, so that a mix-up shows.
SMALL = Layout((LayerShape(2, 8, 4), LayerShape(1, 4, 8)), "float16", block_tokens=16)
# Three size classes below a full slot, several parts per load.
WIDE = Layout((LayerShape(2, 64, 64),) * 6, "float32", block_tokens=32)
# Pages of 512 bytes: slots are no multiple of 4096, so direct transfers need their fallback.
ODD = Layout((LayerShape(1, 3, 5), LayerShape(2, 7, 1), LayerShape(1, 1, 1)), "uint8", block_tokens=10, alignment=512)


def namespace(tenant: str = "", **components: str) -> Namespace:
    """A namespace of a model that differs from others in the given components."""
    return Namespace(Fingerprint({"checkpoint": "tiny", "dtype": "float16"} | components), tenant)


NS = namespace()


def ids(seed: int, count: int) -> list[int]:
    """Token ids that nothing else starts with."""
    draw = random.Random(seed)
    return [draw.randrange(2**32) for _ in range(count)]


def marks(space: Namespace, tokens: Sequence[int], writer: int = 0) -> list[bytes]:
    """One digest per token, over it and all before it. ``writer`` makes another save's bytes differ."""
    mark = xxh3_64_intdigest(space.digest, writer)
    found = []
    for token in array("I", tokens):
        mark = xxh3_64_intdigest(token.to_bytes(4, "little"), mark)
        found.append(mark.to_bytes(8, "little"))
    return found


def rows(layout: Layout, layer: int, kind: int, head: int, tokens: Sequence[bytes]) -> bytes:
    """What one (layer, K or V, head) holds for tokens with these marks."""
    shape = layout.layers[layer]
    width = (shape.value_dim if kind else shape.key_dim) * layout.itemsize
    seed, times = layer << 20 | kind << 16 | head, width // 8 + 1
    return b"".join([(xxh3_64_digest(mark, seed) * times)[:width] for mark in tokens])


def fill(draft: Draft, tokens: Sequence[bytes]) -> None:
    """Writes a block of tokens with these marks, and junk behind them."""
    layout = draft.layout
    for layer, shape in enumerate(layout.layers):
        for kind, view in enumerate(draft.layer(layer)):
            size = len(view) // shape.heads
            for head in range(shape.heads):
                data = rows(layout, layer, kind, head, tokens)
                view[head * size : (head + 1) * size] = data + JUNK * (size - len(data))


def drafts(store: Store, space: Namespace, layout: Layout, tokens: Sequence[int], writer: int = 0) -> dict[int, Draft]:
    """Filled drafts for the blocks that a match does not find whole; fewer when memory is short."""
    match = store.match(space, layout, [*tokens, 0])
    stored = match.tokens // layout.block_tokens
    match.release()
    made: dict[int, Draft] = {}
    every = marks(space, tokens, writer)
    for block in range(stored, -(-len(tokens) // layout.block_tokens)):
        draft = store.draft(layout)
        if draft is None:
            break
        fill(draft, every[block * layout.block_tokens : (block + 1) * layout.block_tokens])
        made[block] = draft
    return made


def save(
    store: Store,
    tokens: Sequence[int],
    space: Namespace = NS,
    layout: Layout = SMALL,
    *,
    owner: str = "",
    ttl: float | None = None,
    writer: int = 0,
) -> Saved:
    """Saves a chain as an adapter does: only what is not stored."""
    made = drafts(store, space, layout, tokens, writer)
    return store.save(space, layout, tokens, made, owner=owner, ttl=ttl)


def wrong(load: Load, tokens: Sequence[int], space: Namespace = NS, writers: Iterable[int] = (0,)) -> list[str]:
    """Where the bytes of a load are not what some writer saved; waits for layers, and passes over those that fail."""
    layout, found = load.layout, []
    every = [marks(space, tokens, writer) for writer in writers]
    for layer, shape in enumerate(layout.layers):
        load.wait(layer)
        good, start = load.good_tokens(layer), 0
        for piece in load.pieces(layer):
            if start + piece.tokens > good:
                break
            for kind, view in enumerate((piece.keys, piece.values)):
                size = len(view) // shape.heads
                for head in range(shape.heads):
                    expected = [rows(layout, layer, kind, head, m[start : start + piece.tokens]) for m in every]
                    held = bytes(view[head * size : head * size + len(expected[0])])
                    if held not in expected:
                        found.append(f"layer {layer} kind {kind} head {head} tokens {start}+{piece.tokens}")
            start += piece.tokens
    return found


def load_all(store: Store, tokens: Sequence[int], space: Namespace = NS, layout: Layout = SMALL) -> int:
    """Matches and loads as much of ``tokens`` as there is, checks every byte, returns the tokens that came well."""
    match = store.match(space, layout, tokens)
    load = store.load(match)
    try:
        faults = wrong(load, tokens, space)
        assert not faults, f"wrong bytes in {faults}"
        return min((load.good_tokens(layer) for layer in range(len(layout.layers))), default=0)
    finally:
        load.release()


def found(store: Store, tokens: Sequence[int], space: Namespace = NS, layout: Layout = SMALL) -> Match:
    """A match that wants every token: one more stands behind them."""
    return store.match(space, layout, [*tokens, 0])


def recount(store: LocalStore) -> list[str]:
    """Where the store's accounts differ from what is there; call when nothing runs and nothing is held."""
    gc.collect()
    said = store.stats()
    residency = store._residency
    faults = []

    def compare(what: str, one: object, other: object) -> None:
        if one != other:
            faults.append(f"{what}: {one} but {other}")

    with residency.lock:
        index = residency.index
        compare("leases", said["leases"], 0)
        compare("drafts", said["drafts"], 0)
        compare("doomed", len(residency.doomed), 0)
        compare("host bytes", said["tiers"]["host"]["bytes"], sum(map(residency.payload, residency.residents)))
        compare("host policy", set(residency.host_policy.victims()), set(residency.residents))
        compare("token bytes", set(index.tokens), set(residency.residents))
        slab = residency.host._slab
        live = {n << 24 | slot for n, extent in slab.extents.items() for slot in extent.live}
        compare("host slots", live, {r.address for r in residency.residents.values()})
        compare("host used", residency.host.used, sum(extent.bytes for extent in slab.extents.values()))
        if residency.host.used > residency.host.capacity:
            faults.append("host is over its budget")
        stored = [n for n in index.number.values() if index.disk[n] != -1]
        compare("disk policy", set(residency.disk_policy.victims()), set(stored))
        if residency.disk is not None:
            compare("disk blocks", said["tiers"]["disk"]["blocks"], len(stored))
            compare("disk bytes", said["tiers"]["disk"]["bytes"], sum(map(residency.payload, stored)))
            compare("disk addresses", len({index.disk[n] for n in stored}), len(stored))
            if residency.disk.used > residency.disk.capacity:
                faults.append("disk is over its budget")
        faults += _tree_faults(store)
    return faults


def _tree_faults(store: LocalStore) -> list[str]:
    """Families, degrees and keys of the index, counted anew."""
    index = store._residency.index
    numbers = list(index.number.values())
    faults = []
    children: dict[int, list[int]] = {}
    for number in numbers:
        children.setdefault(index.parent[number], []).append(number)
        if index.number[index.key[number]] != number:
            faults.append(f"key of {number}")
        if index.idle(number):
            faults.append(f"{number} is idle and was not swept")
    for parent in {*children, *numbers}:
        all_of = children.get(parent, [])
        present = sorted((n for n in all_of if index.present(n)), key=index.tokens_of)
        family = index.families.children(parent)
        if [index.tokens_of(n) for n in family] != [index.tokens_of(n) for n in present] or set(family) != set(present):
            faults.append(f"family of {parent}: {family} but {present}")
        if parent >= 0 and index._degree[parent] != len(all_of):
            faults.append(f"degree of {parent}: {index._degree[parent]} but {len(all_of)}")
    return faults
