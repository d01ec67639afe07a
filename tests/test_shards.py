"""Blocks that several workers save, each its heads: they are found when all are there, and every byte is right."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from blocks import JUNK, NS, found, ids, load_all, marks, recount, rows, save

import kvstore
from kvstore import BadInput, LayerShape, Layout, Shard, joiner
from kvstore.local import LocalStore
from kvstore.store import Store

HEADS = 4
WHOLE = Layout((LayerShape(HEADS, 8, 4), LayerShape(HEADS, 4, 16), LayerShape(HEADS, 8, 0)), "float16", block_tokens=16)
HALVES = ((0, 2), (2, 2))


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store in memory, and one with a disk; its accounts must be right at the end."""
    with kvstore.open(tmp_path / "cache" if request.param == "disk" else None, host="8MiB", disk="64MiB") as opened:
        yield opened
        opened.flush()
        assert recount(opened) == []


def shard(first: int, heads: int, group: str = "engine", whole: Layout = WHOLE) -> Shard:
    shapes = tuple(LayerShape(heads, shape.key_dim, shape.value_dim) for shape in whole.layers)
    return Shard(Layout(shapes, whole.dtype, whole.block_tokens), first, group)


def bring(
    store: Store,
    tokens: Sequence[int],
    first: int,
    heads: int,
    group: str = "engine",
    begin: int = 0,
    writer: int = 0,
    whole: Layout = WHOLE,
) -> int:
    """Saves some heads of a chain, from a block on; how many tokens are visible then."""
    part, every, size = shard(first, heads, group, whole), marks(NS, tokens, writer), whole.block_tokens
    numbers = range(begin, -(-len(tokens) // size))
    made = dict(zip(numbers, store.drafts(part.layout, len(numbers)), strict=True))
    for number, draft in made.items():
        block = every[number * size : (number + 1) * size]
        for layer, shape in enumerate(whole.layers):
            for kind, view in enumerate(draft.layer(layer)):
                width = (shape.value_dim if kind else shape.key_dim) * whole.itemsize * size
                for head in range(heads):
                    data = rows(whole, layer, kind, first + head, block)
                    view[head * width : (head + 1) * width] = data + JUNK * (width - len(data))
    return store.save(NS, whole, tokens, made, shard=part).tokens


def give_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the store do what it does half a minute later."""
    with monkeypatch.context() as patch:
        patch.setattr(joiner, "PATIENCE", -1.0)
        assert store.save(NS, WHOLE, ids(99, 1), {}, shard=shard(0, 1)).tokens == 0


@pytest.mark.parametrize("parts", [HALVES, HALVES[::-1], ((3, 1), (0, 3)), ((2, 1), (0, 1), (3, 1), (1, 1)), ((0, 4),)])
def test_a_block_is_found_when_all_its_heads_have_come(store: Store, parts: Sequence[tuple[int, int]]) -> None:
    tokens = ids(1, 40)
    for first, heads in parts[:-1]:
        assert bring(store, tokens, first, heads) == 0 and found(store, tokens, layout=WHOLE).tokens == 0
    assert bring(store, tokens, *parts[-1]) == 40
    assert load_all(store, [*tokens, 0], layout=WHOLE) == 40
    assert store.stats()["drafts"] == 0


def test_a_chain_goes_on_behind_what_is_stored(store: Store) -> None:
    tokens = ids(1, 70)
    save(store, tokens[:32], layout=WHOLE)
    for first, heads in HALVES:
        bring(store, tokens[:40], first, heads, begin=2)
    for first, heads in HALVES:
        bring(store, tokens, first, heads, begin=2)
    assert load_all(store, [*tokens, 0], layout=WHOLE) == 70
    assert store.stats()["drafts"] == 0


def test_heads_of_two_engines_are_no_block(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids(1, 40)
    assert bring(store, tokens, 0, 2, "one") == bring(store, tokens, 2, 2, "other", writer=1) == 0
    assert found(store, tokens, layout=WHOLE).tokens == 0
    assert bring(store, tokens, 2, 2, "one") == 40
    assert load_all(store, [*tokens, 0], layout=WHOLE) == 40
    give_up(store, monkeypatch)


def test_heads_of_two_layouts_are_no_block(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of the larger one, in what was begun for the smaller, would be written over what lies behind it."""
    tokens, wide = ids(1, 40), Layout((LayerShape(HEADS, 64, 64),) * 9, "float16", WHOLE.block_tokens)
    assert bring(store, tokens, 0, 2) == bring(store, tokens, 2, 2, whole=wide) == 0
    assert bring(store, tokens, 2, 2) == 40
    assert load_all(store, [*tokens, 0], layout=WHOLE) == 40
    assert bring(store, ids(2, 40), 0, 2, whole=wide) == 0 and bring(store, ids(2, 40), 2, 2, whole=wide) == 40
    assert load_all(store, [*ids(2, 40), 0], layout=wide) == 40
    give_up(store, monkeypatch)


def test_workers_with_the_same_heads_count_once(store: Store) -> None:
    tokens = ids(1, 40)
    assert bring(store, tokens, 0, 2) == bring(store, tokens, 0, 2, writer=1) == bring(store, tokens, 1, 1) == 0
    assert bring(store, tokens, 2, 2) == 40
    assert load_all(store, [*tokens, 0], layout=WHOLE) == 40


def test_what_was_put_together_is_checked_in_memory(store: Store) -> None:
    tokens = ids(1, 40)
    for first, heads in HALVES:
        bring(store, tokens, first, heads)
    size = WHOLE.payload_bytes(WHOLE.block_tokens)

    def read() -> int:
        load = store.load(found(store, tokens, layout=WHOLE))
        try:
            return load.read_into(memoryview(bytearray(3 * size)), check=True)
        finally:
            load.release()

    assert read() == 3 * size
    residency = cast(LocalStore, store)._residency
    second = residency.host.view([one.address for one in residency.residents.values()][1])
    second[WHOLE.header_bytes + size // 2] ^= 1
    assert read() == size
    second[WHOLE.header_bytes + size // 2] ^= 1


def test_heads_that_do_not_come_are_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids(1, 40)
    bring(store, tokens, 0, 2)
    assert store.stats()["drafts"] == 3
    give_up(store, monkeypatch)
    assert store.stats()["drafts"] == 0 and store.stats()["counters"]["unjoined_blocks"] == 3
    assert bring(store, tokens, 2, 2) == 0  # too late: the others are gone
    assert bring(store, tokens, 0, 2) == 40
    assert load_all(store, [*tokens, 0], layout=WHOLE) == 40


def test_what_waits_for_heads_takes_an_eighth_of_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    most = (8 << 20) // joiner.SHARE // WHOLE.full_slot_bytes
    for number in range(2 * most):
        bring(store, ids(number, 16), 0, 2)
    assert most - 1 <= store.stats()["drafts"] <= most + 1
    assert bring(store, ids(2 * most - 1, 16), 2, 2) == 16  # the last are there still
    give_up(store, monkeypatch)


def test_workers_at_once_leave_nothing_out(store: Store) -> None:
    chains, wrong = [ids(number, 130) for number in range(6)], list[BaseException]()

    def work(head: int) -> None:
        draw = random.Random(head)
        try:
            for tokens in draw.sample(chains, len(chains)):
                stop = 0
                while stop < len(tokens):
                    begin, stop = stop // 16, min(len(tokens), stop + draw.randrange(1, 50))
                    bring(store, tokens[: stop if stop == len(tokens) else stop // 16 * 16], head, 1, begin=begin)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(head,), name=f"worker {head}") for head in range(HEADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [load_all(store, [*tokens, 0], layout=WHOLE) for tokens in chains] == [len(tokens) for tokens in chains]
    assert store.stats()["drafts"] == 0


@pytest.mark.parametrize(
    ("first", "heads", "changed"),
    [(3, 2, {}), (-1, 2, {}), (0, 5, {}), (0, 2, {"dtype": "float32"}), (0, 2, {"block_tokens": 8})],
    ids=["beyond", "before", "too many", "dtype", "block size"],
)
def test_a_shard_of_other_blocks_is_refused(store: Store, first: int, heads: int, changed: dict[str, object]) -> None:
    layout = shard(0, heads).layout
    settings = {"layers": layout.layers, "dtype": layout.dtype, "block_tokens": layout.block_tokens} | changed
    with pytest.raises(BadInput, match="shard"):
        store.save(NS, WHOLE, ids(1, 16), {}, shard=Shard(Layout(**settings), first, "engine"))  # type: ignore[arg-type]
    uneven = Layout((LayerShape(2, 8, 4), LayerShape(1, 4, 16), LayerShape(2, 8, 0)), "float16", block_tokens=16)
    with pytest.raises(BadInput, match="as many in each layer"):
        store.save(NS, WHOLE, ids(1, 16), {}, shard=Shard(uneven, 0, "engine"))
    with pytest.raises(BadInput, match="another layout"):
        store.save(NS, WHOLE, ids(1, 16), dict(enumerate(store.drafts(WHOLE, 1))), shard=shard(0, 2))
