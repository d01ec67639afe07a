"""What the tests of crashes, losses of power and failing calls put a store through, and where."""

from __future__ import annotations

from pathlib import Path

from blocks import ODD, SMALL, ids, load_all, save
from faulty_files import FaultyFiles

import kvstore
from kvstore.local import LocalStore


def script(store: LocalStore, said: dict[int, int]) -> None:
    """A bit of everything; ``said`` is told what is durable."""
    for number in range(6):
        layout = (SMALL, ODD)[number % 2]
        said[number] = save(store, ids(number, 30 + number), layout=layout, owner="abc"[number % 3]).wait().tokens
    for number in (1, 4):
        said.pop(number, None)
    store.forget(owner="b")
    said[2] = max(said[2], save(store, ids(2, 60)).wait().tokens)
    load_all(store, ids(3, 33), layout=ODD)
    save(store, ids(9, 40))


def calls_of_the_script(folder: Path) -> int:
    files = FaultyFiles()
    with kvstore.open(folder, host="2MiB", disk="8MiB", files=files) as store:
        script(store, {})
    return files.calls
