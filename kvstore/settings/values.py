"""The kinds of settings: sizes, durations, addresses, paths and the like.

Text is always accepted, because that is all an environment has. YAML reads ``off`` as false and ``0600`` as a number in
octal; both mean what they look like.
"""

from __future__ import annotations

import difflib
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import SecretStr

from kvstore.config import MIN_DISK, MIN_HOST
from kvstore.errors import BadInput
from kvstore.settings.address import Address, is_ip
from kvstore.settings.kind import Kind
from kvstore.sizes import size_bytes

MAX_UID = 2**32 - 2  # the one above means "nobody was named" to the system
DAY = 86400.0
MIN_FRAME = MIN_STAGING = 64 << 10
MAX_FRAME = 1 << 30
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d|)\s*", re.ASCII)
_SECONDS = {"ms": "0.001", "": "1", "s": "1", "m": "60", "min": "60", "h": "3600", "d": "86400"}
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*", re.ASCII)
_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)):([0-9]{1,5})")
_MODES = {"0600": 0o600, "0660": 0o660, "0666": 0o666}
_PREFIX = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_.@-]{0,254}")
_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster", "unix")


def is_off(value: object) -> bool:
    """Whether it says that something is not wanted; YAML reads a bare ``off`` as false."""
    return value is False or (isinstance(value, str) and value.strip().lower() == "off")


def size_text(size: int) -> str | int:
    """A size as one writes it, in the largest unit that leaves no rest."""
    return next((f"{size // unit}{name}" for name, unit in _UNITS if size % unit == 0), size)


def duration_text(seconds: float) -> str:
    """Seconds as one writes them, exact to the bit, in the largest unit that leaves no rest."""
    exact = Decimal(repr(seconds))
    if exact and not exact % 60:
        unit = next(unit for unit in ("d", "h", "m") if not exact % int(_SECONDS[unit]))
        return f"{int(exact / int(_SECONDS[unit]))}{unit}"
    if 0 < exact < 1 and not exact * 1000 % 1:
        return f"{int(exact * 1000)}ms"
    return f"{exact:f}".removesuffix(".0") + "s"


def _read_size(value: object, name: str) -> int:
    return size_bytes(value, name)  # type: ignore[arg-type]  # it says of everything else that it is no size


def size(least: int, most: int | None = None, absent: str | None = None) -> Kind:
    """Bytes. ``absent``: the word for None, where there may be no bound."""

    def read(value: object, name: str) -> int | None:
        if absent and is_off(value):
            return None
        found = _read_size(value, name)
        if found < least:
            raise BadInput(f"{name}={value!r} is too small; give at least {size_text(least)}")
        if most is not None and found > most:
            raise BadInput(f"{name}={value!r} is too large; give at most {size_text(most)}")
        return found

    def show(value: int | None) -> str | int | None:
        return absent if value is None else size_text(value)

    types = ["string", "integer", *(["boolean"] if absent else [])]
    return Kind(f"size or {absent}" if absent else "size", read, show, {"type": types})


def duration(most: float, positive: bool = True) -> Kind:
    """Seconds as a float, up to ``most``."""

    def read(value: object, name: str) -> float:
        match = _DURATION.fullmatch(value) if isinstance(value, str) else None
        seconds = math.nan
        if match:
            seconds = float(Decimal(match[1]) * Decimal(_SECONDS[match[2]]))
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**15:
            seconds = float(value)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise BadInput(f'{name}={value!r} is not a duration; write it as "20s", "500ms", "2m" or in seconds')
        if positive and not seconds:
            raise BadInput(f"{name}={value!r} must be more than nothing")
        if seconds > most:
            raise BadInput(f"{name}={value!r} is too long; give at most {duration_text(most)}")
        return seconds

    return Kind("duration", read, duration_text, {"type": ["string", "number"]})


