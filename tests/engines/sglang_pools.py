"""SGLang's own host pools, small and on the CPU, filled with bytes that tell where they belong."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")


class _Name(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Absent(types.ModuleType):
    """A module of names that mean nothing: pools never touch an image."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


def _without_images() -> None:
    """SGLang's memory pools import its image models, and those torchvision, which has no build for every torch."""
    from transformers.utils import is_torchvision_available

    if importlib.util.find_spec("torchvision") is not None or is_torchvision_available():
        return
    for name in ("torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.functional"):
        module = _Absent(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module


_without_images()

with warnings.catch_warnings():  # of accelerators that are not here
    warnings.simplefilter("ignore")
    from sglang.srt.mem_cache.device_pool_info import (
        KVBufferLayout,
        KVBuffers,
        MambaStateBufferInfo,
        MHABufferInfo,
        MLABufferInfo,
        MLASplitBuffers,
    )
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
    from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
    from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

CPU = torch.device("cpu")
LAYERS, PAGE, HEADS, DIM = 3, 4, 2, 8
PAGES = 24  # of a pool


def mha(layout: str, dtype: Any = torch.bfloat16, heads: int = HEADS, value_dim: int | None = None) -> Any:
    """Keys and values of ``HEADS`` heads; of two widths where ``value_dim`` says so."""
    tokens, value_dim = PAGE * 2, value_dim or DIM
    k = tuple(torch.zeros(tokens, heads, DIM, dtype=dtype) for _ in range(LAYERS))
    v = tuple(torch.zeros(tokens, heads, value_dim, dtype=dtype) for _ in range(LAYERS))
    tables = [torch.tensor([each.data_ptr() for each in side], dtype=torch.uint64) for side in (k, v)]
    buffers = KVBuffers(k=k, v=v, k_data_ptrs=tables[0], v_data_ptrs=tables[1], layout=KVBufferLayout.NHD)
    info = MHABufferInfo(
        buffers=buffers, page_size=PAGE, head_num=heads, head_dim=DIM, v_head_dim=value_dim, dtype=dtype, device=CPU
    )
    made = MHATokenToKVPoolHost if value_dim == DIM else AsymmetricMHATokenToKVPoolHost
    sizes = {"device_capacity_tokens": tokens, "start_layer": 0, "end_layer": LAYERS}
    with host_memory_budget_scope(1 << 30):
        return made(info, 0, 0, PAGE, layout, False, host_token_capacity=PAGES * PAGE, **sizes)


def mla(layout: str, dtype: Any = torch.bfloat16, dcp: int = 1) -> Any:
    """Latent keys and values; split in two where the layout says so, and over ``dcp`` ranks, of which it is the
    first."""
    tokens, rank, rope = PAGE * 2, 16, 8
    rows: Any = tuple(torch.zeros(tokens, 1, rank + rope, dtype=dtype) for _ in range(LAYERS))
    table = torch.tensor([each.data_ptr() for each in rows], dtype=torch.uint64)
    if layout == "page_first_kv_split":
        nothing = {"k": None, "v": None, "index_k": None, "index_scales": None, "index_layer_indices": ()}
        rows = MLASplitBuffers(k_width=rank, v_width=rope, index_width=0, **nothing)
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=table,
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        kv_cache_dim=rank + rope,
        dtype=dtype,
        device=CPU,
    )
    sizes = {"device_capacity_tokens": tokens, "start_layer": 0, "end_layer": LAYERS, "target_layer_num": LAYERS}
    more = {"host_token_capacity": PAGES * PAGE, "dcp_size": dcp}
    with host_memory_budget_scope(1 << 30):
        return MLATokenToKVPoolHost(info, 0, 0, PAGE * dcp, layout, False, **sizes, **more)


def mamba() -> Any:
    """State of Mamba layers: one page is one checkpoint."""
    info = MambaStateBufferInfo(
        temporal=torch.zeros(LAYERS, PAGES, 2, 4, dtype=torch.float32),
        conv=(torch.zeros(LAYERS, PAGES, 6, dtype=torch.bfloat16),),
    )
    with host_memory_budget_scope(1 << 30):
        return MambaPoolHost(info, 1.0, 0, device_capacity=PAGES, pin_memory=False, layout="page_first")


def logical() -> Any:
    """A pool of slots without bytes."""
    return LogicalHostPool(PAGES * PAGE, PAGE)


def buffers(pool: Any) -> list[Any]:
    """All tensors in which a pool holds bytes."""
    names = ("kv_buffer", "k_buffer", "v_buffer", "temporal_buffer", "conv_buffer")
    found: dict[int, Any] = {}
    for name in names:
        held = getattr(pool, name, None)
        for tensor in held if isinstance(held, list | tuple) else [held]:
            if tensor is not None and tensor.numel():
                found.setdefault(tensor.data_ptr(), tensor)
    return list(found.values())


def fill(pool: Any, seed: int) -> None:
    """Random bytes everywhere."""
    draw = torch.Generator().manual_seed(seed)
    for tensor in buffers(pool):
        raw = tensor.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=draw, dtype=torch.uint8))


def content(pool: Any) -> list[bytes]:
    """All bytes of a pool."""
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in buffers(pool)]


def slots(pool: Any, pages: list[int]) -> Any:
    """The slots of these pages, as SGLang names them."""
    step = getattr(pool, "logical_page_size", pool.page_size)
    return torch.tensor([page * step + slot for page in pages for slot in range(step)], dtype=torch.int64)
