"""What SGLang hands to a storage backend, in a few lines: its configuration, and host pools with its pools' methods."""

from __future__ import annotations

from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import torch

from kvstore.adapters.sglang.backend import Backend

PAGE, LAYERS, WIDTH, PAGES = 4, 3, 8, 300


def config(extra: dict[str, Any], **changes: Any) -> Any:
    """A ``HiCacheStorageConfig`` of one rank."""
    one = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
    rest = {"dcp_rank": 0, "dcp_size": 1, "logical_page_size": None, "is_mla_model": False, "dp_rank": 0}
    own = {"enable_storage_metrics": True, "model_name": "org/model", "extra_config": extra}
    return SimpleNamespace(**one | rest | own | changes)


def keys(count: int, seed: int = 0) -> list[str]:
    """Hashes of pages, as SGLang writes them."""
    return [sha256(f"{seed} {number}".encode()).hexdigest() for number in range(count)]


def pages(first: int, count: int) -> Any:
    """The slots of some pages in a row."""
    return torch.arange(first * PAGE, (first + count) * PAGE)


class FlatPool:
    """``layer_first`` or ``page_first``; its pages come in one piece."""

    page_size = PAGE

    def __init__(
        self, layout: str = "layer_first", dtype: Any = torch.bfloat16, width: int = WIDTH, count: int = PAGES
    ) -> None:
        self.layout, self.dtype, self.kv_cache_dim, self.layer_num = layout, dtype, width, LAYERS
        shape = (LAYERS, count * PAGE, width) if layout == "layer_first" else (count * PAGE, LAYERS, width)
        self.buffer = torch.zeros(shape, dtype=dtype)

    def _page(self, index: int) -> Any:
        part = slice(index, index + PAGE)
        return self.buffer[:, part] if self.layout == "layer_first" else self.buffer[part]

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        return self._page(index).flatten() if flat else self._page(index)

    def get_dummy_flat_data_page(self) -> Any:
        return torch.zeros(LAYERS * PAGE * self.kv_cache_dim, dtype=self.dtype)

    def set_from_flat_data_page(self, index: int, data: Any) -> None:
        page = self._page(index)
        page.copy_(data.reshape(page.shape))

    def draw(self, seed: int) -> None:
        """Other bytes in every page."""
        draw = torch.Generator().manual_seed(seed)
        raw = self.buffer.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=draw, dtype=torch.uint8))

    def bytes_of(self, first: int, count: int) -> bytes:
        """Those of some pages in a row."""
        return b"".join(
            self.get_data_page((first + page) * PAGE).view(torch.uint8).numpy().tobytes() for page in range(count)
        )


class PartsPool(FlatPool):
    """Keys and values in two places, and no way to have them in one piece."""

    def __init__(self) -> None:
        super().__init__("page_first")
        self.values = torch.zeros(PAGES * PAGE, 5, dtype=self.dtype)

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        raise NotImplementedError("no flat pages")

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        pointers, sizes = list[int](), list[int]()
        for index in indices[::PAGE].tolist():
            for tensor in (self.buffer, self.values):
                pointers.append(tensor[index].data_ptr())
                sizes.append(tensor[index : index + PAGE].nbytes)
        return pointers, sizes


class LatePool(FlatPool):
    """Its pages lie nowhere before they are in use."""

    used: tuple[int, ...] = ()

    def _page(self, index: int) -> Any:
        assert index // PAGE in self.used, f"page {index // PAGE} is not in use"
        return super()._page(index)


class SealedPool(FlatPool):
    """Its pages can be had in no way."""

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        raise NotImplementedError("no pages at all")


def backend(extra: dict[str, Any], pool: Any = None, stored: str = "auto", **changes: Any) -> Backend:
    """A backend with a pool, without SGLang. ``stored``: how the server stores keys and values."""
    made = Backend(config(extra, **changes), {"kv_cache_dtype": stored})
    made.register_mem_pool_host(FlatPool() if pool is None else pool)
    return made
