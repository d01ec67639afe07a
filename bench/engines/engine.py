"""An engine in a process of its own, asked over pipes; and how each kind of cache is given to it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from kvstore.errors import BadInput

CONTEXT = 8192


def embedded(folder: Path, host: str) -> dict[str, Any]:
    """A store in the engine's process."""
    return _ours({"dir": str(folder), "host": host, "disk": "4GiB"})


def through(daemon: str) -> dict[str, Any]:
    """A daemon's store."""
    return _ours({"socket": f"unix:{daemon}/kvstore.sock", "timeout": 5.0})


def _ours(extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.adapters.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def peer() -> dict[str, Any] | None:
    """LMCache's connector, where it is installed."""
    if find_spec("lmcache") is None:
        return None
    return {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


class Engine:
    """A context manager; the process ends with it."""

    def __init__(self, model: Path, transfer: dict[str, Any] | None, prefix_caching: bool = True) -> None:
        settings = {
            "model": str(model),
            "dtype": "bfloat16",
            "seed": 0,
            "context": CONTEXT,
            "prefix_caching": prefix_caching,
            "transfer": transfer,
        }
        command = [sys.executable, "-m", "kvstore.bench.engines.arm", json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._heard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, ids: list[int], **more: Any) -> dict[str, Any]:
        """Seconds to the first token, how many tokens were cached, and the token."""
        return self._said({"ids": ids, **more})

    def settle(self) -> None:
        """Until what was computed is stored, as far as it is going to be."""
        self._said({"settle": True})

    def _said(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BadInput("an engine ended; what it says is above")
        found: dict[str, Any] = json.loads(line)
        return found
