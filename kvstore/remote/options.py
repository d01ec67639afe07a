"""How a store uses a remote tier."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from kvstore.errors import BadInput
from kvstore.tiers.seal import LEAST_PART, MOST_PART

DAY = 86400.0
_PREFIX = re.compile(r"[A-Za-z0-9._:/-]{1,200}")


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """Where the remote tier is, and what it may take.

    ``url``: redis://, rediss://, unix://, redis+sentinel://host:port,…/service/db, redis+cluster://host:port,…; may
    hold a user and a password, and is never shown. ``prefix``: of all keys; stores with another one do not see each
    other. ``ttl``: seconds that a block lives after its last use. ``budget``: bytes that all hosts together may keep
    under the prefix, about; None: as much as Redis lets them. ``lookup``: seconds that a match waits for an answer.
    ``timeout``: seconds for any exchange with Redis. ``part_bytes``: of one value, at most. ``key``: a secret that
    hosts share, at least 16 bytes; what was written without it is not read. Raises ``BadInput``.
    """

    url: str = field(repr=False)
    prefix: str = "kvstore"
    ttl: float = 7 * DAY
    budget: int | None = None
    lookup: float = 0.02
    timeout: float = 1.0
    part_bytes: int = 4 << 20
    key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, most in (("ttl", 3650 * DAY), ("lookup", 60.0), ("timeout", 60.0)):
            value: object = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and 0 < getattr(self, name) <= most):
                raise BadInput(f"{name}={value!r} of the remote tier is no number of seconds up to {most:g}; give one")
        prefix: object = self.prefix
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise BadInput(f"prefix={prefix!r} of the remote tier may have letters, digits and . _ : / - only")
        if not _whole(self.part_bytes) or not LEAST_PART <= self.part_bytes <= MOST_PART:
            raise BadInput(f"part_bytes={self.part_bytes!r} of the remote tier must be {LEAST_PART} to {MOST_PART}")
        if self.budget is not None and (not _whole(self.budget) or self.budget <= 0):
            raise BadInput(
                f"budget={self.budget!r} of the remote tier is no number of bytes; leave it out for no limit"
            )
        key: object = self.key
        if key is not None and (not isinstance(key, bytes) or len(key) < 16):
            raise BadInput(
                "key of the remote tier must be at least 16 secret bytes; secrets.token_bytes(32) makes some"
            )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
