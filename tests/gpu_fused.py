"""What the Triton kernel of fused attention must do, on a GPU where there is one, else in Triton's interpreter, which
is chosen before Triton is imported: so these tests have a process of their own. ``test_fused_gpu.py`` starts it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import MASKS, Problem, moved, problem

from kvstore.tensors import fused_gpu
from kvstore.tensors.fusion import rebuilt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES: list[dict[str, Any]] = [
    {"heads": (4, 2), "tokens": 1, "context": 70, "sources": (2, 2)},
    {"heads": (5, 1), "tokens": 7, "context": 65, "sources": (3, 1), "dims": (20, 12)},
    {"heads": (1, 1), "tokens": 130, "context": 150, "sources": (1, 2), "dims": (32, 64), "batch": 1},
    {"heads": (2, 1), "tokens": 9, "context": 5, "sources": (4, 3)},
]


def made(given: Problem) -> torch.Tensor:
    return fused_gpu.attend(*given.arguments())


def split_in(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(fused_gpu, "SPLIT_TOKENS", tokens)


@pytest.mark.parametrize("splits", [False, True], ids=["whole", "splits"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_does_as_the_reference(seed: int, dtype: torch.dtype, splits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    split_in(monkeypatch, 64 if splits else 1 << 20)
    for number, shape in enumerate(SHAPES):
        mask = MASKS[(number + FLOATS.index(dtype)) % len(MASKS)]  # every shape meets most, by one dtype or another
        given = problem(seed, dtype, mask=mask, device=DEVICE, **shape)
        assert given.right(made(given)), (shape, mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_every_kind_of_mask(seed: int, tokens: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split_in(monkeypatch, 32)
    given = problem(seed, torch.float32, heads=(4, 1), tokens=tokens, mask=mask, device=DEVICE)
    assert given.right(made(given))
    if given.mask is not None:  # of one sequence, for both; and strided
        one = given.mask[1:].repeat_interleave(2, dim=-1)[..., ::2]
        again = Problem(given.queries, given.keys, given.values, given.fusion, given.scaling, one)
        assert again.right(made(again))


@pytest.mark.parametrize("mask", ["bool", "bias", "lowest"])
def test_rows_that_see_nothing_are_zero(seed: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split_in(monkeypatch, 64)
    given = problem(seed, torch.float32, tokens=4, context=4, mask=mask, batch=3, device=DEVICE)
    out = made(given)
    assert given.right(out) and not out[1].any() and not out[2].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_numbers_give_equal_bits_wherever_they_lie(seed: int, dtype: torch.dtype) -> None:
    given = problem(seed, dtype, heads=(2, 1), tokens=3, dims=(40, 24), device=DEVICE)
    first = made(given)
    for how in (0, 1, 2):
        keys, values = ([moved(state, how) for state in states] for states in (given.keys, given.values))
        again = Problem(moved(given.queries, how), keys, values, given.fusion, given.scaling, given.mask)
        assert torch.equal(first, made(again)), how
    given.keys[1] = moved(given.keys[1], 1)  # strided otherwise than the first
    assert torch.equal(first, made(given))


def test_a_wrong_sum_would_be_found(seed: int) -> None:
    given = problem(seed, torch.bfloat16, device=DEVICE)
    given.keys[1] = given.keys[1].flip(2)
    out = made(given)
    given.keys[1] = given.keys[1].flip(2)
    assert not given.right(out)


def test_the_context_is_split_where_programs_are_few() -> None:
    assert fused_gpu.split(4, 8192, 64, 132) == (32, 256)
    assert fused_gpu.split(8, 32768, 64, 132) == (16, 2048)
    assert fused_gpu.split(8, 100, 64, 132) == (1, 128)
    assert fused_gpu.split(8, 200, 64, 132) == (2, 128)
    assert fused_gpu.split(1000, 32768, 64, 132) == (1, 32768)
    assert fused_gpu.split(8, 0, 64, 132)[0] == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sources", [1, 2, 3, 4])
def test_sums_have_the_bits_of_plain_torch(seed: int, dtype: torch.dtype, sources: int) -> None:
    given = problem(seed, dtype, sources=(sources, sources), dims=(40, 16), context=150, device=DEVICE)
    for states, weights in ((given.keys, given.fusion.keys), (given.values, given.fusion.values)):
        wanted = rebuilt(states, weights)
        for how in (0, 1, 2):
            assert torch.equal(fused_gpu.rebuilt([moved(state, how) for state in states], weights), wanted)
        states[0] = states[0].flip(2)
        assert not torch.equal(fused_gpu.rebuilt(states, weights), wanted)
