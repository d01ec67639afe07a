"""Small strings kept beside the blocks."""

from __future__ import annotations

import logging

from kvstore.errors import TierError
from kvstore.tiers.base import Tier

log = logging.getLogger("kvstore")


class Notes:
    """On disk where there is one, else as long as the store is open. Any thread."""

    def __init__(self, disk: Tier | None) -> None:
        self._disk = disk
        self._notes: dict[str, str] = {}  # without a disk

    def remember(self, name: str, value: str) -> None:
        """Keeps ``value`` under ``name``."""
        if self._disk is None:
            self._notes[name] = value
        else:
            self._disk.remember(name, value)

    def recall(self, name: str) -> str | None:
        """What is kept under ``name``; None when nothing is, or when it cannot be read."""
        try:
            return self._notes.get(name) if self._disk is None else self._disk.recall(name)
        except TierError as error:
            log.warning("a note cannot be read: %s", error)
            return None
