"""SGLang's storage backend, but for its base class: every call that the engine makes, and what it is answered.

Calls come from SGLang's own threads for prefetching and for backups, several at a time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.adapters.sglang.form import Ends, Form, Tensors, form_of
from kvstore.adapters.sglang.guard import Guard
from kvstore.adapters.sglang.hits import named, restorable
from kvstore.adapters.sglang.identity import Place, namespace, owner
from kvstore.adapters.sglang.options import Options
from kvstore.adapters.sglang.pages import Pages

KV = "kv"


class Backend:
    """One process's way to the store. Only the constructor and the registration of pools raise (``BadInput``)."""

    def __init__(self, config: Any, words: Mapping[str, str]) -> None:
        """``config``: SGLang's ``HiCacheStorageConfig``. ``words``: what else pages depend on, by name."""
        self._options, self._words = Options.of(config.extra_config), dict(words)
        self._place, self._model = Place.of(config), config.model_name or ""
        self._owner = owner(self._model)
        self._pools: dict[str, tuple[Form, Pages]] = {}
        self._guard, self._lock = Guard(), threading.Lock()  # the lock guards the fields below
        self._counts: Counter[str] = Counter()
        self._rates: dict[str, list[tuple[int, float]]] = {"read": [], "written": []}  # pages and GB/s of each call
        self.measures = bool(config.enable_storage_metrics)
        self._store = self._options.opened(max(self._place.processes, config.dp_rank + 1))

    def close(self) -> None:
        """Writes what is left to write, and lets go of the store. Again is no error."""
        self._guard.answer("close", None, self._store.close)

    # -- pools ---------------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of keys and values."""
        self.mem_pool_host = mem_pool_host
        self._register(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A pool by its name."""
        self._register(host_pool, named(host_pool_name))

    def on_host_pools_registered(self) -> None:
        """All are there; each is ready since it was registered."""

    def _register(self, pool: Any, name: str) -> None:
        form, options = form_of(pool), self._options
        space = namespace(self._model, name, self._place, self._words | form.words, options.tag, options.tenant)
        self._pools[name] = form, Pages(self._store, space, form.size, self._owner, options.timeout)

    def _pages(self, name: str) -> tuple[Form, Pages]:
        if name not in self._pools:
            raise LookupError(f"no pool {name!r} was registered")
        return self._pools[name]

    # -- what is there -------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page is stored."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many pages are stored before the first that is not."""
        return self._guard.answer("batch_exists", 0, lambda: self._leading(keys))

    def _leading(self, keys: Sequence[str]) -> int:
        found = self._pages(KV)[1].leading(keys)
        self._count(asked_pages=len(keys), found_pages=found)
        return found

    def found(self, keys: Sequence[str], transfers: Sequence[Any] | None) -> tuple[int, dict[Any, int], list[int]]:
        """Of ``batch_exists_v2``: leading pages of keys and values, how far each other pool goes, and which lengths of
        the prefix all pools can restore."""
        nothing: tuple[int, dict[Any, int], list[int]] = (0, {}, [])
        return self._guard.answer("batch_exists_v2", nothing, self._found, keys, transfers or ())

    def _found(self, keys: Sequence[str], transfers: Sequence[Any]) -> tuple[int, dict[Any, int], list[int]]:
        kv = self._leading(keys)
        lengths, hits = restorable(keys, kv, transfers, lambda pool, wanted: self._pages(pool)[1].present(wanted))
        return kv, hits, lengths

    # -- pages in pools ------------------------------------------------------------------------------------------

    def batch_get_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Brings pages into the pool of keys and values."""
        return self._in_pool("batch_get_v1", KV, keys, host_indices)

    def batch_set_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Stores pages of the pool of keys and values."""
        return self._in_pool("batch_set_v1", KV, keys, host_indices)

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Brings pages into several pools."""
        return {each.name: self._transfer("batch_get_v2", each) for each in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Stores pages of several pools."""
        return {each.name: self._transfer("batch_set_v2", each) for each in transfers}

    def _transfer(self, verb: str, transfer: Any) -> list[bool]:
        return self._in_pool(verb, named(transfer.name), transfer.keys or (), transfer.host_indices)

    def _in_pool(self, verb: str, name: str, keys: Sequence[str], indices: Any) -> list[bool]:
        return self._guard.answer(verb, [False] * len(keys), self._moved, verb, name, keys, indices)

    def _moved(self, verb: str, name: str, keys: Sequence[str], indices: Any) -> list[bool]:
        form, pages = self._pages(name)
        if not keys:
            return []
        if indices is None or len(indices) not in (len(keys) * step for step in form.steps):
            slots = 0 if indices is None else len(indices)
            raise ValueError(f"{len(keys)} pages of {name!r} do not lie in {slots} slots")
        return self._timed(verb, pages, keys, form.ends(indices, len(keys)))

    # -- pages in tensors ----------------------------------------------------------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """A page, in the tensor that was given, or else in a new one; None when it is not stored."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """``get`` for each."""
        return self._guard.answer("batch_get", [None] * len(keys), self._got, keys, target_locations)

    def _got(self, keys: Sequence[str], targets: Sequence[Any] | None) -> list[Any]:
        pages = targets if targets is not None else [self.mem_pool_host.get_dummy_flat_data_page() for _ in keys]
        done = self._in_tensors("batch_get", keys, pages)
        return [page if good else None for page, good in zip(pages, done, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Stores a page; True, too, when it is stored already."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """``set`` for each; whether all are stored."""
        return self._guard.answer("batch_set", False, lambda: all(self._in_tensors("batch_set", keys, values)))

    def _in_tensors(self, verb: str, keys: Sequence[str], tensors: Sequence[Any]) -> list[bool]:
        form, pages = self._pages(KV)
        fit = [place for place, tensor in enumerate(tensors[: len(keys)]) if Tensors.fit(form, tensor)]
        if len(fit) < len(keys):
            self._guard.note(f"{verb}: shape", "a tensor is no flat page of the pool that is registered")
        ends = Tensors([tensors[place] for place in fit])
        good = dict(zip(fit, self._timed(verb, pages, [keys[place] for place in fit], ends), strict=True))
        return [good.get(place, False) for place in range(len(keys))]

    # -- the rest ------------------------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Erases every page of this model and tenant; False when that fails, or is not done in time and goes on."""
        over, erased = threading.Event(), list[bool]()

        def erase() -> None:
            erased.append(self._guard.answer("clear", False, self._erased))
            over.set()

        threading.Thread(target=erase, name="kvstore-clear", daemon=True).start()
        return over.wait(self._options.timeout) and erased == [True]

    def _erased(self) -> bool:
        self._store.forget(owner=self._owner, tenant=self._options.tenant)
        return True

    @property
    def counts(self) -> dict[str, int]:
        """Pages that were asked for and found, read and written, or could not be; and what went wrong, by kind."""
        with self._lock:
            return dict(self._counts) | self._guard.counts

    def rates(self) -> dict[str, list[tuple[int, float]]]:
        """Of each call since this was asked last, if SGLang wants metrics: pages "read" or "written", and GB/s."""
        with self._lock:
            rates, self._rates = self._rates, {"read": [], "written": []}
        return rates

    def _timed(self, verb: str, pages: Pages, keys: Sequence[str], ends: Ends) -> list[bool]:
        """Pages come or go, and are counted."""
        kind, move = ("read", pages.read) if "get" in verb else ("written", pages.write)
        begin = time.perf_counter()
        done = move(keys, ends)
        seconds, good = max(time.perf_counter() - begin, 1e-9), sum(done)
        self._count(
            **{f"{kind}_pages": good, f"{kind}_bytes": good * pages.size, f"not_{kind}_pages": len(keys) - good}
        )
        if self.measures and good:
            with self._lock:
                self._rates[kind].append((good, good * pages.size / seconds / 1e9))
        return done

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)
