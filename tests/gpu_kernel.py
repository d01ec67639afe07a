"""What the Triton kernel must do, on a GPU where there is one, else in Triton's interpreter, which is chosen before
Triton is imported: so these tests have a process of their own. ``test_rope_gpu.py`` starts it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, HEADS, Case, made_right, memory, same, tables

from kvstore.errors import BadInput
from kvstore.tensors import plain, rope_gpu
from kvstore.tensors.rope import HALF, INTERLEAVED, Turn
from kvstore.tensors.runs import COLUMN, Target

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

SHAPES = [  # dims of keys and values, first dim that turns, pairs
    ((16, 16), 0, 8),
    ((16, 8), 4, 4),
    ((20, 12), 2, 6),
    ((9, 5), 3, 3),  # of odd width: no two rows are aligned alike
    ((24, 0), 0, 4),
]


@pytest.mark.parametrize("rounded", [True, False], ids=["rounded", "float32"])
@pytest.mark.parametrize("pairing", [HALF, INTERLEAVED])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_plain_torch_bit_for_bit(seed: int, dtype: torch.dtype, pairing: str, rounded: bool) -> None:
    generator = np.random.default_rng(seed)
    for number, (dims, first, pairs) in enumerate(SHAPES):
        turn = tables(generator, 50, pairs, dtype, pairing, rounded or dtype == torch.float32, first)
        # Head-major and paged take turns: every shape meets both, by one dtype or the other.
        case = Case(dtype, dims, generator, page_tokens=(0, 4)[(number + FLOATS.index(dtype)) % 2], columns=11)
        case.fill(50)
        assert made_right(case, turn), (dims, first, pairs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("page_tokens", [0, 5])
def test_copies_keys_that_do_not_turn(seed: int, dtype: torch.dtype, page_tokens: int) -> None:
    case = Case(dtype, (7, 16), np.random.default_rng(seed), page_tokens, columns=21)
    case.fill(1000)
    assert made_right(case, None)


@pytest.mark.parametrize("page_tokens", [0, 3])
def test_many_runs_in_any_order(seed: int, page_tokens: int) -> None:
    generator = np.random.default_rng(seed)
    case = Case(torch.bfloat16, (16, 16), generator, page_tokens, columns=50)
    case.fill(60)
    assert made_right(case, tables(generator, 60, 8, torch.bfloat16, HALF, True, 0))


@pytest.mark.parametrize("enough", [1, 30], ids=["all heads in one", "two heads in one"])
@pytest.mark.parametrize("page_tokens", [0, 4])
def test_many_programs_for_a_run(seed: int, monkeypatch: pytest.MonkeyPatch, page_tokens: int, enough: int) -> None:
    monkeypatch.setattr(rope_gpu, "TILE_BYTES", 128)  # four tokens
    monkeypatch.setattr(rope_gpu, "ENOUGH_PROGRAMS", enough)
    generator = np.random.default_rng(seed)
    case = Case(torch.bfloat16, (16, 16), generator, page_tokens)
    case.heads = 3
    case.add(30, 3, 17, 11, 20)
    case.add(8, 0, 5, 40, 7)
    assert made_right(case, tables(generator, 60, 8, torch.bfloat16, HALF, True, 0))


@pytest.mark.parametrize("pairing", [HALF, INTERLEAVED])
def test_blocks_at_any_address(seed: int, pairing: str) -> None:
    generator = np.random.default_rng(seed)
    case = Case(torch.bfloat16, (16, 16), generator)
    turn = tables(generator, 40, 8, torch.bfloat16, pairing, True, 0)
    for column, shift in enumerate((1, 2, 8)):
        case.add(8, 1, 6, 9, 6 * column)
        size = HEADS * 8 * 16
        keys, values = (case.noise(size + 16)[shift : shift + size].view(HEADS, 8, 16) for _ in "kv")
        case.blocks[-1] = keys, values
    assert made_right(case, turn)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_positions_up_to_131071(seed: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(seed)
    speeds = 500000.0 ** (-torch.arange(4) / 4)
    angles = torch.arange(131072)[:, None] * speeds
    turn = Turn(angles.cos().to(dtype).to(DEVICE), angles.sin().to(dtype).to(DEVICE), HALF, True)
    case = Case(dtype, (8, 8), generator)
    for column, position in ((0, 131062), (10, 65531)):
        case.add(16, 2, 10, position, column)
    assert made_right(case, turn)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, interpreting
@pytest.mark.parametrize("pairing", [HALF, INTERLEAVED])
@pytest.mark.parametrize("rounded", [True, False], ids=["rounded", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_there_is(
    seed: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rounded: bool, pairing: str
) -> None:
    """All bit patterns as keys: zeros of both signs, denormals, infinities, NaN; by angles of all kinds and sizes."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(rope_gpu, "TILE_BYTES", 1 << 16)  # few programs
    generator = np.random.default_rng(seed)
    turn = tables(generator, 2048, 8, dtype, pairing, rounded, 0)
    for table in (turn.cos, turn.sin):
        sizes = 2.0 ** generator.integers(-130 if dtype == torch.bfloat16 else -20, 2, (1024, 8))
        table[:1024] = (table[:1024] * torch.from_numpy(sizes).to(DEVICE)).to(table.dtype)
        table[1000:1100] = torch.tensor([0.0, -0.0, 1.0, -1.0] * 2, dtype=table.dtype, device=DEVICE)
    case = Case(dtype, (16, 0), generator, columns=2048)
    case.add(2048, 0, 2048, 0, 0)
    patterns = torch.from_numpy(generator.permutation(65536).astype(np.uint16).view(np.int16))
    case.blocks[0] = (patterns.view(dtype).view(HEADS, 2048, 16).to(DEVICE), case.blocks[0][1])
    assert made_right(case, turn)


