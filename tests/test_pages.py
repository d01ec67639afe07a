"""Moves between blocks and pages: any runs, any order of pages, there and back, and nothing else is touched."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import ORDERS, POSITIONS, Cache, Trial, as_bytes, order, same_blocks
from transfers import PATIENCE, Block, Kind, array, tables

import kvstore.tensors.pages
from kvstore.compiled import Compiled
from kvstore.errors import BadInput, Unsupported
from kvstore.tensors.geometry import NO_TURN
from kvstore.tensors.grids import Grid, Pages
from kvstore.tensors.pages import PUT_KERNELS, TAKE_KERNEL, put, put_kernel, take
from kvstore.tensors.paging import SCATTERED, TAKE, ordered
from kvstore.tensors.rope import HALF, INTERLEAVED, Turn
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import transfer

# Turners are as those of transfers, which have all of them tested.
SOME: list[Kind] = [(torch.bfloat16, HALF, False), (torch.bfloat16, HALF, True), (torch.float16, INTERLEAVED, True)]
SOME += [(torch.float32, HALF, True)]
BF16 = SOME[0]


def compile_now(turn: Turn | None, dtype: torch.dtype) -> None:
    """From here on, such moves are done by kernels."""
    kernel = put_kernel(turn, dtype)
    assert kernel is not None and kernel.wait(PATIENCE) is not None
    assert TAKE_KERNEL.wait(PATIENCE) is not None


@pytest.fixture
def stream_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers go past the caches too."""
    monkeypatch.setattr(kvstore.tensors.pages, "STREAM_BYTES", 0)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where numba is missing."""

    def build() -> Any:
        raise ImportError("no numba here")

    for turning in PUT_KERNELS:
        monkeypatch.setitem(PUT_KERNELS, turning, Compiled("a kernel that is missing", build))
    monkeypatch.setattr(kvstore.tensors.pages, "TAKE_KERNEL", Compiled("another", build))
    yield


def there_and_back(trial: Trial) -> None:
    """Into pages, and out of pages that hold anything."""
    made, right = trial.cache(), trial.right()
    put(trial.runs, trial.turn, made.pages, np.array(trial.table, dtype=np.int64))
    assert torch.equal(made.memory, right.memory)
    other = trial.cache()
    other.memory.copy_(torch.randint(0, 256, other.memory.shape, generator=torch.Generator().manual_seed(trial.seed)))
    expected = trial.taken(other)
    take(trial.runs, other.pages, np.array(trial.table, dtype=np.int64))
    assert same_blocks(trial.blocks, expected)


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_any_runs_there_and_back(seed: int) -> None:
    trial = Trial(seed, SOME)
    compile_now(trial.turn, trial.dtype)
    there_and_back(trial)


def test_any_runs_past_the_caches(stream_all: None, seed: int) -> None:
    for number in range(60):
        trial = Trial(seed + number, SOME)
        compile_now(trial.turn, trial.dtype)
        there_and_back(trial)


def test_plain_torch_gives_the_same(without_kernels: None, seed: int) -> None:
    for number in range(40):
        there_and_back(Trial(seed + number))


class Small:
    """One block of four heads and 40 tokens, and room for 48 columns in the pages of two or all of its heads."""

    def __init__(self, seed: int, heads: int = 2, names: tuple[str, str] = ("columns", "rows")) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.turn = Turn(*tables(generator, BF16, POSITIONS, 16), HALF, rounded=False)
        self.block = Block.draw(generator, 4, 40, (32, 32), torch.bfloat16)
        self.block.keys.copy_(torch.randn(self.block.keys.shape, generator=generator))
        self.cache = Cache.draw(names, 5, heads, 16, (32, 32), torch.bfloat16, seed)
        self.canaries = self.cache.memory.clone()
        self.table = np.array([3, 0, 4], dtype=np.int64)

    def put(self, run: tuple[int, int, int, int] = (1, 30, 5, 2), first_head: int = 0) -> torch.Tensor:
        """What the memory is then."""
        put(array([self.block.run(*run)]), self.turn, self.cache.pages, self.table, first_head)
        return self.cache.memory


def test_what_the_tests_here_would_see(seed: int) -> None:
    """A wrong token, position, column, head and page, each planted."""
    compile_now(Small(seed).turn, torch.bfloat16)
    right = Small(seed).put()
    assert torch.equal(Small(seed).put(), right)
    for run in ((2, 30, 5, 2), (1, 30, 6, 2), (1, 30, 5, 3), (1, 29, 5, 2)):
        assert not torch.equal(Small(seed).put(run), right)
    assert not torch.equal(Small(seed).put(first_head=1), right)
    other = Small(seed)
    other.table[1] = 1
    assert not torch.equal(other.put(), right)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
def test_shards_have_their_heads(compiled: bool, seed: int, request: pytest.FixtureRequest) -> None:
    """Two caches of two heads each hold what one of four does."""
    whole, shards = Small(seed, heads=4), [Small(seed), Small(seed)]
    if compiled:
        compile_now(whole.turn, torch.bfloat16)
    else:
        request.getfixturevalue("without_kernels")
    whole.put()
    for number, shard in enumerate(shards):
        shard.put(first_head=2 * number)
    made = []
    for small in (whole, *shards):
        heads = small.cache.pages.heads
        block = Block(*(torch.zeros(heads, 40, 32, dtype=torch.bfloat16) for _ in "kv"))
        take(array([block.run(1, 30, 0, 2)]), small.cache.pages, small.table)
        made.append(block)
    joined = Block(torch.cat((made[1].keys, made[2].keys)), torch.cat((made[1].values, made[2].values)))
    assert same_blocks([made[0]], [joined])
    assert torch.equal(as_bytes(made[0].values[:, 1:31]), as_bytes(whole.block.values[:, 1:31]))
    with pytest.raises(BadInput, match="first head"):
        whole.put(first_head=-1)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
def test_runs_out_of_bounds_are_refused(compiled: bool, seed: int, request: pytest.FixtureRequest) -> None:
    """And then nothing was moved, not even of the runs that are good."""
    small = Small(seed, heads=4)
    if compiled:
        compile_now(small.turn, torch.bfloat16)
    else:
        request.getfixturevalue("without_kernels")
    pages, block, good = small.cache.pages, small.block, (0, 40, 0, 3)
    kept = Block(block.keys.clone(), block.values.clone())
    bad = [(-1, 2, 0, 0), (0, -1, 0, 0), (1, 40, 0, 0), (0, 2, -1, 0), (0, 2, 0, -1), (0, 2, 0, 47), (0, 2, 0, 1 << 40)]
    tables = [small.table] * len(bad) + [np.array([3, page, 4], dtype=np.int64) for page in (-1, 5, 1 << 40)]
    for run, table in zip([*bad, good, good, good], tables, strict=True):
        runs = array([block.run(*good), block.run(*run)])
        for move in (partial(put, runs, small.turn), partial(take, runs)):
            with pytest.raises(BadInput, match="leaves its block"):
                move(pages, table)
    with pytest.raises(BadInput, match="run 1 leaves"):
        put(array([block.run(*good), block.run(0, 2, POSITIONS - 1, 0)]), small.turn, pages, small.table)
    assert torch.equal(small.cache.memory, small.canaries)
    assert same_blocks([block], [kept])
    take(array([block.run(*good)]), pages, small.table)
    assert not same_blocks([block], [kept])


def test_pages_and_tables_that_do_not_fit_are_refused(seed: int) -> None:
    small = Small(seed)
    pages, turn = small.cache.pages, small.turn
    for bad in (
        Turn(turn.cos, turn.sin, HALF, rounded=True),
        Turn(turn.cos, turn.sin[1:], HALF, rounded=False),
        Turn(turn.cos, turn.sin, HALF, rounded=False, first=1),
    ):
        with pytest.raises(BadInput):
            put(array([]), bad, pages, small.table)

    def grids(keys: Grid, values: Grid = pages.values, count: int = 5, dtype: torch.dtype = torch.bfloat16) -> Pages:
        return Pages(keys, values, 2, count, dtype, pages.device, pages.memory)

    grid = pages.keys
    end = len(small.cache.memory)
    for keys in (
        Grid(grid.address - end, grid.page_step, grid.head_step, grid.tokens, grid.dims),
        Grid(grid.address + end, grid.page_step, grid.head_step, grid.tokens, grid.dims),
        Grid(grid.address, grid.page_step, grid.head_step, grid.tokens[:-1], grid.dims),
        Grid(grid.address, grid.page_step, grid.head_step, grid.tokens, grid.dims + 2),
        Grid(grid.address, grid.page_step, grid.head_step, grid.tokens.astype(np.int32), grid.dims),
        Grid(grid.address, grid.page_step + 1, grid.head_step, grid.tokens, grid.dims),
    ):
        with pytest.raises(BadInput):
            grids(keys)
    with pytest.raises(BadInput, match="inside the memory"):
        grids(grid, count=6 + end // grid.page_step)
    with pytest.raises(Unsupported, match="float64"):
        grids(grid, dtype=torch.float64)
    one, two = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 1, 8)
    with pytest.raises(BadInput, match="do not go with"):
        Pages.plain(one, two)


def test_keys_too_wide_for_the_stage_turn_without_a_kernel(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    turn = Turn(*tables(generator, SOME[3], 8, 4), HALF, rounded=True)
    compile_now(turn, torch.float32)
    block = Block.draw(generator, 1, 5, (2100, 8), torch.float32)
    block.keys.copy_(torch.randn(block.keys.shape, generator=generator))
    keys, values = torch.zeros(2, 4, 1, 2100), torch.zeros(2, 4, 1, 8)
    right = Target(torch.zeros(1, 8, 2100), torch.zeros(1, 8, 8))
    put(array([block.run(0, 5, 1, 0)]), turn, Pages.plain(keys, values), np.array([1, 0], dtype=np.int64))
    transfer(array([block.run(0, 5, 1, 0)]), turn, right)
    assert torch.equal(keys[[1, 0]].view(1, 8, 2100), right.keys)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("item", [1, 2, 4])
def test_orders_are_known(name: str, item: int) -> None:
    """So that none falls back to element by element; one that is off by an element does, and is moved right."""
    tokens, dims = order(name, 128, 64, item, random.Random(1))
    whole_words = name == "packed values" and item == 4  # nothing to zip, and no rows
    assert ordered(tokens, dims, item)[0] == (SCATTERED if whole_words else ORDERS[name])
    dims[-1] += item
    assert ordered(tokens, dims, item)[0] == SCATTERED


def test_a_kernel_that_does_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first half of the heads comes out right."""
    from kvstore.tensors import pages_cpu

    right = pages_cpu.kernel_for

    def wrong(form: int) -> Any:
        kernel = right(form)
        return lambda runs, table, paging, *sides: kernel(runs, table, paging._replace(heads=1), *sides)

    monkeypatch.setattr(pages_cpu, "kernel_for", wrong)
    for form in (NO_TURN, TAKE):
        made = Compiled("a kernel that is wrong", partial(kvstore.tensors.pages._build, form))
        assert made.wait(PATIENCE) is None


