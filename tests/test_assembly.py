"""Compositions against a store of bytes: what is found of them, what is left, and that nothing passes for another."""

from __future__ import annotations

import itertools
import random

import pytest
from blocks import NS, SMALL, ids
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore
from kvstore.assembly import Assembly, assemble
from kvstore.composition import Chain, Composition, Part, Placement, Text
from kvstore.errors import BadInput
from kvstore.keys import token_bytes
from kvstore.local import LocalStore
from kvstore.walk import Walk, chains_of


def keep(store: LocalStore, chain: Chain) -> None:
    """Saves a chain whole; its bytes do not matter here."""
    drafts = store.drafts(SMALL, -(-len(chain) // SMALL.block_tokens))
    root = chain.context.root(NS)
    store.save(NS, SMALL, chain.token_ids, dict(enumerate(drafts)), root=root)


def found(store: LocalStore, composition: Composition, apart: bool = True) -> Assembly:
    assembly = assemble(store, NS, SMALL, composition, apart)
    assembly.release()
    return assembly


def drawn(source: random.Random, modules: list[Chain]) -> Composition:
    """Texts of few different tokens and parts of modules, with gaps or without."""
    parts: list[Part] = []
    position = source.choice((0, 0, 0, 3))
    for _ in range(source.randrange(1, 6)):
        if source.random() < 0.5:
            text = [source.randrange(3) for _ in range(source.randrange(1, 20))]
            parts.append(Text(token_bytes(text), position))
        else:
            chain = source.choice(modules)
            start = source.choice((0, 0, source.randrange(len(chain))))
            parts.append(Placement(chain, start, source.randrange(start, len(chain)) + 1, position))
        position += len(parts[-1]) + source.choice((0, 0, 2))
    return Composition(tuple(parts))


def parted(assembly: Assembly) -> None:
    """The runs are the prompt: each column in one of them, with the token that stands there."""
    tokens = assembly.composition.token_ids
    positions = assembly.composition.position_ids
    column = 0
    for run in assembly.runs:
        assert run.column == column and run.position == positions[column]
        ids_of = memoryview(run.chain.token_ids).cast("I").tolist()[run.first :]
        assert ids_of == tokens[run.column : run.stop]
        assert not run.modular or run.cached == run.stop - run.column
        column = run.stop
    assert column == len(tokens)
    assert assembly.missing()[-1] == len(tokens) - 1


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_what_was_computed_is_found_again_behind_the_same_composition(draw: int) -> None:
    source = random.Random(draw)
    modules = [Chain.of([source.randrange(3) for _ in range(source.randrange(2, 40))]) for _ in range(3)]
    with kvstore.open(host="4MiB") as store:
        for chain in modules[:2]:  # the third is not stored: its parts are computed where they stand
            keep(store, chain)
        for _ in range(3):
            composition = drawn(source, modules)
            apart = source.random() < 0.8
            assembly = found(store, composition, apart)
            parted(assembly)
            assert apart or assembly.exact
            for run in assembly.runs:
                if not run.modular:
                    keep(store, run.chain)
            again = found(store, composition, apart)
            parted(again)
            assert again.missing() == [len(composition) - 1]
            assert again.exact or not assembly.exact


def test_chains_behind_different_contexts_never_share_a_key() -> None:
    """Order, distance, range, tokens, mark and depth all count."""
    one, other = Chain.of(ids(1, 9)), Chain.of(ids(2, 9))
    firsts: list[tuple[Part, ...]] = [
        (),
        (Text(one.token_ids, 0),),
        (Placement(one, 0, 9, 1),),
        (Placement(one, 1, 9, 1),),
        (Placement(one, 1, 8, 1),),
        (Placement(Chain.of(ids(2, 9), [Placement(one, 0, 9, -9)]), 0, 9, 1),),
        (Placement(other, 0, 9, 1),),
        (Placement(one, 0, 9, 1), Placement(other, 0, 9, 10)),
        (Placement(other, 0, 9, 1), Placement(one, 0, 9, 10)),
        (Placement(one, 0, 9, 1), Placement(other, 0, 9, 11)),
    ]
    roots = []
    for first, gap, mark in itertools.product(firsts, (1, 2), ("", "blend 0.1", "blend 0.2")):
        walk = Walk(mark)
        for part in first:
            if isinstance(part, Text):
                walk.start(part.position).token_ids += part.token_ids
            else:
                walk.place(part)
        end = first[-1].position + len(first[-1]) if first else 0
        here = walk.start(end + gap)
        assert here.token_ids == b""
        roots.append(here.context.root(NS))
    modular = len(firsts) - 2  # a mark tells how modules were put together; it does not touch what has none
    assert len(set(roots)) == 2 * (3 * modular + 2)


def test_many_contexts_within_contexts_cost_no_more_than_their_number() -> None:
    """Every second text stands behind a gap, so each chain's context holds all those before it."""
    parts = tuple(Text(token_bytes([number]), 2 * number) for number in range(600))
    last = chains_of(Composition(parts))[-1].chain
    same = chains_of(Composition(parts))[-1].chain
    assert len(last.context.parts) == 599
    assert last.context == same.context and last.context.root(NS) == same.context.root(NS)
    assert last.context != chains_of(Composition(parts[:-1]))[-1].chain.context


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ((Text(b"", 0),), "part 0 of the prompt has no tokens"),
        ((Text(token_bytes([1, 2]), 0), Text(token_bytes([3]), 1)), "part 1 of the prompt is at position 1, before 2"),
        ((Text(token_bytes([1]), -1),), "position -1"),
    ],
)
def test_prompts_that_cannot_be_are_refused(parts: tuple[Part, ...], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Composition(parts)
    with pytest.raises(BadInput, match="no part of a chain"):
        Placement(Chain.of([1, 2]), 1, 3, 0)
