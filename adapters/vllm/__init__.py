"""The store behind vLLM: ``--kv-transfer-config`` names ``KVStoreConnector`` and this module, nothing is registered.

See docs/engines.md for a command to start from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.adapters.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> object:
    # Lazy, so that naming this package costs no import of vLLM.
    if name == "KVStoreConnector":
        from kvstore.adapters.vllm.connector import KVStoreConnector

        return KVStoreConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
