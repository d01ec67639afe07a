"""The contract of tiers, run against each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slots import LAYOUT, Book, fetch, save
from tier_contract import TierContract, book  # noqa: F401

from kvstore.files import OsFiles
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.naive import NaiveTier

MIB = 1 << 20


class TestNaiveTier(TierContract):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = NaiveTier(16 * MIB)
        yield tier
        tier.close()


class DiskContract(TierContract):
    """What tiers on a disk do beside."""

    files = OsFiles()

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = DiskTier(self.files, tmp_path / "cache", 16 * MIB)
        assert list(tier.load()) == []
        yield tier
        tier.close()

    def test_all_is_there_after_reopening(self, tmp_path: Path, book: Book) -> None:  # noqa: F811
        blocks = [book.make(), book.make(tokens=3), book.make()]
        for turn in range(3):
            tier = DiskTier(self.files, tmp_path / "again", 16 * MIB)
            assert [entry.sequence for entry in tier.load()] == [1, 2, 3][: 3 if turn else 0]
            if not turn:
                save(tier, *blocks)
                tier.touch([2], 1234.5)
            for block in blocks:
                assert book.check(fetch(tier, block.address, LAYOUT, block.header.stride)) == block.sequence
                assert tier.tokens(block.sequence) == block.header.tokens
            assert list(tier.verify()) == []
            tier.close()
            tier.close()

    def test_only_the_owner_may_look(self, tier: Tier, tmp_path: Path, book: Book) -> None:  # noqa: F811
        save(tier, book.make())
        for path in (tmp_path / "cache").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path


class TestDiskTier(DiskContract):
    pass


class TestDiskTierPortable(DiskContract):
    files = OsFiles(portable=True)

    @pytest.fixture
    def tmp_path(self, quick: Path) -> Path:
        return quick


class NetworkFiles(OsFiles):
    """A system whose every filesystem is a network's."""

    def read_small(self, path: str, limit: int = 1 << 20) -> bytes:
        """See ``OsFiles``."""
        return b"server:/export / nfs4 rw 0 0\n" if path == "/proc/self/mounts" else super().read_small(path, limit)


class TestDiskTierOnANetworkFilesystem(DiskContract):
    files = NetworkFiles()

    @pytest.fixture
    def tmp_path(self, quick: Path) -> Path:
        return quick

    def test_the_index_is_not_on_it(self, tier: Tier, tmp_path: Path, book: Book) -> None:  # noqa: F811
        save(tier, book.make())
        assert sorted(path.name for path in (tmp_path / "cache/v1").iterdir()) == ["extent-000001.slab", "lock"]
