"""What the operator wrote into SGLang's extra config, and the store that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import kvstore
from kvstore.errors import BadInput, StoreBusy, Unreachable

# What SGLang itself reads there.
SGLANG = {"backend_name", "module_path", "class_name", "interface_v1", "tp_lcm_size", "file_storage_path"}
SGLANG |= {"prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token"}
SGLANG |= {"hicache_storage_pass_prefix_keys"}
OF_DIR = ("host", "disk", "redis", "encryption")
OF_SOCKET = ("token_file", "ca", "buffer")
MOST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Options:
    """``dir`` with what ``kvstore.open`` takes, or ``socket`` with what ``kvstore.connect`` takes.

    ``timeout``: seconds that any call of SGLang's may take. ``tenant``: whose pages they are: nobody else finds them.
    ``tag``: whatever else the pages depend on (a revision, other weights), so that those of another are not found.
    """

    dir: str | None = None
    host: str | int | None = None
    disk: str | int | None = None
    redis: str | None = None
    encryption: str | None = None
    socket: str | None = None
    token_file: str | None = None
    ca: str | None = None
    buffer: str | int | None = None
    timeout: float = 5.0
    tenant: str = ""
    tag: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """From the extra config. Raises ``BadInput``."""
        ours = {name: value for name, value in (given or {}).items() if name not in SGLANG}
        known = [field.name for field in fields(cls)]
        for name, value in ours.items():
            if name not in known:
                meant = get_close_matches(str(name), known, 1)
                hint = f'did you mean "{meant[0]}"?' if meant else f"there are {', '.join(known)}"
                raise BadInput(f"the extra config of kvstore has no {name!r}; {hint}")
            sizes, words = name in ("host", "disk", "buffer"), name != "timeout"
            if words and not isinstance(value, str) and not (sizes and isinstance(value, int)):
                raise BadInput(f'"{name}": {value!r} in the extra config is no text; write it in quotes')
        return cls(**ours).checked()

    def checked(self) -> Options:
        """Itself. Raises ``BadInput`` for what does not go together."""
        seconds: object = self.timeout
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MOST_SECONDS:
            raise BadInput(f'"timeout": {seconds!r} in the extra config is no number of seconds; give one above 0')
        if (self.dir is None) == (self.socket is None):
            raise BadInput('the extra config of kvstore names its place: give "dir" or "socket", one of them')
        side, others = ("dir", OF_SOCKET) if self.socket is None else ("socket", OF_DIR)
        for name in others:
            if getattr(self, name) is not None:
                raise BadInput(f'"{name}" does not go with "{side}" in the extra config; leave it out')
        return self

    def opened(self, ranks: int) -> kvstore.Store:
        """The store. ``ranks``: SGLang's processes that need it. Raises ``BadInput``."""
        advice = 'start "kvstore serve --dir DIR" and give its "socket" to all of them'
        if self.dir is not None and ranks > 1:
            raise BadInput(f"SGLang runs {ranks} processes, and a directory belongs to one; {advice}")
        try:
            if self.dir is not None:
                budgets: dict[str, Any] = {name: size for name in OF_DIR if (size := getattr(self, name)) is not None}
                store: kvstore.Store = kvstore.open(self.dir, **budgets)
                return store
            assert self.socket is not None
            token = None if self.token_file is None else Path(self.token_file).read_text("utf-8").strip()
            more = {name: value for name in ("ca", "buffer") if (value := getattr(self, name)) is not None}
            # Each call in half of the time, so that two that fail end in time. Pages are copied by the CPU: no pinning.
            return kvstore.connect(self.socket, timeout=self.timeout / 2, token=token, device_name="cpu", **more)
        except StoreBusy as error:
            raise BadInput(f"{error}; where SGLang runs several processes, {advice}") from error
        except (Unreachable, OSError) as error:
            raise BadInput(f"the store of the extra config cannot be had: {error}") from error
