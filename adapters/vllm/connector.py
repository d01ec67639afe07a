"""``KVStoreConnector``: the store behind vLLM, as vLLM calls it. Everything it does is done by one of its halves."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore.adapters.vllm.model import describe
from kvstore.adapters.vllm.opening import close_store, open_store
from kvstore.adapters.vllm.options import LAYERS, Options
from kvstore.adapters.vllm.scheduler import SchedulerHalf
from kvstore.adapters.vllm.step import Step
from kvstore.adapters.vllm.worker import WorkerHalf
from kvstore.errors import Unsupported

log = logging.getLogger("kvstore")

SOURCES = {"device": CacheHitSource.DEVICE, "host": CacheHitSource.HOST, "disk": CacheHitSource.DISK}
SOURCES |= {"remote": CacheHitSource.EXTERNAL_UNSPECIFIED}


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Made by vLLM, once for its scheduler and once for each worker. Raises ``BadInput`` for a bad configuration."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        self._options = Options.read(transfer.kv_connector_extra_config)
        # What a load does not bring is computed: a request never fails for it.
        transfer.kv_load_failure_policy = "recompute"
        self._engine = str(transfer.engine_id)
        self._store = open_store(self._engine, self._options, parallel)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._closed = False
        try:
            model = describe(vllm_config, kv_cache_config, self._options, self._store)
        except Unsupported as error:
            self._refuse(error)
            return
        if role == KVConnectorRole.SCHEDULER:
            by_priority = vllm_config.scheduler_config.policy == "priority"
            self._scheduler = SchedulerHalf(model, self._store, self._options, by_priority)
        else:
            rank = parallel.rank % parallel.tensor_parallel_size
            self._worker = WorkerHalf(model, self._store, self._options, rank)

    def _refuse(self, error: Unsupported) -> None:
        """Stops the start, or goes on without, as the configuration says."""
        if self._options.required:
            self.shutdown()
            raise error
        log.warning("nothing is stored or reused: %s", error)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers are waited for in Python, in the mode that does."""
        return extra_config.get("load") == LAYERS

    def shutdown(self) -> None:
        """Ends the threads, and the store with the last half."""
        if self._closed:
            return
        self._closed = True
        for half in (self._worker, self._scheduler):
            if half is not None:
                half.close()
        close_store(self._engine)

    # -- the worker's half --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learns where everything is."""
        if self._worker is None:
            return
        context = self._vllm_config.compilation_config.static_forward_context
        try:
            self._worker.register(kv_caches, context, self._vllm_config.model_config)
        except Unsupported as error:
            self._worker.close()
            self._worker = None
            self._refuse(error)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before the step's pages are written."""
        if self._worker is not None and isinstance(kv_connector_metadata, Step):
            self._worker.before(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begins the step's loads."""
        if self._worker is not None:
            self._worker.start(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """For loads of the step itself."""
        if self._worker is not None:
            self._worker.layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole blocks are saved, off the forward path."""

    def wait_for_save(self) -> None:
        """Begins the step's saves."""
        if self._worker is not None:
            self._worker.end(self._step())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose pages were read, and requests that were loaded, well or not."""
        return (None, None) if self._worker is None else self._worker.results()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages whose tokens the engine has to compute."""
        return set() if self._worker is None else self._worker.invalid()

    def _step(self) -> Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Step)
        return metadata

    # -- the scheduler's half -----------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Who knows the pages of requests."""
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Any) -> None:
        """A request comes."""
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much of it is stored."""
        return (0, False) if self._scheduler is None else self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """It has pages."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Where it came from, for vLLM's metrics."""
        found: dict[Any, int] = {}
        for tier, tokens in ({} if self._scheduler is None else self._scheduler.by_tier(request)).items():
            found[SOURCES[tier]] = found.get(SOURCES[tier], 0) + tokens
        return found

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What workers are told."""
        return Step() if self._scheduler is None else self._scheduler.step()

    def update_connector_output(self, connector_output: Any) -> None:
        """What workers say."""
        if self._scheduler is not None:
            received = set(connector_output.finished_recving or ())
            self._scheduler.output(received, set(connector_output.invalid_block_ids or ()))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request ends."""
        return (False, None) if self._scheduler is None else self._scheduler.finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, as an engine with the hybrid allocator calls it."""
        return self.request_finished(request, block_ids[0] if block_ids else [])

    def reset_cache(self) -> bool | None:
        """The weights are other ones from now on."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return None
