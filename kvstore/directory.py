"""A cache directory: the disk tier behind a path, with the folder of its keys, and the check of all its blocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.errors import BadInput

if TYPE_CHECKING:
    from kvstore.files import Files
    from kvstore.tiers.base import Problem
    from kvstore.tiers.disk import DiskTier

log = logging.getLogger("kvstore")


def place_of(path: str | os.PathLike[str]) -> Path:
    """The path that somebody gave, in full. Raises ``BadInput``."""
    text: object = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise BadInput(f"{text!r} names no directory; give one, or no path at all for a store in memory")
    try:
        return Path(text).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a circle of links, or no home
        raise BadInput(f"{text!r} names no directory: {error}; give another") from error


def disk_tier(
    place: Path,
    capacity: int | None,
    keys: Path | None,
    files: Files | None = None,
    *,
    create: bool = True,
    shared: bool = False,
) -> DiskTier:
    """The disk tier, which seals what it is given where there is a folder of ``keys``."""
    # Imported here, so that a store in memory needs no LMDB.
    from kvstore.files import OsFiles
    from kvstore.tiers.disk import DiskTier
    from kvstore.vault import Vault

    files = files or OsFiles()
    if keys is None:
        return DiskTier(files, str(place), capacity, create=create)
    if keys.is_relative_to(place):
        raise BadInput(f"the key folder {str(keys)!r} is inside of the cache, whose copies would hold it; give another")
    if shared:
        log.warning("encryption covers the disk: blocks go to Redis as they are")
    vault = Vault(files, str(keys))
    try:
        return DiskTier(files, str(place), capacity, create=create, vault=vault)
    except BaseException:
        vault.close()
        raise


def verify(path: str | os.PathLike[str], encryption: str | os.PathLike[str] | None = None) -> Iterator[int | Problem]:
    """Reads every block of a directory that no process has open; changes nothing. ``encryption``: see ``open``.

    Yields first how many blocks there are, then of how many the key is not there, then what is wrong: of those blocks,
    only that what is encrypted has changed. Raises ``BadInput`` when it is no cache.
    """
    if encryption is not None and not place_of(encryption).is_dir():
        raise BadInput(f"{str(encryption)!r} is no folder of keys; give the one that the cache was opened with")
    tier = disk_tier(place_of(path), None, None if encryption is None else place_of(encryption), create=False)
    try:
        entries = list(tier.load())
        yield len(entries)
        yield sum(bool(entry.seal) for entry in entries)
        yield from tier.verify()
    finally:
        tier.close()
