"""Weighted sums of layers: what rotation demands of the weights, and attention over sums that nobody makes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from fused_cases import MASKS, Problem, moved, problem
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from kvstore.compiled import Compiled
from kvstore.errors import BadInput
from kvstore.tensors import fused_attention
from kvstore.tensors.fused_attention import attend
from kvstore.tensors.fusion import Fusion, learns, rebuilt, reference, tied
from kvstore.tensors.rope import HALF, INTERLEAVED, Turn, turned

PAIRINGS = (HALF, INTERLEAVED)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PATHS = ("kernel", "tiles", "whole")
DIM, HEADS = 32, 2


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Settles which way ``attend`` takes for few queries; float64 has no kernel."""
    if request.param == "kernel":
        if importlib.util.find_spec("numba") is None:
            pytest.skip("numba is not installed")
        assert all(compiled.wait() for compiled in fused_attention.CPU.values())
    if request.param == "whole":
        monkeypatch.setattr(fused_attention, "FEW_ROWS", 0)
    if request.param == "tiles":
        monkeypatch.setattr(fused_attention, "CPU", {})
        monkeypatch.setattr(fused_attention, "TILE_NUMBERS", 1 << 11)
    return str(request.param)


def turn_at(positions: Tensor, pairing: str, dtype: torch.dtype) -> Turn:
    """The rotation to ``positions``, as tables with one row for each."""
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
    return Turn(angles.cos().to(dtype), angles.sin().to(dtype), pairing, rounded=True)


