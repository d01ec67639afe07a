"""What every tier must do. A test class for each implementation inherits ``TierContract`` and gives it a ``tier``."""

from __future__ import annotations

import random
import threading

import pytest
from slots import LAYOUT, OTHER, Book, drop, fetch, fill, put, save

from kvstore.block import decode_header
from kvstore.errors import TierError
from kvstore.tiers.base import Tier

FULL = LAYOUT.full_slot_bytes


@pytest.fixture
def book(seed: int) -> Book:
    return Book(random.Random(seed))


class TierContract:
    """Needs a fixture ``tier``: open, empty, with a budget of 16 MiB."""

    def test_what_is_written_comes_back(self, tier: Tier, book: Book) -> None:
        blocks = [book.make(), book.make(tokens=3), book.make(layout=OTHER), book.make(tokens=1, layout=OTHER)]
        save(tier, *blocks)
        for block in blocks:
            layout, stride = block.header.layout, block.header.stride
            assert book.check(fetch(tier, block.address, layout, stride)) == block.sequence
            assert tier.tokens(block.sequence) == block.header.tokens
        assert list(tier.verify()) == []

    def test_any_page_range_of_a_slot_can_be_read(self, tier: Tier, book: Book) -> None:
        block = book.make(layout=OTHER)
        save(tier, block)
        for start in range(0, OTHER.full_slot_bytes, 4096):
            for end in range(start + 4096, OTHER.full_slot_bytes + 1, 4096):
                buffer = fetch(tier, block.address, OTHER)[: end - start]
                tier.read(block.address, start, buffer)
                assert buffer == block.slot[start:end]

    def test_reads_outside_of_a_slot_fail(self, tier: Tier, book: Book) -> None:
        block = book.make()
        save(tier, block)
        buffer = fetch(tier, block.address)
        for address, offset in ((block.address, FULL), (block.address, -4096), (1 << 40, 0)):
            with pytest.raises(TierError):
                tier.read(address, offset, buffer)

    def test_the_budget_is_kept_and_room_comes_back(self, tier: Tier, book: Book) -> None:
        blocks = fill(tier, book)
        assert len(blocks) * FULL > 0.75 * tier.capacity
        assert tier.reserve(FULL) is None
        drop(tier, blocks[7])
        assert tier.same_class(blocks[8].address, FULL)
        assert put(tier, blocks[7])
        assert tier.reserve(FULL) is None

    def test_neighbours_make_room_for_another_class(self, tier: Tier, book: Book) -> None:
        blocks = {block.address: block for block in fill(tier, book)}
        big = OTHER.full_slot_bytes
        assert tier.reserve(big) is None
        drop(tier, *[blocks[address] for address in tier.neighbours(next(iter(blocks)))])
        assert tier.reserve(big) is not None
        assert tier.used <= tier.capacity

    def test_the_index_tells_what_it_was_given(self, tier: Tier, book: Book) -> None:
        root = book.make(owner="ann")
        child, tail = book.make(root, form="rotated"), book.make(root, tokens=5, owner="bob")
        save(tier, tail, child, root)
        entries = list(tier.load())
        assert [entry.sequence for entry in entries] == [1, 2, 3]
        for entry, block in zip(entries, (root, child, tail), strict=True):
            header = block.header
            assert entry.address == block.address
            assert (entry.key, entry.parent, entry.namespace) == (header.key, header.parent, header.namespace)
            assert (entry.tenant, entry.owner, entry.layout) == (header.tenant, header.owner, header.layout)
            assert (entry.tokens, entry.stride) == (header.token_count, header.stride)
            assert (entry.created, entry.expires, entry.root) == (header.created, header.expires, header.root)
            assert entry.form == header.form

    def test_what_is_forgotten_is_not_known(self, tier: Tier, book: Book) -> None:
        blocks = [book.make() for _ in range(3)]
        save(tier, *blocks)
        tier.forget([2, 77])
        tier.commit(())
        assert [entry.sequence for entry in tier.load()] == [1, 3]
        assert tier.tokens(2) is None
        assert tier.tokens(77) is None

    def test_erased_slots_are_zero(self, tier: Tier, book: Book) -> None:
        blocks = [book.make() for _ in range(3)]
        save(tier, *blocks)
        tier.forget([2])
        tier.erase([blocks[1].address])
        assert not any(fetch(tier, blocks[1].address))
        tier.free(blocks[1].address)
        for block in (blocks[0], blocks[2]):
            assert book.check(fetch(tier, block.address)) == block.sequence
        assert tier.tokens(2) is None

    def test_memos(self, tier: Tier) -> None:
        assert tier.recall("a") is None
        tier.remember("a", "é" * 1000)
        tier.remember("x" * 5000, "")
        assert tier.recall("a") == "é" * 1000
        tier.commit(())
        tier.remember("a", "two")
        assert (tier.recall("a"), tier.recall("x" * 5000)) == ("two", "")

    def test_verify_finds_a_wrong_byte_and_a_wrong_block(self, tier: Tier, book: Book) -> None:
        blocks = [book.make() for _ in range(4)]
        save(tier, *blocks)
        flipped = fetch(tier, blocks[1].address)
        flipped[LAYOUT.header_bytes + 17] ^= 1
        tier.write(blocks[1].address, flipped)
        tier.write(blocks[3].address, blocks[2].slot)
        found = {problem.address: problem for problem in tier.verify()}
        assert found.keys() == {blocks[1].address, blocks[3].address}
        assert found[blocks[1].address].key == blocks[1].header.key.hex()

    def test_many_threads(self, tier: Tier, book: Book) -> None:
        guard, faults = threading.Lock(), []  # the guard is the store's lock

        def work(number: int) -> None:
            mine = []
            for turn in range(12):
                with guard:
                    block = book.make(layout=(LAYOUT, OTHER)[number % 2])
                    address = tier.reserve(block.header.layout.full_slot_bytes)
                assert address is not None
                block.address = address
                tier.write(address, block.slot)
                tier.commit([(address, block.header)])
                mine.append(block)
                if turn % 3 == 2:
                    with guard:
                        drop(tier, mine.pop(0))
            for block in mine:
                if book.check(fetch(tier, block.address, block.header.layout)) != block.sequence:
                    faults.append(block.sequence)
                if tier.tokens(block.sequence) != block.header.tokens:
                    faults.append(block.sequence)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        assert list(tier.verify()) == []

    def test_the_book_notices_a_wrong_byte(self, tier: Tier, book: Book) -> None:
        block = book.make()
        save(tier, block)
        data = fetch(tier, block.address)
        assert book.check(data) == block.sequence
        data[LAYOUT.header_bytes + 9] ^= 128
        assert decode_header(data) == block.header
        assert book.check(data) is None
        data[LAYOUT.header_bytes + 9] ^= 128
        block.slot[LAYOUT.header_bytes + 9] ^= 1
        with pytest.raises(AssertionError):
            book.check(data)
