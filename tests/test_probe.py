"""Probes: the order of any honest engine's pages is learned, and one that does anything else is told."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from paged import order
from transfers import PATIENCE

from kvstore.errors import BadInput, Unsupported
from kvstore.tensors.pages import TAKE_KERNEL, put_kernel
from kvstore.tensors.paging import COLUMNS, ROWS, SCATTERED, ZIPPED
from kvstore.tensors.probe import Write, probe

PAGE, HEADS, DIM = 32, 3, 16
Change = Callable[[torch.Tensor], torch.Tensor]


def engine(names: tuple[str, str], change: Change = torch.clone, swap: str = "") -> Write:
    """Writes pages of an order to a cache [pages, heads, page tokens, 2 * dim] whose shape does not tell.

    ``change``: what it does to keys. ``swap``: the elements in places of their own, by "head" or by "token and dim".
    """

    def write(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        flat = cache.view(len(cache), HEADS, 2, PAGE * DIM)
        for i, (name, given) in enumerate(zip(names, (change(keys), values), strict=True)):
            tokens, dims = (torch.from_numpy(table) for table in even(name))
            for head in range(HEADS):
                places = tokens[slots % PAGE][:, None] + dims
                if swap == "head" and head == 1:
                    places = tokens[slots % PAGE][:, None] + dims.flip(0)
                if swap == "token and dim":
                    places = (slots % PAGE * DIM)[:, None] + (torch.arange(DIM) ^ (slots % 2)[:, None])
                flat[slots[:, None] // PAGE, head, i, places] = given[:, head]

    return write


def even(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of tokens and dims in elements, without gaps."""
    if name in ("rows", "columns"):
        return order(name, PAGE, DIM, 1, random.Random(1))
    t, d = np.arange(PAGE), np.arange(DIM)
    if name == "packed keys":
        return t // 16 * 16 * DIM + t % 16 * 2, d // 2 * 32 + d % 2
    if name == "packed values":
        return t // 2 * 32 + t % 2, d * 2
    return np.roll(t, 3) * DIM, np.roll(d, 5)  # none


def scratch(dtype: torch.dtype = torch.bfloat16, pages: int = 3) -> torch.Tensor:
    return torch.zeros(pages, HEADS, PAGE, 2 * DIM, dtype=dtype)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("names", [("columns", "rows"), ("packed keys", "packed values"), ("none", "columns")], ids=str)
def test_orders_are_learned(names: tuple[str, str], dtype: torch.dtype, compiled: bool, seed: int) -> None:
    if compiled:
        for kernel in (TAKE_KERNEL, put_kernel(None, dtype)):
            assert kernel is not None and kernel.wait(PATIENCE) is not None
    form = probe(engine(names), scratch(dtype), PAGE, HEADS, DIM, DIM, seed)
    for grid, name, first in ((form.keys, names[0], 0), (form.values, names[1], PAGE * DIM)):
        tokens, dims = (table * dtype.itemsize for table in even(name))
        assert grid.address == (first * dtype.itemsize) + tokens[0] + dims[0]
        assert (grid.tokens == tokens - tokens[0]).all() and (grid.dims == dims - dims[0]).all()
        assert grid.head_step * HEADS == grid.page_step == HEADS * 2 * PAGE * DIM * dtype.itemsize
    real = scratch(dtype, pages=7)
    pages = form.of(real)
    assert pages.count == 7 and pages.keys.address - form.keys.address == real.data_ptr()
    modes = {"columns": COLUMNS, "rows": ROWS, "packed keys": COLUMNS, "packed values": ZIPPED, "none": SCATTERED}
    if dtype == torch.bfloat16:
        assert (pages.sides[0].mode, pages.sides[3].mode) == tuple(modes[name] for name in names)


