"""How a host pool's pages lie in memory, and their way into and out of the store's memory: one copy each way.

*Flat* pages come as the pool gives them, in one piece (``get_data_page``, ``set_from_flat_data_page``). Pools that
cannot (split keys and values, widths that differ) say where the *parts* of a page are (``get_page_buffer_meta``).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvstore.errors import BadInput

# What else the bytes of a page depend on, where a pool has it.
SHAPE = ["layer_num", "target_layer_num", "start_layer", "end_layer", "head_num", "head_group_num", "head_dim"]
SHAPE += ["v_head_dim", "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim", "item_bytes", "page_size", "size_per_token"]
SHAPE += ["storage_format_tag"]
CANNOT = (AttributeError, RuntimeError, TypeError, ValueError)
NOT_YET = (AssertionError, LookupError)  # pages that lie nowhere before they are in use


class Ends(Protocol):
    """The pages of one call, by their place in it: where bytes come from, or go to."""

    def bring(self, place: int, address: int) -> None:
        """A page's bytes are at ``address``: copies them to where they belong."""

    def take(self, place: int, address: int) -> None:
        """Copies a page's bytes to ``address``."""


class Form(Protocol):
    """How pages of one pool lie."""

    size: int  # bytes of a page
    steps: set[int]  # slots of a page: what is there, and what it stands for where ranks share it out
    words: dict[str, str]  # for the fingerprint

    def ends(self, indices: Any, count: int) -> Ends:
        """``count`` pages of the pool: the tensor has the slots of each, one page behind the other."""


def form_of(pool: Any) -> Form:
    """Raises ``BadInput`` for a pool whose pages can be had in neither way."""
    try:
        return Flat(pool)
    except CANNOT:
        pass
    try:
        return Parts(pool)
    except (*CANNOT, *NOT_YET) as error:
        raise BadInput(
            f"pages of {type(pool).__name__} with layout {pool.layout!r} cannot be stored ({error}); "
            "start SGLang with --hicache-mem-layout page_first"
        ) from error


class Flat:
    """Pages in one piece."""

    def __init__(self, pool: Any) -> None:
        page = pool.get_dummy_flat_data_page()
        self._pool, self.dtype, self.numel, self.steps = pool, page.dtype, page.numel(), _steps(pool)
        self.size = page.numel() * page.element_size()
        self.words = _words(pool) | {"page": f"flat {_name(page.dtype)} {page.numel()}"}
        self._as_it_is = False
        with contextlib.suppress(*NOT_YET):
            self._as_it_is = self._same(pool.get_data_page(0, flat=False), pool.get_data_page(0, flat=True))

    def _same(self, page: Any, flat: Any) -> bool:
        """Whether a page that nobody has made flat, which may cost a copy, is the same bytes in the same order."""
        if (flat.dtype, flat.numel()) != (self.dtype, self.numel):
            raise ValueError("its pages are not as long as it says")
        raw = [each.reshape(-1).view(torch.uint8) for each in (page, flat)]
        return page.dtype == self.dtype and torch.equal(*raw)

    def ends(self, indices: Any, count: int) -> Ends:
        """See ``Form``."""
        step = len(indices) // count
        return FlatEnds(self, indices[::step].tolist())

    def set(self, index: int, address: int) -> None:
        """A page of the pool from memory."""
        self._pool.set_from_flat_data_page(index, memory(address, self.dtype, self.numel))

    def get(self, index: int, address: int) -> None:
        """A page of the pool to memory."""
        page = self._pool.get_data_page(index, flat=not self._as_it_is)
        if (page.dtype, page.numel()) != (self.dtype, self.numel):
            raise ValueError(f"slot {index} is no page of {type(self._pool).__name__}")
        memory(address, self.dtype, self.numel).view(page.shape).copy_(page)


class FlatEnds:
    """Pages of a pool, in one piece each."""

    def __init__(self, form: Flat, indices: Sequence[int]) -> None:
        self._form, self._indices = form, indices

    def bring(self, place: int, address: int) -> None:
        """See ``Ends``."""
        if self._form.size:  # else SGLang keeps the keys and values in other pools
            self._form.set(self._indices[place], address)

    def take(self, place: int, address: int) -> None:
        """See ``Ends``."""
        if self._form.size:
            self._form.get(self._indices[place], address)


class Parts:
    """Pages in parts, each at an address of its own."""

    def __init__(self, pool: Any) -> None:
        self._pool, self.steps = pool, _steps(pool)
        _, sizes = pool.get_page_buffer_meta(torch.arange(max(self.steps)))
        self.sizes, self.size = list(sizes), sum(sizes)
        if not self.size:
            raise ValueError("its pages hold nothing")
        self.words = _words(pool) | {"page": f"parts {self.sizes}"}

    def ends(self, indices: Any, count: int) -> Ends:
        """See ``Form``."""
        addresses, sizes = self._pool.get_page_buffer_meta(indices)
        if list(sizes) != self.sizes * count or len(addresses) != len(sizes):
            raise ValueError(f"{count} pages are not in the parts that one is in")
        return PartEnds(self, addresses)


class PartEnds:
    """Pages of a pool, in parts."""

    def __init__(self, form: Parts, addresses: Sequence[int]) -> None:
        self._sizes, self._addresses = form.sizes, addresses

    def bring(self, place: int, address: int) -> None:
        """See ``Ends``."""
        for part, size in enumerate(self._sizes):
            ctypes.memmove(self._addresses[place * len(self._sizes) + part], address, size)
            address += size

    def take(self, place: int, address: int) -> None:
        """See ``Ends``."""
        for part, size in enumerate(self._sizes):
            ctypes.memmove(address, self._addresses[place * len(self._sizes) + part], size)
            address += size


class Tensors:
    """Pages that SGLang holds outside of the pool, one tensor each, as its older calls have them."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._tensors = tensors

    @staticmethod
    def fit(form: Form, tensor: Any) -> bool:
        """Whether it is a page of this form."""
        if not isinstance(form, Flat) or not isinstance(tensor, torch.Tensor):
            return False
        return (tensor.dtype, tensor.numel(), tensor.device.type) == (form.dtype, form.numel, "cpu")

    def bring(self, place: int, address: int) -> None:
        """See ``Ends``."""
        page = self._tensors[place]
        if page.numel():
            page.copy_(memory(address, page.dtype, page.numel()).view(page.shape))

    def take(self, place: int, address: int) -> None:
        """See ``Ends``."""
        page = self._tensors[place]
        if page.numel():
            memory(address, page.dtype, page.numel()).view(page.shape).copy_(page)


def memory(address: int, dtype: Any, numel: int) -> Any:
    """Memory as a tensor; nothing keeps it but the caller."""
    size = numel * torch.empty((), dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


def _steps(pool: Any) -> set[int]:
    page = getattr(pool, "page_size", 1) or 1
    return {page, getattr(pool, "logical_page_size", page)}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _words(pool: Any) -> dict[str, str]:
    """What pages of a pool are, by name."""
    words = {"class": type(pool).__name__, "layout": str(pool.layout), "dtype": _name(pool.dtype)}
    shape = {name: getattr(pool, name, None) for name in SHAPE}
    return words | {name: str(value) for name, value in shape.items() if isinstance(value, int | str)}
