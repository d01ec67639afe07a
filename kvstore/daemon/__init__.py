"""One store for the workers of a host: a process that holds it, and the client that is a store to its callers."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kvstore.errors import BadInput
from kvstore.sizes import size_bytes

if TYPE_CHECKING:
    from kvstore.daemon.client import Client
    from kvstore.daemon.coroutines import AsyncClient
    from kvstore.daemon.pinning import Both

SOCKET = "kvstore.sock"  # of the daemon that serves a directory, in it
MAX_TOKEN = 4096
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def connect(
    url: str | os.PathLike[str],
    *,
    timeout: float = 1.0,
    token: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    buffer: str | int = "256MiB",
    device_name: str = "auto",
) -> Client:
    """A store that a daemon (``kvstore serve``) holds: ``"unix:/run/kvstore.sock"``, or the daemon's directory.

    ``timeout``: seconds within which any call is answered, or else is a miss. ``token``: the text that says which of
    the daemon's tenants this is; without one it is who the system says. Raises ``Unreachable`` when no daemon is there
    now; one that goes away later is found again when it is back, and until then everything misses.

    ``"tls://host:port"`` is a daemon on another machine, which takes nobody without a token. ``ca``: a file (PEM) of
    who certifies it; without one, those whom the system trusts. ``buffer``: memory here for blocks that are loaded or
    saved.

    ``device_name``: memory that is shared with a daemon on this machine is pinned for this device, in a thread, as it
    comes into use. "auto" is the first CUDA device that torch has memory on in this process, once there is one: it
    imports no torch, and starts no device up. "cuda" and "cuda:1" do both, now; "cpu" pins nothing. What cannot be
    pinned is done without, with a line in the log; ``host_pageable_bytes`` in ``stats`` tells how much that is.
    """
    from kvstore.daemon.client import Client
    from kvstore.daemon.pinning import Pinning

    given: object = timeout
    if not isinstance(given, int | float) or not 0 < given < 86400:
        raise BadInput(f"timeout={timeout!r} is no number of seconds; give one above 0")
    if token is not None and not 0 < len(token) < MAX_TOKEN:
        raise BadInput(f"a token has 1 to {MAX_TOKEN} characters; give the text of the tenant's token file")
    text: object = os.fspath(url)
    if not isinstance(text, str) or "\0" in text or not text.removeprefix("unix:"):
        raise BadInput(f'{url!r} names no daemon; write "unix:/path/of/its/socket", or its directory')
    if text.startswith("tls://"):
        return _far(text, timeout, token, ca, buffer)
    place = Path(text.removeprefix("unix:").removeprefix("//")).expanduser().absolute()
    return Client(place / SOCKET if place.is_dir() else place, timeout, token, Pinning(_finder(device_name)))


def _finder(name: str) -> Callable[[], Both | None]:
    """Who finds pins for a device. Raises ``BadInput``."""
    from kvstore.daemon.pinning import nothing

    text: object = name
    if not isinstance(text, str) or not _DEVICE.fullmatch(text):
        raise BadInput(f'device_name={text!r} is no device; write "auto", "cuda", "cuda:1" or "cpu"')
    if name == "auto":
        return _in_use
    if name == "cpu":
        return nothing
    try:
        from kvstore.daemon.cuda import pins
    except ImportError as error:
        raise BadInput("pinning for a device needs torch; install it, or leave out device_name=") from error
    found = pins(name)
    return lambda: found


def _in_use() -> Both | None:
    """For a device that torch has memory on; None: there is none yet."""
    started = getattr(sys.modules.get("torch.cuda"), "is_initialized", None)
    if started is None or not started():
        return None
    from kvstore.daemon.cuda import occupied, pins

    devices = occupied()
    return pins(f"cuda:{devices[0]}") if devices else None


def _far(url: str, timeout: float, token: str | None, ca: str | os.PathLike[str] | None, buffer: str | int) -> Client:
    from kvstore.daemon.far import FarClient, Whereabouts
    from kvstore.daemon.secured import client_context

    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise BadInput(f'{url!r} names no daemon; write "tls://host:port"')
    if token is None:
        raise BadInput("a daemon elsewhere takes nobody without a token; give the text of the tenant's token file")
    return FarClient(Whereabouts(host, port, token, client_context(ca), size_bytes(buffer, "buffer"), timeout))


async def aconnect(
    url: str | os.PathLike[str],
    *,
    timeout: float = 1.0,
    token: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    buffer: str | int = "256MiB",
    device_name: str = "auto",
) -> AsyncClient:
    """``connect``, for asyncio: the same verbs, awaited."""
    from kvstore.daemon.coroutines import AsyncClient

    return await AsyncClient.connected(
        lambda: connect(url, timeout=timeout, token=token, ca=ca, buffer=buffer, device_name=device_name)
    )
