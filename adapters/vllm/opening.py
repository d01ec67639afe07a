"""The store of an engine: one for both halves of the connector in a process, whichever comes first."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import kvstore
from kvstore.adapters.vllm.options import Options
from kvstore.errors import BadInput, StoreBusy
from kvstore.store import Store


@dataclass(slots=True)
class _Open:
    store: Store
    users: int


_open: dict[str, _Open] = {}  # by engine; guarded by _lock
_lock = threading.Lock()


def open_store(engine: str, options: Options, parallel: Any) -> Store:
    """The engine's store; to be closed with ``close_store``. Raises ``BadInput`` for what cannot be had."""
    apart = parallel.world_size > 1 or parallel.distributed_executor_backend != "uni"
    if apart and options.socket is None:
        raise BadInput(
            "this engine's workers are processes of their own, which cannot share a store of one process; start "
            '`kvstore serve --socket PATH`, and give {"socket": "unix:PATH"} in kv_connector_extra_config'
        )
    with _lock:
        found = _open.get(engine)
        if found is None:
            found = _open[engine] = _Open(_new(options), 0)
        found.users += 1
        return found.store


def close_store(engine: str) -> None:
    """One half is done with it; the last closes it, which writes what is only in memory."""
    with _lock:
        found = _open[engine]
        found.users -= 1
        if found.users:
            return
        del _open[engine]
    found.store.close()


def stores() -> list[Store]:
    """Those of the engines of this process."""
    with _lock:
        return [found.store for found in _open.values()]


def _new(options: Options) -> Store:
    if options.socket is not None:
        return kvstore.connect(options.socket, timeout=options.timeout, token=options.token)
    try:
        return kvstore.open(
            options.dir,
            host=options.host,
            disk=options.disk,
            redis=options.redis,
            encryption=options.encryption,
            device=0 if _on_cuda() else None,
        )
    except StoreBusy as error:
        raise BadInput(
            f"{error}; engines that share a directory need the daemon: start `kvstore serve --dir {options.dir}`, and "
            f'give {{"socket": "unix:{options.dir}/kvstore.sock"}} in kv_connector_extra_config'
        ) from None


def _on_cuda() -> bool:
    """Whether host memory should be pinned."""
    import torch

    return torch.cuda.is_available()
