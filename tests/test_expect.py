"""Memory that is made ready for an engine before its first load, and never at the cost of what is there or comes."""

import kvstore
from kvstore import Layout

SMALL = Layout.uniform(layers=2, heads=2, dim=16, dtype="float32", block_tokens=16)
OTHER = Layout.uniform(layers=3, heads=2, dim=32, dtype="float32", block_tokens=16)


def used(store: kvstore.Store) -> int:
    bytes_used: int = store.stats()["tiers"]["host"]["used"]
    return bytes_used


def test_memory_is_there_before_the_first_draft() -> None:
    with kvstore.open(host="32MiB") as store:
        assert used(store) == 0
        store.expect(SMALL)
        ready = used(store)
        assert 0 < ready <= 32 << 20
        store.expect(SMALL)
        assert used(store) == ready
        drafts = store.drafts(SMALL, 3)
        assert len(drafts) == 3 and used(store) == ready


def test_what_was_expected_makes_room_for_what_comes() -> None:
    with kvstore.open(host="4MiB") as plain:
        most = len(plain.drafts(OTHER, 10_000))
    with kvstore.open(host="4MiB") as store:
        store.expect(SMALL)
        assert len(store.drafts(OTHER, 10_000)) == most


def test_a_full_store_expects_nothing() -> None:
    with kvstore.open(host="4MiB") as store:
        drafts = store.drafts(OTHER, 10_000)
        full = used(store)
        store.expect(SMALL)
        assert used(store) <= 4 << 20 and used(store) >= full
        assert len(drafts) > 0
