"""Our backend and SGLang's own, made as the engine makes them, and the same calls for both."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import sglang_pools as pools
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig, PoolName, PoolTransfer
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

OURS = {"backend_name": "kvstore", "module_path": "kvstore.adapters.sglang", "class_name": "KVStoreHiCache"}


def config(extra: dict[str, Any], **changes: Any) -> HiCacheStorageConfig:
    """One rank of one, but for the changes."""
    one = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
    own = {"is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": False, "model_name": "o/m"}
    return HiCacheStorageConfig(**{**one, **own, "extra_config": extra, **changes})


def ours(place: str | Path, pool: Any, more: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Ours in a directory, or behind a socket ("unix:..."), with a pool."""
    side = {"socket": place} if str(place).startswith("unix:") else {"dir": str(place), "host": "8MiB", "disk": "64MiB"}
    made = StorageBackendFactory.create_backend("dynamic", config(OURS | side | (more or {}), **changes), pool)
    return registered(made, pool)


def theirs(place: str | Path, pool: Any, **changes: Any) -> Any:
    """``HiCacheFile`` in a directory, with a pool."""
    return registered(HiCacheFile(config({"file_storage_path": str(place)}, **changes)), pool)


def registered(backend: Any, pool: Any) -> Any:
    """As SGLang's controllers register the pool of keys and values."""
    backend.register_mem_pool_host(pool)
    backend.register_mem_host_pool_v2(pool, PoolName.KV)
    backend.on_host_pools_registered()
    return backend


def names(count: int, seed: int = 0) -> list[str]:
    """Hashes of pages."""
    return [sha256(f"{seed} {number}".encode()).hexdigest() for number in range(count)]


def transfer(pool: Any, keys: Sequence[str], pages: Sequence[int], name: Any = PoolName.KV) -> PoolTransfer:
    """Pages of a pool, and where they lie."""
    return PoolTransfer(name=name, host_indices=pools.slots(pool, list(pages)), keys=list(keys))
