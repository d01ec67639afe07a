"""Transfers: any runs to any target come out as token by token, and nothing else is touched."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transfers import KINDS, Block, Kind, Space, array, compile_now, draw_runs, put, tables

import kvstore.tensors.transfer
from kvstore.compiled import Compiled
from kvstore.errors import BadInput
from kvstore.tensors.rope import HALF, Turn
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import compiled_for, transfer

POSITIONS = 60
BF16: Kind = (torch.bfloat16, HALF, True)


@pytest.fixture
def stream_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers go past the caches too."""
    monkeypatch.setattr(kvstore.tensors.transfer, "STREAM_BYTES", 0)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where numba is missing."""

    def build() -> Any:
        raise ImportError("no numba here")

    for form in kvstore.tensors.transfer.KERNELS:
        missing: Compiled[Any] = Compiled("a kernel that is missing", build)
        monkeypatch.setitem(kvstore.tensors.transfer.KERNELS, form, missing)
        assert missing.wait() is None
    yield


class Trial:
    """A random transfer: kind, shapes, blocks, runs, and a maker of targets for them."""

    def __init__(self, seed: int) -> None:
        self.chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        chance = self.chance
        self.kind = chance.choice(KINDS)
        self.dtype, pairing, rounded = self.kind
        pairs, first = chance.choice((1, 4, 8, 12, 16, 32, 33, 64)), chance.choice((0, 0, 1, 8))
        self.heads = chance.randint(1, 3)
        self.dims = (first + 2 * pairs + chance.choice((0, 0, 3, 32)), chance.choice((0, 1, 16, 64, 70)))
        wide = chance.random() < 0.2
        if not wide and chance.random() < 0.5:
            self.dims = (self.dims[0], self.dims[0])
        turn = Turn(*tables(generator, self.kind, POSITIONS, pairs), pairing, rounded, first)
        self.turn = None if chance.random() < 0.2 else turn
        shapes = [(self.heads, chance.randint(1, 40), self.dims, self.dtype, chance.randint(0, 33)) for _ in range(3)]
        self.blocks = [Block.draw(generator, *shape) for shape in shapes]
        self.runs, self.columns = draw_runs(chance, self.blocks, chance.randint(0, 8), POSITIONS)
        self.columns += chance.randint(0, 5)
        self.page = chance.choice((0, 0, 1, 5, 16))  # tokens; 0: head-major
        self.pages = random.Random(seed).sample(range(200), -(-self.columns // max(self.page, 1)))
        self.rest = (chance.randint(0, 2), chance.randint(0, 2), chance.choice((0, 0, 1, 32)))

    def space(self) -> Space:
        """Filled with canaries."""
        if self.page:
            return Space.paged(self.heads, self.pages, self.page, self.dims, self.dtype, self.rest[0])
        return Space.head_major(self.heads, self.columns, self.dims, self.dtype, self.rest)

    def right(self) -> Space:
        """What comes out token by token."""
        space = self.space()
        put(space.target, self.blocks, self.runs, self.turn)
        return space

    def made(self) -> Space:
        """What comes out of a transfer."""
        space = self.space()
        transfer(self.runs, self.turn, space.target)
        return space


@given(st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_any_runs_to_any_target(seed: int) -> None:
    trial = Trial(seed)
    compile_now(trial.turn, trial.dtype)
    assert trial.made().equals(trial.right())


def test_any_runs_past_the_caches(stream_all: None, seed: int) -> None:
    for number in range(80):
        trial = Trial(seed + number)
        compile_now(trial.turn, trial.dtype)
        assert trial.made().equals(trial.right())


def test_plain_torch_gives_the_same(without_kernels: None, seed: int) -> None:
    for number in range(60):
        trial = Trial(seed + number)
        assert trial.made().equals(trial.right())


def test_what_the_tests_here_would_see(seed: int) -> None:
    """A wrong position, a wrong token, a wrong column and one byte outside the target, each planted."""
    generator = torch.Generator().manual_seed(seed)
    turn = Turn(*tables(generator, BF16, POSITIONS, 16), HALF, rounded=True)
    compile_now(turn, torch.bfloat16)
    block = Block.draw(generator, 2, 9, (32, 32), torch.bfloat16)
    spaces = []
    for token, position, column in ((1, 5, 2), (1, 5, 2), (2, 5, 2), (1, 6, 2), (1, 5, 3)):
        spaces.append(Space.head_major(2, 20, (32, 32), torch.bfloat16))
        transfer(array([block.run(token, 4, position, column)]), turn, spaces[-1].target)
    assert [space.equals(spaces[0]) for space in spaces] == [True, True, False, False, False]
    spaces[1].memory[1].view(torch.uint8).view(-1)[0] ^= 1
    assert not spaces[1].equals(spaces[0])


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
def test_runs_out_of_bounds_are_refused(compiled: bool, seed: int, request: pytest.FixtureRequest) -> None:
    """And then nothing was written, not even of the runs that are good."""
    generator = torch.Generator().manual_seed(seed)
    turn = Turn(*tables(generator, BF16, POSITIONS, 4), HALF, rounded=True)
    if compiled:
        compile_now(turn, torch.bfloat16)
    else:
        request.getfixturevalue("without_kernels")
    block = Block.draw(generator, 2, 9, (8, 8), torch.bfloat16)
    good = block.run(0, 9, POSITIONS - 9, 3)
    bad = [
        block.run(*run) for run in ((-1, 2, 0, 0), (0, -1, 0, 0), (1, 9, 0, 0), (0, 2, -1, 0), (0, 2, POSITIONS - 1, 0))
    ]
    bad += [block.run(0, 2, 0, column) for column in (-1, 11, 12, 1 << 40)]
    for untouched, space in (
        [Space.head_major(2, 12, (8, 8), torch.bfloat16) for _ in range(2)],
        [Space.paged(2, [3, 0, 2], 4, (8, 8), torch.bfloat16) for _ in range(2)],
    ):
        for run in bad:
            with pytest.raises(BadInput, match="run 1 leaves"):
                transfer(array([good, run]), turn, space.target)
        assert space.equals(untouched)
        transfer(array([good]), turn, space.target)
        assert not space.equals(untouched)
    for page in (-1, 1 << 40):
        assert space.target.pages is not None
        space.target.pages[1] = page
        with pytest.raises(BadInput, match="run 0 leaves"):
            transfer(array([good]), turn, space.target)


def test_targets_and_tables_that_do_not_fit_are_refused(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cos, sin = tables(generator, BF16, POSITIONS, 4)
    keys = torch.zeros(2, 5, 8, dtype=torch.bfloat16)
    target, none = Target(keys, keys.clone()), array([])
    for turn in (
        Turn(cos.float(), sin.float(), HALF, rounded=True),
        Turn(cos, sin, HALF, rounded=False),
        Turn(cos, sin[1:], HALF, rounded=True),
        Turn(cos[:, ::2], sin[:, ::2], HALF, rounded=True),
        Turn(cos, sin, HALF, rounded=True, first=1),
        Turn(cos, sin, HALF, rounded=True, first=-1),
    ):
        with pytest.raises(BadInput):
            transfer(none, turn, target)
    for bad in ((keys, keys[:1]), (keys, keys[:, 1:]), (keys.mT, keys.mT), (keys, keys[..., ::2])):
        with pytest.raises(BadInput):
            transfer(none, None, Target(*bad))
    compile_now(None, torch.bfloat16)
    transfer(none, None, target)


def test_keys_of_other_dtypes_turn_without_a_kernel() -> None:
    keys = torch.randn(2, 5, 8, dtype=torch.float64)
    cos, sin = torch.randn(2, 9, 4, dtype=torch.float64)
    turn = Turn(cos, sin, HALF, rounded=True)
    assert compiled_for(turn, keys.dtype) is None
    block, space = Block(keys, keys), Space.head_major(2, 5, (8, 8), torch.float64)
    runs = array([block.run(0, 5, 2, 0)])
    right = Space.head_major(2, 5, (8, 8), torch.float64)
    put(right.target, [block], runs, turn)
    transfer(runs, turn, space.target)
    assert all(torch.equal(*pair) for pair in zip(space.memory, right.memory, strict=True))


def test_threads_at_the_same_time(stream_all: None, seed: int) -> None:
    trials = [Trial(seed + number) for number in range(16)]
    for trial in trials:
        compile_now(trial.turn, trial.dtype)
    made: list[Space | None] = [None] * len(trials)

    def work(first: int) -> None:
        for _ in range(5):
            for number in range(first, len(trials), 4):
                made[number] = trials[number].made()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(space is not None and space.equals(t.right()) for space, t in zip(made, trials, strict=True))


def test_nothing_is_allocated_per_run(seed: int) -> None:
    """Once the kernel is there, many runs take no more memory than one."""
    generator = torch.Generator().manual_seed(seed)
    turn = Turn(*tables(generator, BF16, POSITIONS, 16), HALF, rounded=True)
    compile_now(turn, torch.bfloat16)
    block = Block.draw(generator, 2, 8, (32, 32), torch.bfloat16)
    target = Space.head_major(2, 4096, (32, 32), torch.bfloat16).target
    peaks = []
    for count in (1, 512):
        runs = array([block.run(0, 8, 0, 8 * number) for number in range(count)])
        transfer(runs, turn, target)
        tracemalloc.start()
        transfer(runs, turn, target)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= peaks[0] + 512


CACHED = """
from kvstore.tensors.geometry import ROUNDED
from kvstore.tensors.rope_cpu import kernel_for
stats = kernel_for(ROUNDED).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_a_second_process_finds_the_kernel_compiled(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", CACHED]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        said.append(done.stdout.strip())
    assert said == ["0 1", "1 0"]