def _read_share(value: object, name: str) -> float | int:
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        try:
            found = _read_size(value, name)
        except BadInput as error:
            raise BadInput(f'{name}={value!r} is neither a share such as "25%" nor a size such as "1GiB"') from error
        if found < MIN_STAGING:
            raise BadInput(f'{name}={value!r} is too small; give at least {size_text(MIN_STAGING)}, or a share: "25%"')
        return found
    if not 0 < (share := float(Decimal(match[1]) / 100)) <= 1:
        raise BadInput(f"{name}={value!r} must be more than 0% and at most 100%")
    return share


def _show_share(value: float | int) -> str | int:
    if isinstance(value, int):
        return size_text(value)
    exact = f"{Decimal(repr(value)) * 100:f}"
    return (exact.rstrip("0").rstrip(".") if "." in exact else exact) + "%"


def count(least: int, most: int) -> Kind:
    """A whole number."""

    def read(value: object, name: str) -> int:
        text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
        if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise BadInput(f"{name}={value!r} is not a whole number from {least} to {most}")
        return int(text)

    return Kind("number", read, json={"type": ["integer", "string"]})


def address(loopback: bool = False) -> Kind:
    """Where to listen, or None."""
    example = "127.0.0.1:9410" if loopback else "0.0.0.0:9411"

    def read(value: object, name: str) -> Address | None:
        if is_off(value):
            return None
        match = _ADDRESS.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None or int(match[3]) > 65535 or (match[1] and not is_ip(match[1])):
            raise BadInput(f'{name}={value!r} is no address to listen at; write "{example}", "[::1]:9410" or "off"')
        found = Address(match[1] or match[2], int(match[3]))
        if loopback and not found.loopback:
            raise BadInput(
                f'{name}={value!r} can be reached from outside; choose a loopback address such as "{example}"'
            )
        return found

    kind = "loopback ADDR:PORT or off" if loopback else "ADDR:PORT or off"
    return Kind(kind, read, lambda value: "off" if value is None else str(value), {"type": ["string", "boolean"]})


def _read_mode(value: object, name: str) -> int:
    """Numbers are in octal already where the file had them so; a decimal 600 is none of the three."""
    mode = value
    if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{3}", value.strip()):
        mode = int(value.strip().removeprefix("0o"), 8)
    if isinstance(mode, bool) or mode not in _MODES.values():
        raise BadInput(
            f'{name}={value!r} is no mode of a socket; choose "0600" (for its user), "0660" (for its group) or "0666"'
        )
    return int(mode)  # type: ignore[call-overload,no-any-return]  # it is one of ours


def _read_uids(value: object, name: str) -> tuple[int, ...]:
    listed: Any = value
    if isinstance(value, str):
        listed = [word for word in re.split(r"[\s,]+", value.strip().removeprefix("[").removesuffix("]")) if word]
    elif not isinstance(value, list | tuple):
        listed = [value]
    found = []
    for one in listed:
        text = str(one) if isinstance(one, int | str) and not isinstance(one, bool) else ""
        if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > MAX_UID:
            raise BadInput(f"{name}={value!r} is no list of uids; write numbers, as `id -u NAME` prints them")
        found.append(int(text))
    return tuple(dict.fromkeys(found))


def _read_prefix(value: object, name: str) -> str:
    if not isinstance(value, str) or not _PREFIX.fullmatch(value):
        raise BadInput(f"{name}={value!r} is no prefix; use 1 to 64 of A-Z a-z 0-9 _ . : / -")
    return value


def _read_group(value: object, name: str) -> str | int:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if re.fullmatch(r"[0-9]{1,10}", text) and int(text) <= MAX_UID:
        return int(text)
    if not _GROUP.fullmatch(text):
        raise BadInput(f"{name}={value!r} is no group; write its name or its number")
    return text


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _read_path(value: object, name: str) -> Path:
    text = str(value) if isinstance(value, str | Path) else ""
    if not text or "\0" in text or not _is_utf8(text):
        raise BadInput(f"{name}={value!r} is no path; leave it out, or name one")
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError as error:  # a user who has no home
        raise BadInput(
            f"{name}={value!r} is in a home directory that is not known here; write the whole path"
        ) from error


