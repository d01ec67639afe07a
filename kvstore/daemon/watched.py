"""What monitoring asks of a daemon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.store import Store


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One client that is connected. ``uid`` and ``pid`` as the system says; ``since`` in Unix seconds; ``leases`` in
    blocks; ``drafts`` that it has not given to a save yet, and the bytes of its staging area."""

    id: int
    tenant: str
    uid: int
    pid: int
    since: float
    leases: int
    drafts: int
    staged_bytes: int


class Watched(Protocol):
    """A daemon that serves, as far as it is watched. Every method may be called from any thread, and waits for no I/O.

    A tenant is whom a store is bound to, "" the one that is always there.
    """

    @property
    def stores(self) -> Mapping[str, Store]:
        """By tenant; may change at any time."""

    def sessions(self) -> Sequence[SessionInfo]:
        """All clients."""

    def refused(self) -> int:
        """Connections so far that were closed at once: of nobody who is served here, or too many at a time."""

    def uptime(self) -> float:
        """Seconds."""

    def ready(self) -> str:
        """Why it cannot serve; empty when it can. What it can do without (Redis) makes no difference."""

    def failures(self) -> Sequence[tuple[float, str]]:
        """What went wrong lately, oldest first: when (Unix seconds), and a sentence."""
