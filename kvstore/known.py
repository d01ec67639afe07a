"""The models and tenants that something was stored for, so that a miss can say what differs."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable

from kvstore.keys import Fingerprint, Namespace
from kvstore.match import Miss

_LIST = "namespaces"


class Known:
    """Fingerprints by namespace. Kept beside the blocks, so that they survive a restart. Any thread."""

    def __init__(self, recall: Callable[[str], str | None], remember: Callable[[str, str], None]) -> None:
        """``recall`` and ``remember`` keep small strings by name."""
        self._recall = recall
        self._remember = remember
        self._lock = threading.Lock()
        self._fingerprints: dict[bytes, tuple[Fingerprint, str]] = {}  # with the tenant; guarded by _lock
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):  # damaged: a miss says less
            for name in json.loads(recall(_LIST) or "[]"):
                stored = json.loads(recall(f"namespace/{name}") or "null")
                if stored is not None:
                    components = {str(key): str(value) for key, value in stored["fingerprint"].items()}
                    self._fingerprints[bytes.fromhex(name)] = (Fingerprint(components), str(stored["tenant"]))

    def add(self, namespace: Namespace) -> None:
        """Something is stored in this namespace."""
        digest, fingerprint = namespace.digest, namespace.fingerprint
        if digest in self._fingerprints:
            return
        with self._lock:
            self._fingerprints[digest] = (fingerprint, namespace.tenant)
            names = sorted(known.hex() for known in self._fingerprints)
            stored = {"fingerprint": dict(fingerprint.components), "tenant": namespace.tenant}
            self._remember(f"namespace/{digest.hex()}", json.dumps(stored, sort_keys=True))
            self._remember(_LIST, json.dumps(names))

    def explain(self, namespace: Namespace, tokens: int, limit: int, chains: int) -> Miss:
        """Why a match ended after ``tokens`` of at most ``limit``; ``chains``: first blocks in its namespace."""
        if tokens == limit:
            return Miss("complete", tokens, f"all {limit} tokens but the last are cached")
        if tokens:
            return Miss("parts", tokens, f"the prompts part at token {tokens}")
        if chains:
            return Miss("parts", 0, "the prompts part at token 0: no stored prompt starts with it")
        return self._explain_nothing(namespace)

    def _explain_nothing(self, namespace: Namespace) -> Miss:
        with self._lock:
            known = list(self._fingerprints.values())
        if any(fingerprint == namespace.fingerprint for fingerprint, tenant in known if tenant != namespace.tenant):
            return Miss("tenant", 0, "nothing is stored for this tenant yet", "tenant")
        others = [f.differs(namespace.fingerprint) for f, tenant in known if tenant == namespace.tenant]
        differing = min((names for names in others if names), key=len, default=None)
        if differing is None or any(not names for names in others):
            return Miss("empty", 0, "nothing is stored for this model and tenant yet")
        names = ", ".join(differing)
        text = f"nothing is stored for this model: it differs from the nearest stored one in {names}"
        return Miss("fingerprint", 0, text, differing[0])
