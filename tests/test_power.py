"""Loss of power at any call: what was said to be durable is there, and nothing is wrong."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from blocks import ODD, SMALL, ids, load_all, recount, save
from faulty_files import FaultyFiles
from hardship import calls_of_the_script, script

import kvstore
from kvstore import KVStoreError
from kvstore.files import Handle
from kvstore.tiers.extents import Extents


class PowerFiles(FaultyFiles):
    """Loses power with the n-th call, and the index with it, which does not go through this door: it keeps what it had
    by then."""

    def __init__(self, folder: Path, point: int) -> None:
        super().__init__()
        self.fail_at, self.forever = point, True
        self._index, self._kept = folder / "v1" / "index", folder.parent / f"{folder.name}-index"

    def _call(self, name: str, path: str) -> None:
        with self._guard:
            if self.calls + 1 == self.fail_at and self._index.is_dir():
                shutil.copytree(self._index, self._kept)
            super()._call(name, path)

    def write(self, handle: Handle, data: memoryview, offset: int) -> None:
        if self.fail_at is not None and self.calls >= self.fail_at:
            raise OSError(errno.EIO, "the power is off")  # and no half of it is written
        super().write(handle, data, offset)

    def lose_power(self, rng: random.Random) -> None:
        if self._kept.is_dir():
            shutil.rmtree(self._index, ignore_errors=True)
            shutil.copytree(self._kept, self._index)
        super().lose_power(rng)


def powerless(folder: Path, seed: int, point: int) -> list[str]:
    """Runs the script until the power goes with the n-th call; faults seen after the restart."""
    files = PowerFiles(folder, point)
    said: dict[int, int] = {}
    try:
        with kvstore.open(folder, host="2MiB", disk="8MiB", files=files) as store:
            script(store, said)
    except KVStoreError:
        pass
    files.lose_power(random.Random(seed))
    faults = []
    with kvstore.open(folder, host="2MiB", disk="8MiB") as store:
        for number in range(10):
            layout = (SMALL, ODD)[number % 2]
            have = load_all(store, [*ids(number, 60), 0], layout=layout)
            if have < said.get(number, 0):
                faults.append(f"chain {number}: {said[number]} were durable, {have} are there")
        save(store, ids(50, 40)).wait()
        faults += recount(store)
    shutil.rmtree(folder)
    return faults


def test_power_is_lost_at_two_hundred_points(place: Path, seed: int) -> None:
    calls = calls_of_the_script(place / "all")
    for number in range(200):
        point = 1 + number * calls // 200
        faults = powerless(place / f"cache{number}", seed + number, point)
        assert faults == [], f"power lost with call {point}, seed {seed + number}"


def test_data_that_is_indexed_before_it_is_durable_is_found(
    place: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsynced(extents: Extents, numbers: Iterable[int]) -> None:
        return None

    monkeypatch.setattr(Extents, "sync", unsynced)
    calls = calls_of_the_script(place / "all")
    assert any(powerless(place / f"cache{n}", seed + n, max(1, calls - 2 * n)) for n in range(20))