# -- threads and memory ------------------------------------------------------------------------------------------------


def test_threads_at_the_same_time(stream_all: None, seed: int) -> None:
    trials = [Trial(seed + number, SOME) for number in range(12)]
    for trial in trials:
        compile_now(trial.turn, trial.dtype)
    made: list[Cache | None] = [None] * len(trials)

    def work(first: int) -> None:
        for number in range(first, len(trials), 4):
            cache = trials[number].cache()
            put(trials[number].runs, trials[number].turn, cache.pages, np.array(trials[number].table, dtype=np.int64))
            made[number] = cache

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cache, trial in zip(made, trials, strict=True):
        assert cache is not None and torch.equal(cache.memory, trial.right().memory)


def test_nothing_is_allocated_per_run(seed: int) -> None:
    """Once the kernel is there, many runs take no more memory than one."""
    small = Small(seed, heads=4)
    compile_now(small.turn, torch.bfloat16)
    peaks = []
    for count in (1, 512):
        runs = array([small.block.run(0, 4, 0, number % 11 * 4) for number in range(count)])
        moves = (partial(put, runs, small.turn), partial(take, runs))
        for move in moves:
            move(small.cache.pages, small.table)
        tracemalloc.start()
        for move in moves:
            move(small.cache.pages, small.table)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= peaks[0] + 512
