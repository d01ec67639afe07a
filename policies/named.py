"""Eviction policies by name: what the command line offers, and the default."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.policies.arc import ARC
from kvstore.policies.best_of import BestOf
from kvstore.policies.clock import CLOCK
from kvstore.policies.fifo import FIFO
from kvstore.policies.gdsf import GDSF
from kvstore.policies.lfu_da import LFUDA
from kvstore.policies.lru import LRU
from kvstore.policies.lru2 import LRU2
from kvstore.policies.pace import Pace
from kvstore.policies.s3_fifo import S3FIFO
from kvstore.policy import Clock, EvictionPolicy

POLICIES: dict[str, Callable[[Clock], EvictionPolicy]] = {
    "default": Pace,
    "pace": Pace,
    "best-of": BestOf,
    "lru": lambda clock: LRU(),
    "lru-2": lambda clock: LRU2(),
    "fifo": lambda clock: FIFO(),
    "clock": lambda clock: CLOCK(),
    "s3-fifo": lambda clock: S3FIFO(),
    "arc": lambda clock: ARC(),
    "lfu-da": lambda clock: LFUDA(),
    "gdsf": lambda clock: GDSF(),
}
