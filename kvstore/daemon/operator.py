"""A daemon, as the commands of its operator have it: any client's store, and what only they ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.daemon.client import FOREVER, Client
from kvstore.erasure import Receipt
from kvstore.keeper import Pinned, TierName


@dataclass(frozen=True, slots=True)
class About:
    """What a daemon says of itself to one of its clients.

    ``epoch`` is another for each daemon. ``tenant``: whom it takes the client for; ``operator``: whether that one may
    see and change what belongs to all. ``uptime`` and ``lease_ttl`` in seconds. ``sessions``: the tenant's, each with
    ``id``, ``uid``, ``pid``, ``since`` (Unix seconds), ``leases``, ``drafts``, ``staged_bytes``, and whether it is the
    client's ``own``. ``settings``: as TOML writes them, without secrets, and ``refused``: connections of those who are
    nobody's here, for the operator only.
    """

    version: str
    epoch: str
    pid: int
    uptime: float
    lease_ttl: float
    tenant: str
    operator: bool
    refused: int
    sessions: Sequence[Mapping[str, Any]]
    settings: Mapping[str, str]


class Operator(Client):
    """A client that asks for what operators want to know, too. Raises ``Unreachable`` like ``Client.stats``."""

    def about(self) -> About:
        """The daemon."""
        return About(**self._caller.call("about"))

    def quotas(self) -> list[dict[str, Any]]:
        """What each tenant has: ``tenant``, ``sessions``, and of ``host``, ``staging`` (what clients may be filling)
        and ``disk`` (None: there is none) the ``capacity`` and what is ``used``, in bytes. Others than the operator see
        their own."""
        found: list[dict[str, Any]] = self._caller.call("quotas")
        return found

    def resize(self, tenant: str, host: int, timeout: float) -> dict[str, Any]:
        """Gives a tenant ``host`` bytes of memory, staging included, until the daemon ends; returns what ``quotas``
        says of it then, within ``timeout`` seconds. What leases hold beyond goes later. Raises ``BadInput``."""
        quota: dict[str, Any] = self._caller.long("resize", tenant, host, timeout, patience=timeout)
        return quota

    def pin_segment(self, id: str, tier: TierName, seconds: float) -> Pinned:
        """``pin`` for a segment by the leading digits of its id. Raises ``BadInput``."""
        said = self._caller.long("pin_segment", id, tier, seconds, patience=FOREVER)
        pinned_in, asked, tokens, period, until, why = said
        return Pinned(pinned_in, asked, tokens, period, until, why, lambda: None)

    def forget_segment(
        self, id: str, tenant: str | None = None, owner: str | None = None, older_than: float | None = None
    ) -> Receipt:
        """``forget`` for a segment, and what stands behind it. Raises ``BadInput``."""
        return Receipt(*self._caller.long("forget_segment", id, tenant, owner, older_than, patience=FOREVER))