def by_shape(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """As GPU engines write [2, pages, page tokens, heads, dim]."""
    for i, given in enumerate((keys, values)):
        cache[i, slots // PAGE, slots % PAGE] = given


def test_strides_that_are_no_shape(seed: int) -> None:
    """Keys and values lie apart by all pages of the real cache, of which the scratch has a few; and heads have gaps."""
    real = torch.zeros(2, 9, PAGE, HEADS, DIM + 4, dtype=torch.float32)[..., :DIM]
    form = probe(
        by_shape,
        torch.zeros_like(real)[:, :2].as_strided((2, 2, *real.shape[2:]), real.stride()),
        PAGE,
        HEADS,
        DIM,
        DIM,
        seed,
    )
    pages = form.of(real)
    assert pages.count == 9
    keys, values = pages.tensors
    assert keys.data_ptr() == real[0].data_ptr() and values.data_ptr() == real[1].data_ptr()
    assert keys.stride() == values.stride() == real[0].stride() and keys.shape == real[0].shape


def test_keys_alone(seed: int) -> None:
    """A latent has no values."""

    def write(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        assert values.numel() == 0
        cache[slots // PAGE, slots % PAGE] = keys[:, 0]

    form = probe(write, torch.zeros(2, PAGE, 36), PAGE, 1, 36, 0, seed)
    assert form.of(torch.zeros(5, PAGE, 36)).sides[0].row == 144


def one_nan(keys: torch.Tensor) -> torch.Tensor:
    """One NaN for all, as arithmetic makes of them."""
    return torch.where(keys.isnan(), torch.tensor(float("nan"), dtype=keys.dtype), keys)


def half_of_it(keys: torch.Tensor) -> torch.Tensor:
    return keys / 2


def coarse(keys: torch.Tensor) -> torch.Tensor:
    """Small whole numbers survive, others lose a bit."""
    return (keys.view(torch.int16) & -2).view(keys.dtype)


def test_an_engine_that_makes_one_nan_of_all_is_served(seed: int) -> None:
    probe(engine(("columns", "rows"), one_nan), scratch(), PAGE, HEADS, DIM, DIM, seed)


def clears(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Whole pages, before it writes some of their slots."""
    cache[slots // PAGE] = 0
    engine(("columns", "rows"))(keys, values, cache, slots)


def forgets(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    engine(("columns", "rows"))(keys[1:], values[1:], cache, slots[1:])


def refuses(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    raise RuntimeError("no such keys\nand a trace")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (engine(("rows", "rows"), swap="head"), "no sum of steps and tables: page 0, token 0, head 1, dim 1"),
        (engine(("rows", "rows"), swap="token and dim"), "no sum of steps and tables: page 0, token 1, head 0, dim 1"),
        (engine(("columns", "rows"), half_of_it), "changes what it writes"),
        (engine(("columns", "rows"), coarse), "is not what it was given"),
        (clears, "changes more of its cache"),
        (forgets, "96 of 9216 elements"),
        (refuses, "refuses to write keys of torch.bfloat16: no such keys"),
    ],
)
def test_other_engines_are_told(write: Write, said: str, seed: int) -> None:
    with pytest.raises(Unsupported, match=said) as told:
        probe(write, scratch(), PAGE, HEADS, DIM, DIM, seed)
    assert "\n" not in str(told.value)


def test_caches_that_are_no_pages_are_told(seed: int) -> None:
    write = engine(("columns", "rows"))
    for cache in (scratch(pages=1), torch.zeros(3, HEADS, PAGE, 2 * DIM + 1), scratch(torch.float64)):
        with pytest.raises(Unsupported, match="is not two or more pages"):
            probe(write, cache, PAGE, HEADS, DIM, DIM, seed)
    form = probe(write, scratch(), PAGE, HEADS, DIM, DIM, seed)
    for other in (scratch(torch.float16), scratch()[:, :2], torch.zeros(3, HEADS, DIM, 2 * PAGE, dtype=torch.bfloat16)):
        with pytest.raises(BadInput, match="is unlike"):
            form.of(other)