def _show_path(value: Path | None) -> str | None:
    text = None if value is None else str(value)
    return f"./{text}" if text and text.startswith("~") else text


def choice(*words: str) -> Kind:
    """One of a few words."""

    def read(value: object, name: str) -> str:
        word = value.strip().lower() if isinstance(value, str) else value
        if word not in words:
            like = difflib.get_close_matches(str(value).lower(), words, 1)
            hint = f"; did you mean {like[0]}?" if like else f"; choose {', '.join(words[:-1])} or {words[-1]}"
            raise BadInput(f"{name}={value!r} is unknown{hint}")
        return str(word)

    return Kind(" | ".join(words), read, json={"enum": list(words)})


def _read_url(value: object, name: str) -> SecretStr | None:
    """Says nothing of what it was given: there may be a password in it."""
    if is_off(value):
        return None
    scheme, colon, rest = value.strip().partition("://") if isinstance(value, str) else ("", "", "")
    if not colon or not rest or not _is_utf8(rest):
        raise BadInput(f'{name} is no URL of a Redis; write "redis://HOST:6379/0" or "off"')
    if scheme not in _SCHEMES:
        like = difflib.get_close_matches(scheme.lower(), _SCHEMES, 1)
        hint = f"did you mean {like[0]}://?" if like else f"choose one of {', '.join(_SCHEMES)}"
        raise BadInput(f"{name} begins with no scheme that is known; {hint}")
    return SecretStr(f"{scheme}://{rest}")


def _url_is_secret(value: SecretStr | None) -> bool:
    text = value.get_secret_value() if value else ""
    return "@" in text or "pass" in text.lower()


def _show_url(value: SecretStr | None) -> str:
    return value.get_secret_value() if value else "off"


_STRINGS = {"type": "string"}
_UIDS = {"type": ["array", "integer", "string"], "items": {"type": "integer", "minimum": 0, "maximum": MAX_UID}}
_MODE = {"type": ["string", "integer"], "enum": [*_MODES, *_MODES.values()]}

HostSize = Annotated[int, size(MIN_HOST)]
DiskSize = Annotated[int, size(MIN_DISK)]
HostShare = Annotated[int | None, size(MIN_HOST)]
DiskShare = Annotated[int | None, size(MIN_DISK)]
Bound = Annotated[int | None, size(1 << 20, absent="off")]
FrameSize = Annotated[int, size(MIN_FRAME, MAX_FRAME)]
Share = Annotated[float | int, Kind("share or size", _read_share, _show_share, {"type": ["string", "integer"]})]
Lifetime = Annotated[float, duration(3650 * DAY)]
Lease = Annotated[float, duration(DAY)]
Drain = Annotated[float, duration(DAY, positive=False)]
Wait = Annotated[float, duration(60.0)]
Count = Annotated[int, count(1, 65536)]
Listen = Annotated[Address | None, address()]
Loopback = Annotated[Address | None, address(loopback=True)]
Mode = Annotated[int, Kind("octal mode", _read_mode, lambda mode: f"{mode:04o}", _MODE)]
Uids = Annotated[tuple[int, ...], Kind("list of uids", _read_uids, list, _UIDS)]
Prefix = Annotated[str, Kind("text", _read_prefix, json=_STRINGS)]
Group = Annotated[str | int | None, Kind("group", _read_group, json={"type": ["string", "integer"]})]
Place = Annotated[Path | None, Kind("path", _read_path, _show_path, _STRINGS)]
Url = Annotated[
    SecretStr | None, Kind("URL or off", _read_url, _show_url, {"type": ["string", "boolean"]}, _url_is_secret)
]
Level = Annotated[str, choice("debug", "info", "warning", "error")]
Format = Annotated[str, choice("text", "json")]
