"""Whose tokens a request's are, and what is served to it at all.

A request's ``cache_salt`` is its tenant, and parts the engine's own prefix cache likewise. A modular request leaves
approximate blocks there. So it must have a salt of its own: its tenant, "#", and anything; and a request that is not
modular and comes with such a salt later reads no cached block at all.
"""

from __future__ import annotations

import logging
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvstore.adapters.transformers.checkpoint import SafetensorsFile, memory_digest
from kvstore.adapters.vllm.request import Tracked
from kvstore.adapters.vllm.step import Scope
from kvstore.keys import MAX_NAME

log = logging.getLogger("kvstore")

APART = "#"
MOST_SALTS = 1 << 20  # that modular requests had; beyond, no more of them are served


class Scopes:
    """Of one engine. Belongs to the scheduler's thread."""

    def __init__(self, require_tenant: bool) -> None:
        self.generation = 0
        self._require_tenant = require_tenant
        self._approximate: set[bytes] = set()  # digests of the salts of modular requests
        self._adapters: dict[str, str | None] = {}  # digest by path

    def track(self, request: Any) -> Tracked:
        """A request, and what is done for it."""
        adapter = self._adapter(request.lora_request)
        plain = not request.mm_features and request.prompt_embeds is None
        tenant = request.cache_salt or ""
        served = plain and adapter is not None and bool(tenant or not self._require_tenant)
        scope = Scope(_short(tenant), adapter or "none", self.generation)
        return Tracked(request, scope, served, preemptions=request.num_preemptions)

    def admit(self, tracked: Tracked) -> None:
        """Settles which mode a request that has come is served in."""
        request, salt = tracked.request, tracked.request.cache_salt or ""
        digest = blake2b(salt.encode(), digest_size=16).digest()
        if not tracked.wishes.segments:
            if digest in self._approximate:
                request.skip_reading_prefix_cache = True
                tracked.served = False
            return
        tenant, apart, rest = salt.rpartition(APART)
        why = ""
        if not (apart and rest):
            why = f"a modular request needs a cache_salt of its own: its tenant, {APART!r}, and more"
        elif self._require_tenant and not tenant:
            why = f"before {APART!r} in its cache_salt, a modular request names its tenant"
        elif len(self._approximate) >= MOST_SALTS and digest not in self._approximate:
            why = "too many salts of modular requests so far; restart the engine"
        if why:
            tracked.refused["refused"] = why
            return
        self._approximate.add(digest)
        tracked.modular = True
        tracked.scope = Scope(_short(tenant), tracked.scope.adapter, self.generation)

    def _adapter(self, lora: Any) -> str | None:
        """What identifies an adapter's weights; None for one that cannot be read."""
        if lora is None:
            return "none"
        path = str(lora.lora_path)
        if path not in self._adapters:
            try:
                self._adapters[path] = _adapter_digest(Path(path))
            except (OSError, ValueError, KeyError) as error:
                log.warning("adapter %s: %s; requests for it are not served", path, error)
                self._adapters[path] = None
        return self._adapters[path]


def _adapter_digest(folder: Path) -> str:
    weights = memory_digest(SafetensorsFile(folder / "adapter_model.safetensors").tensors())
    settings = blake2b((folder / "adapter_config.json").read_bytes(), digest_size=16).hexdigest()
    return f"{weights[:32]}/{settings}"


def _short(tenant: str) -> str:
    """A tenant as a namespace can have it."""
    named = tenant.encode(errors="surrogatepass")
    if len(named) <= MAX_NAME:
        return tenant
    return f"digest:{blake2b(named, digest_size=32).hexdigest()}"
