"""Runs of tokens that are stored anywhere are found by content and compared token by token, none shorter than asked."""

import random
from array import array
from collections.abc import Iterator

import pytest
from blocks import NS, SMALL, ids, namespace, save, wrong
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore
from kvstore.composition import Composition, Placement
from kvstore.discovery import WINDOW, winnow
from kvstore.errors import BadInput
from kvstore.local import LocalStore

MINIMUM = 24


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="16MiB") as store:
        yield store


def placed(found: Composition) -> list[tuple[int, int]]:
    """Position and length of what was found."""
    return [(part.position, len(part)) for part in found.parts if isinstance(part, Placement)]


def discover(store: LocalStore, tokens: list[int], minimum: int = MINIMUM) -> Composition:
    found = store.discover(NS, SMALL, tokens, minimum)
    assert found.token_ids == tokens  # nothing is lost, whatever is found
    return found


def test_a_run_in_the_middle_of_another_chain_is_found_where_it_begins_and_ends(store: LocalStore, seed: int) -> None:
    stored = ids(seed, 150)
    save(store, stored)
    before, after = ids(seed + 1, 40), ids(seed + 2, 30)
    found = discover(store, [*before, *stored[37:101], *after])
    assert placed(found) == [(40, 64)]
    part = found.parts[1]
    assert isinstance(part, Placement) and (part.start, part.stop) == (37, 101)
    # The chain that it names is the one that is stored: its bytes come back.
    match = store.match(NS, SMALL, part.chain.token_ids, first=part.start, whole=True)
    assert match.tokens == 101 and match.skipped == 32
    load = store.load(match)
    load.release()


def test_what_is_saved_later_is_found_too_and_what_is_evicted_is_not(store: LocalStore, seed: int) -> None:
    first, second = ids(seed, 80), ids(seed + 1, 80)
    save(store, first)
    assert placed(discover(store, [1, 2, 3, *first])) == [(3, 80)]
    assert placed(discover(store, [1, 2, 3, *second])) == []
    save(store, second)
    assert placed(discover(store, [1, 2, 3, *second, 4, 5, *first])) == [(3, 80), (85, 80)]
    store.forget(older_than=0)
    assert placed(discover(store, [1, 2, 3, *second, 4, 5, *first])) == []


def test_a_run_goes_on_through_the_children_that_agree(store: LocalStore, seed: int) -> None:
    stem, one, other = ids(seed, 48), ids(seed + 1, 40), ids(seed + 2, 40)
    save(store, [*stem, *one])
    save(store, [*stem, *other])
    tail = [*stem[10:], *other[:33]]
    found = discover(store, [9, *tail, 9, 9])
    assert placed(found) == [(1, len(tail))]


def test_what_the_prompt_begins_with_is_left_to_its_own_chain(store: LocalStore, seed: int) -> None:
    stored = ids(seed, 100)
    save(store, stored)
    assert placed(discover(store, [*stored, *ids(seed + 1, 20)])) == []
    assert placed(discover(store, [*stored, 7, 8, *stored[20:80], 9])) == [(102, 60)]


def test_shorter_runs_are_not_taken_and_too_short_a_minimum_is_refused(store: LocalStore, seed: int) -> None:
    stored = ids(seed, 100)
    save(store, stored)
    run = [1, 2, *stored[30 : 30 + MINIMUM], 3, 4]
    assert placed(discover(store, run)) == [(2, MINIMUM)]
    assert placed(discover(store, [1, 2, *stored[30 : 30 + MINIMUM - 1], 3, 4])) == []
    with pytest.raises(BadInput, match=f"at least {WINDOW}"):
        store.discover(NS, SMALL, run, WINDOW - 1)


def test_nothing_is_found_across_namespaces(store: LocalStore, seed: int) -> None:
    stored = ids(seed, 100)
    save(store, stored)
    save(store, stored, namespace("another tenant"))
    found = store.discover(namespace(checkpoint="another"), SMALL, [1, *stored], MINIMUM)
    assert placed(found) == []


def test_a_chain_behind_a_composition_is_found_by_its_root(store: LocalStore, seed: int) -> None:
    """Whoever finds it knows no more of its context than the key that it starts from."""
    stored, root = ids(seed, 70), b"r" * 32
    draft = store.drafts(SMALL, 5)
    store.save(NS, SMALL, stored, dict(enumerate(draft)), root=root)
    assert store.match(NS, SMALL, stored, whole=True).tokens == 0
    part = discover(store, [5, 6, *stored, 7]).parts[1]
    assert isinstance(part, Placement) and part.chain.context.root(NS) == root
    assert store.match(NS, SMALL, part.chain.token_ids, root=root, whole=True).tokens == 70


def test_equal_fingerprints_of_other_tokens_are_told_apart(
    store: LocalStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control: with fingerprints that are all alike, only the comparison of tokens is left."""
    monkeypatch.setattr(
        "kvstore.discovery.winnow", lambda tokens, _: [(last, 7) for last in range(WINDOW - 1, len(tokens))]
    )
    stored = ids(seed, 64)
    save(store, stored)
    assert placed(discover(store, ids(seed + 1, 90))) == []
    assert placed(discover(store, [1, *stored])) == [(1, 64)]


def test_after_a_restart_what_is_on_disk_is_found(tmp_path: object, seed: int) -> None:
    stored = ids(seed, 90)
    with kvstore.open(str(tmp_path), host="16MiB", disk="64MiB") as store:
        save(store, stored).wait()
    with kvstore.open(str(tmp_path), host="16MiB", disk="64MiB") as store:
        part = discover(store, [3, *stored[5:70], 4]).parts[1]
        assert isinstance(part, Placement) and (part.start, part.stop) == (5, 70)
        load = store.load(store.match(NS, SMALL, part.chain.token_ids, whole=True))
        assert wrong(load, stored[:70]) == []
        load.release()


def test_what_nobody_asks_for_takes_no_more_and_more_memory(
    store: LocalStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has not asked for long looks through everything again; who has not asked for longest is forgotten."""
    monkeypatch.setattr("kvstore.discovery.LATE", 8)
    monkeypatch.setattr("kvstore.discovery.MOST", 2)
    chains = [ids(seed + number, 64) for number in range(8)]
    for number, chain in enumerate(chains):
        save(store, chain)
        assert placed(discover(store, [9, *chain], MINIMUM + number % 3)) == [(1, 64)]
    listeners = store._saver.listeners
    assert len(listeners) == 2 and all(len(listener) <= 8 for listener in listeners)
    assert [placed(discover(store, [9, *chain], MINIMUM)) for chain in chains] == [[(1, 64)]] * 8


@given(st.integers(0, 2**32), st.integers(WINDOW, 60))
@settings(max_examples=60, deadline=None)
def test_texts_that_share_a_run_share_a_kept_window(draw: int, minimum: int) -> None:
    """What winnowing promises: of any run of ``minimum`` tokens, in whatever it stands, a window is kept."""
    source = random.Random(draw)
    alphabet = source.choice((2, 10, 1000))
    run = [source.randrange(alphabet) for _ in range(minimum)]
    kept = []
    for _ in range(2):
        before, after = ([source.randrange(alphabet) for _ in range(source.randrange(80))] for _ in "ba")
        text = array("I", [*before, *run, *after])
        inside = range(len(before) + WINDOW - 1, len(before) + minimum)
        kept.append({value for last, value in winnow(text, minimum) if last in inside})
        for last, value in winnow(text, minimum):
            assert value == winnow(text[last - WINDOW + 1 : last + 1], WINDOW)[0][1]  # of its own tokens alone
    assert kept[0] & kept[1]