def test_the_comparison_sees_one_position_too_far_and_one_column_too_far(seed: int) -> None:
    generator = np.random.default_rng(seed)
    case = Case(torch.bfloat16, (16, 16), generator)
    case.add(12, 1, 9, 20, 5)
    turn = tables(generator, 50, 8, torch.bfloat16, HALF, True, 0)
    assert made_right(case, turn)
    shifted = Turn(turn.cos.roll(1, 0), turn.sin.roll(1, 0), HALF, True)
    assert not made_right(case, turn, given=shifted)
    target = case.target()
    right = case.right(turn, target)
    runs = case.runs()
    runs[:, COLUMN] += 1
    rope_gpu.transfer(runs, turn, target)
    assert not same(memory(target.values), right[1])


def test_prepared_runs_serve_layer_after_layer(seed: int) -> None:
    generator = np.random.default_rng(seed)
    turn = tables(generator, 50, 8, torch.bfloat16, HALF, True, 0)
    cases = [Case(torch.bfloat16, (16, 16), generator) for _ in range(3)]
    for case in cases:
        case.add(12, 1, 9, 20, 5)
        case.add(8, 0, 8, 40, 25)
    ready = rope_gpu.prepare(np.stack([case.runs() for case in cases]), DEVICE)
    for layer, case in enumerate(cases):
        target = case.target()
        right = case.right(turn, target)
        rope_gpu.transfer(ready.layer(layer), turn, target)
        assert same(memory(target.keys), right[0]) and same(memory(target.values), right[1])


def test_nothing_to_do(seed: int) -> None:
    case = Case(torch.bfloat16, (16, 16), np.random.default_rng(seed))
    assert made_right(case, None)
    case.add(8, 3, 0, 0, 0)
    assert made_right(case, None)


