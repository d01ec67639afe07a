"""KV reuse for SGLang: the pages of its hierarchical cache, in a store.

A dynamic storage backend, which SGLang finds by these names:

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "kvstore",
        "module_path": "kvstore.adapters.sglang", "class_name": "KVStoreHiCache", "dir": "cache-dir"}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.adapters.sglang.hicache import KVStoreHiCache

__all__ = ["KVStoreHiCache"]


def __getattr__(name: str) -> object:
    # Lazy: SGLang takes seconds to import, and what needs none of it is tested without it.
    if name == "KVStoreHiCache":
        from kvstore.adapters.sglang.hicache import KVStoreHiCache

        return KVStoreHiCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