def drawn(seed: int, dtype: torch.dtype, tokens: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Keys of two layers, positions, and weights that are free, [2, heads, dim / 2], or that are not tied."""
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(1, HEADS, tokens, DIM, generator=generator, dtype=dtype) for _ in range(2)]
    positions = torch.cat((torch.tensor([0, 131071]), torch.randint(0, 131072, (tokens - 2,), generator=generator)))
    free = torch.randn(2, HEADS, DIM // 2, generator=generator, dtype=dtype)
    return keys, positions, free, torch.randn(2, HEADS, DIM, generator=generator, dtype=dtype)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str)
def test_a_sum_of_turned_keys_is_the_turned_sum(seed: int, pairing: str, dtype: torch.dtype, limit: float) -> None:
    keys, positions, free, untied = drawn(seed, dtype, 40)
    turn, rows = turn_at(positions, pairing, dtype), torch.arange(40)

    def error(weights: Tensor) -> float:
        after = rebuilt([turned(key, turn, rows) for key in keys], weights)
        return apart(after, turned(rebuilt(keys, weights), turn, rows))

    assert error(tied(free, pairing)) <= limit
    wrong = INTERLEAVED if pairing == HALF else HALF
    assert error(untied) > 0.1 and error(tied(free, wrong)) > 0.1


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_scores_depend_on_distances_only(seed: int, pairing: str) -> None:
    keys, _, free, untied = drawn(seed, torch.float64, 40)
    queries, rows = keys[0].flip(2), torch.arange(40)

    def scores(start: int, weights: Tensor) -> Tensor:
        turn = turn_at(rows + start, pairing, torch.float64)
        fused = rebuilt([turned(key, turn, rows) for key in keys], weights)
        return turned(queries, turn, rows) @ fused.transpose(-1, -2)

    weights = tied(free, pairing)
    assert max(apart(scores(start, weights), scores(0, weights)) for start in (1, 1000, 131031)) < 1e-10
    assert min(apart(scores(start, untied), scores(0, untied)) for start in (1000, 131031)) > 0.1


def test_the_score_of_a_pair_has_a_part_that_only_equal_weights_remove(seed: int) -> None:
    """The decomposition of the paper: one part by the distance, and one by the sum of the positions."""
    generator = torch.Generator().manual_seed(seed)
    q, k, w = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    m, n, step = 70, 31, 0.3
    angles = torch.arange(102).double()[:, None] * step
    turn = Turn(angles.cos(), angles.sin(), HALF, rounded=True)
    query, key = (turned(x[None], turn, torch.tensor([at]))[0] for x, at in ((q, m), (k, n)))
    (q0, q1), (k0, k1), (w0, w1) = q.tolist(), k.tolist(), w.tolist()
    near, far = (m - n) * step, (m + n) * step
    relative = (q0 * k0 + q1 * k1) * math.cos(near) + (q0 * k1 - q1 * k0) * math.sin(near)
    absolute = (q0 * k0 - q1 * k1) * math.cos(far) - (q0 * k1 + q1 * k0) * math.sin(far)
    assert float(query @ (w * key)) == pytest.approx((w0 + w1) / 2 * relative + (w0 - w1) / 2 * absolute)


def is_tied(weights: torch.Tensor, pairing: str) -> bool:
    """Whether [..., dim] weights could come from ``tied``."""
    pairs = weights.shape[-1] // 2
    free = weights[..., :pairs] if pairing == HALF else weights[..., ::2]
    return torch.equal(tied(free, pairing), weights)


def test_tied_weights_are_equal_in_pairs() -> None:
    free = torch.arange(6.0).view(2, 1, 3)
    assert tied(free, HALF)[1, 0].tolist() == [3, 4, 5, 3, 4, 5]
    assert tied(free, INTERLEAVED)[1, 0].tolist() == [3, 3, 4, 4, 5, 5]
    for pairing, other in (PAIRINGS, PAIRINGS[::-1]):
        assert is_tied(tied(free, pairing), pairing) and not is_tied(tied(free, pairing), other)
    with pytest.raises(BadInput):
        tied(free, "thirds")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sum_is_rounded_once_whether_in_pieces_or_not(seed: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    given = problem(seed, dtype, context=70, sources=(3, 1))
    whole = rebuilt(given.keys, given.fusion.keys)
    monkeypatch.setattr("kvstore.tensors.fusion.PIECE", 16)
    pieces = rebuilt([moved(key, 1) for key in given.keys], given.fusion.keys)
    exact = sum(key.double() * w.double()[:, None] for key, w in zip(given.keys, given.fusion.keys, strict=True))
    assert isinstance(exact, Tensor) and torch.equal(pieces, whole) and pieces.is_contiguous()
    assert (whole.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    with pytest.raises(BadInput):
        rebuilt(given.keys[:2], given.fusion.keys)


SHAPES: list[dict[str, Any]] = [
    {},
    {"heads": (6, 1), "tokens": 3, "sources": (3, 1), "dims": (20, 12)},
    {"heads": (2, 2), "tokens": 64, "context": 130, "sources": (1, 2), "dims": (40, 40)},
    {"heads": (4, 2), "tokens": 70, "context": 70, "sources": (4, 4)},
    {"heads": (4, 2), "tokens": 9, "context": 5},
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_path_does_as_the_reference(seed: int, path: str, dtype: torch.dtype, mask: str) -> None:
    for shape in SHAPES:
        given = problem(seed, dtype, mask=mask, **shape)
        assert given.right(attend(*given.arguments())), shape


def test_a_wrong_path_would_be_found(seed: int, path: str) -> None:
    given = problem(seed, torch.float32, mask="bool")
    swapped = Problem(given.queries, given.keys[::-1], given.values, given.fusion, given.scaling, given.mask)
    assert not given.right(attend(*swapped.arguments()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_torch_on_sums_of_the_same_dtype(seed: int, path: str, dtype: torch.dtype) -> None:
    given = problem(seed, dtype, context=500, dims=(64, 64))
    q, k, v = given.queries, rebuilt(given.keys, given.fusion.keys), rebuilt(given.values, given.fusion.values)
    torchs = scaled_dot_product_attention(q, k, v, scale=given.scaling, enable_gqa=True).transpose(1, 2)
    keys, values = ([state.double() for state in states] for states in (given.keys, given.values))
    exact = reference(q.double(), keys, values, given.fusion, given.scaling)
    errors = [(made.double() - exact).norm() for made in (attend(*given.arguments()), torchs)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("mask", ["bool", "bias", "lowest"])
def test_rows_that_see_nothing_are_zero(seed: int, path: str, mask: str) -> None:
    given = problem(seed, torch.float32, tokens=4, context=4, mask=mask, batch=3)
    made = attend(*given.arguments())
    assert not made[1].any() and not made[2].any() and made[0].all()  # 5 tokens of 4 are padding
    for tensor in (given.queries, *given.keys, *given.values):
        tensor.requires_grad_()
    learned = attend(*given.arguments())
    learned.sum().backward()  # type: ignore[no-untyped-call]
    assert given.right(learned.detach()) and given.keys[0].grad is not None and given.keys[0].grad.isfinite().all()


@pytest.mark.parametrize("mask", ["causal", "bool"])
def test_gradients(seed: int, mask: str) -> None:
    given = problem(seed, torch.float64, heads=(2, 1), tokens=2, context=3, dims=(2, 2), mask=mask, batch=1)
    leaves = [given.queries, *given.keys, *given.values, given.fusion.keys, given.fusion.values]

    def made(*x: Tensor) -> Tensor:
        return attend(x[0], x[1:3], x[3:5], Fusion(x[5], x[6]), given.scaling, given.mask)

    for leaf in leaves:
        leaf.requires_grad_()
    assert learns(*leaves) and torch.autograd.gradcheck(made, leaves)
    with torch.no_grad():
        assert not learns(*leaves) and given.right(made(*leaves))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 33])
def test_equal_numbers_give_equal_bits_wherever_they_lie(seed: int, path: str, dtype: torch.dtype, tokens: int) -> None:
    given = problem(seed, dtype, tokens=tokens, context=150, dims=(40, 24))
    first = attend(*given.arguments())
    for how in range(3):
        keys, values = ([moved(state, how) for state in states] for states in (given.keys, given.values))
        again = attend(moved(given.queries, how), keys, values, given.fusion, given.scaling, given.mask)
        assert torch.equal(first, again), how


def test_threads_change_no_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(seed, torch.float32, batch=3)
    alone = attend(*given.arguments())
    monkeypatch.setattr(fused_attention, "THREAD_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(alone, attend(*given.arguments()))

    def refused(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refused)
    assert torch.equal(alone, attend(*given.arguments()))


@pytest.mark.parametrize(("batch", "tokens", "context"), [(0, 1, 5), (1, 0, 5), (2, 3, 0)])
def test_nothing_to_attend_to_and_nobody_who_attends(path: str, batch: int, tokens: int, context: int) -> None:
    given = problem(1, torch.float32, batch=batch, tokens=tokens, context=context)
    made = attend(*given.arguments())
    assert list(made.shape) == [batch, tokens, 4, 16] and not made.any()


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most numbers in what any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_few_queries_make_nothing_of_the_size_of_a_layer(seed: int, path: str) -> None:
    given = problem(seed, torch.bfloat16, context=2000, batch=1)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        attend(*given.arguments())
    layer = given.keys[0].numel()
    assert largest.numbers >= layer if path == "whole" else largest.numbers <= layer // 4


def wrong(given: Problem) -> dict[str, Callable[[], Tensor]]:
    q, k, v, fusion, scaling, _ = given.arguments()
    mask = torch.ones(1, 1, 1, 70)
    return {
        "no sources": lambda: attend(q, [], v, fusion, scaling),
        "five sources": lambda: attend(q, [k[0]] * 5, v, fusion, scaling),
        "weights for other sources": lambda: attend(q, k[:1], v, fusion, scaling),
        "weights of other dims": lambda: attend(q, k, v, Fusion(fusion.keys[..., 1:], fusion.values), scaling),
        "unequal sources": lambda: attend(q, [k[0], k[1][:, :, 1:]], v, fusion, scaling),
        "unequal contexts": lambda: attend(q, k, [x[:, :, 1:] for x in v], fusion, scaling),
        "other heads": lambda: attend(q[:, :3], k, v, fusion, scaling),
        "other batch": lambda: attend(q[:1], k, v, fusion, scaling),
        "other dim": lambda: attend(q[..., 1:], k, v, fusion, scaling),
        "other dtype": lambda: attend(q.half(), k, v, fusion, scaling),
        "integers": lambda: attend(q.int(), k, v, fusion, scaling),
        "three dims": lambda: attend(q[0], k, v, fusion, scaling),
        "strided dims": lambda: attend(q, [x.repeat_interleave(2, -1)[..., ::2] for x in k], v, fusion, scaling),
        "a short mask": lambda: attend(q, k, v, fusion, scaling, mask[..., 1:]),
        "a mask for three": lambda: attend(q, k, v, fusion, scaling, mask.expand(3, 1, 1, 70)),
        "a mask of integers": lambda: attend(q, k, v, fusion, scaling, mask.int()),
    }


def test_what_does_not_go_together_is_refused(seed: int) -> None:
    for name, call in wrong(problem(seed, torch.float32)).items():
        with pytest.raises(BadInput):
            call()
            pytest.fail(name)


@pytest.mark.parametrize("scale", [0, 1])
def test_a_kernel_that_errs_is_not_taken(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are compared with the reference before anybody gets it."""
    fused_cpu = pytest.importorskip("kvstore.tensors.fused_cpu")
    good = fused_attention.CPU[torch.float32].wait()
    assert good is not None

    def kernel(*args: Any) -> None:
        good(*args)
        args[-1][...] *= scale

    monkeypatch.setattr(fused_cpu, "kernel_for", lambda number: kernel)
    built = Compiled("a test's", lambda: fused_attention._build(torch.float32, 2)).wait()
    assert (built is kernel) is bool(scale)