@pytest.mark.parametrize(
    "row", [(8, 1, 8, 0, 0), (8, -1, 4, 0, 0), (8, 0, 4, -1, 0), (8, 0, 4, 0, -1), (8, 0, 4, 0, 47), (8, 0, 4, 47, 0)]
)
def test_a_run_out_of_bounds_is_refused_before_anything_is_written(seed: int, row: tuple[int, ...]) -> None:
    generator = np.random.default_rng(seed)
    case = Case(torch.bfloat16, (16, 16), generator)
    case.add(8, 0, 8, 0, 0)
    runs = np.concatenate([case.runs(), case.runs()])
    runs[1, 2:] = row
    turn, target = tables(generator, 50, 8, torch.bfloat16, HALF, True, 0), case.target()
    before = memory(target.keys).clone()
    with pytest.raises(BadInput):
        rope_gpu.transfer(runs, turn, target)
    assert same(memory(target.keys), before)


def test_tables_and_targets_that_do_not_fit_are_refused(seed: int) -> None:
    generator = np.random.default_rng(seed)
    case = Case(torch.bfloat16, (16, 16), generator)
    case.add(8, 0, 8, 0, 0)
    good, target = tables(generator, 50, 8, torch.bfloat16, HALF, True, 0), case.target()
    half = Turn(good.cos.half(), good.sin.half(), HALF, True)
    late = Turn(good.cos, good.sin, HALF, True, first=2)
    apart = Turn(good.cos.T.contiguous().T, good.sin, HALF, True)
    for turn in (half, late, apart):
        with pytest.raises(BadInput):
            rope_gpu.transfer(case.runs(), turn, target)
    wide = Target(target.keys.transpose(1, 2), target.values.transpose(1, 2))
    mixed = Target(target.keys, target.values.float())
    for wrong in (wide, mixed):
        with pytest.raises(BadInput):
            rope_gpu.transfer(case.runs(), good, wrong)
    elsewhere = Turn(good.cos.to("meta"), good.sin.to("meta"), HALF, True)
    with pytest.raises(BadInput):
        rope_gpu.transfer(case.runs(), elsewhere, target)


def test_pages_are_contiguous_int64(seed: int) -> None:
    case = Case(torch.bfloat16, (16, 16), np.random.default_rng(seed), page_tokens=4)
    case.add(8, 0, 8, 0, 0)
    target = case.target()
    assert target.pages is not None
    for pages in (target.pages.int(), target.pages.repeat_interleave(2)[::2]):
        with pytest.raises(BadInput):
            rope_gpu.transfer(case.runs(), None, Target(target.keys, target.values, pages))


def test_pairs_move_as_words_only_where_words_are_aligned(seed: int) -> None:
    turn = tables(np.random.default_rng(seed), 50, 4, torch.bfloat16, INTERLEAVED, True, 4)
    target = Target(torch.empty(2, 40, 16, dtype=torch.bfloat16), torch.empty(2, 40, 16, dtype=torch.bfloat16))
    odd = Turn(turn.cos, turn.sin, INTERLEAVED, True, first=3)
    paired = [rope_gpu.form(bits, turn, target)["PAIRED"] for bits in (0, 4, 2)]
    assert paired == ["words", "words", "apart"] and rope_gpu.form(0, odd, target)["PAIRED"] == "apart"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA here")
def test_prepared_runs_replay_in_a_graph_and_equal_plain_torch_on_the_device(seed: int) -> None:
    generator = np.random.default_rng(seed)
    case = Case(torch.bfloat16, (128, 128), generator, columns=600)
    case.add(256, 0, 256, 5, 300)
    turn, target = tables(generator, 300, 64, torch.bfloat16, HALF, True, 0), case.target()
    other = case.target()
    plain.transfer(case.runs(), turn, other)
    ready = rope_gpu.prepare(case.runs(), DEVICE)
    rope_gpu.transfer(ready, turn, case.target())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_gpu.transfer(ready, turn, target)
    graph.replay()
    torch.cuda.synchronize()
    assert same(target.keys[:, 300:556].contiguous(), other.keys[:, 300:556].contiguous())
