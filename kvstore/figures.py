"""Numbers as people read them."""

from __future__ import annotations

_SPANS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def seconds(value: float) -> str:
    """A short time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value / scale < 1000 else f"{value / scale:,.0f} {unit}"
    return f"{value / 1e-6:.2f} µs" if value else "0"


def span(value: float) -> str:
    """A long time, in its two largest units."""
    whole = max(int(value), 0)
    for place, (unit, scale) in enumerate(_SPANS):
        if whole >= scale:
            below, size = _SPANS[place + 1] if place + 1 < len(_SPANS) else ("", 1)
            rest = whole % scale // size if below else 0
            return f"{whole // scale}{unit}" + (f" {rest}{below}" if rest else "")
    return "0s"


def size(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} bytes"


def plain(text: str) -> str:
    """Text of somebody else's, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
