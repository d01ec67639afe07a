"""``HiCacheStorage`` of SGLang, on a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

try:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult
except ImportError as error:
    raise ImportError(
        f"KVStoreHiCache is a part of SGLang, which cannot be imported ({error}); install sglang>=0.5.23 in the "
        "environment that serves, and kvstore-llm beside it"
    ) from error

from kvstore.adapters.sglang.backend import Backend


class KVStoreHiCache(Backend, HiCacheStorage):
    """What SGLang makes of ``--hicache-storage-backend dynamic``, one in each of its processes."""

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        """``kwargs``: what SGLang has beside; nothing of it is needed. Raises ``BadInput``."""
        super().__init__(storage_config, {"kv_cache_dtype": _kv_cache_dtype()})

    def batch_exists_v2(
        self, keys: Sequence[str], pool_transfers: Sequence[Any] | None = None, extra_info: Any = None
    ) -> Any:
        """How long a prefix all pools can restore, and which shorter ones."""
        kv, hits, lengths = self.found(keys, pool_transfers)
        return PoolTransferResult(max(lengths, default=0), ({PoolName.KV: kv} if kv else {}) | hits, lengths)

    def get_stats(self) -> Any:
        """What was moved since it was asked last, for SGLang's own metrics; None without them."""
        if not self.measures:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        rates = self.rates()
        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in rates["read"]],
            prefetch_bandwidth=[speed for _, speed in rates["read"]],
            backup_pgs=[pages for pages, _ in rates["written"]],
            backup_bandwidth=[speed for _, speed in rates["written"]],
        )


def _kv_cache_dtype() -> str:
    """Two kinds of 8-bit floats lie in pools of plain bytes: the server knows which they are."""
    from sglang.srt.runtime_context import get_model

    try:
        return str(get_model().kv_cache_dtype)
    except (AttributeError, LookupError, RuntimeError, ValueError):
        return ""  # no server
