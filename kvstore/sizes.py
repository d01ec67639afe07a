"""Sizes as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

from kvstore.errors import BadInput

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def size_bytes(size: str | int, name: str = "size") -> int:
    """Bytes of a size such as ``"8GiB"``, ``"500 MB"`` or a plain int. Raises ``BadInput``."""
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None or match[2].lower() not in _UNITS:
            raise BadInput(f'{name}={size!r} is not a size; write it as "8GiB", "500MB" or a number of bytes')
        value = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if value <= 0:
        raise BadInput(f"{name}={size!r} must be more than nothing")
    return value
