"""What ``kv_connector_extra_config`` says, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvstore.errors import BadInput
from kvstore.layout import BLOCK_TOKENS, MAX_BLOCK_TOKENS

BETWEEN, LAYERS = "between", "layers"
_NUMBERS = {"deadline": 3600.0, "timeout": 3600.0, "min_tokens": 1 << 30, "block_tokens": MAX_BLOCK_TOKENS}


@dataclass(frozen=True)
class Options:
    """One engine's settings. Raises ``BadInput`` for keys that are unknown and values that make no sense.

    A store in the engine's own process: ``dir`` (None: in memory only), ``host``, ``disk``, ``redis``, ``encryption``,
    as ``kvstore.open`` takes them. Or a daemon's: ``socket``, ``token``.
    """

    dir: str | None = None
    host: str | int = "1GiB"
    disk: str | int = "8GiB"
    redis: str | None = None
    encryption: str | None = None
    socket: str | None = None
    token: str | None = None
    timeout: float = 1.0  # seconds within which a daemon answers, or else it is a miss
    deadline: float = 5.0  # seconds that a request waits for what is loaded, before the engine computes it
    load: str = BETWEEN  # "between": while other requests run; "layers": in the request's own step, layer by layer
    min_tokens: int = 32  # fewer are computed, which is quicker than bringing them
    block_tokens: int = BLOCK_TOKENS  # tokens of a block; hosts and engines that share blocks have it alike
    fingerprint: str | None = None  # instead of the checkpoint's digest: changes whenever its keys and values would
    required: bool = True  # a model or layout that cannot be served stops the start; False: the engine runs without
    require_tenant: bool = False  # requests without a cache_salt are not served

    def __post_init__(self) -> None:
        for name, limit in _NUMBERS.items():
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= limit:
                raise BadInput(f"{name}={value!r} in kv_connector_extra_config is no number from 0 to {limit:g}")
        for name in ("required", "require_tenant"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name}={getattr(self, name)!r} in kv_connector_extra_config must be true or false")
        if self.load not in (BETWEEN, LAYERS):
            raise BadInput(f'load={self.load!r} in kv_connector_extra_config is unknown; choose "between" or "layers"')
        own = [name for name in ("dir", "redis", "encryption") if getattr(self, name) is not None]
        if self.socket is not None and own:
            raise BadInput(f"kv_connector_extra_config has socket and {own[0]}; the daemon of a socket has its own")
        if self.socket is None and self.token is not None:
            raise BadInput("token in kv_connector_extra_config is for a daemon; give its socket, too")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Options:
        """From ``kv_connector_extra_config``."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(known)}"
                raise BadInput(f"{name!r} in kv_connector_extra_config is not known{hint}")
        return cls(**given)
