"""Turns: the kernels do, bit for bit, what plain torch does, and that is what models of Hugging Face do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transfers import DTYPES, KINDS, Block, Kind, array, compile_now, same, tables
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

import kvstore.tensors.transfer
from kvstore.tensors import plain
from kvstore.tensors.rope import HALF, INTERLEAVED, Turn, turned
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import transfer

# Pairs that fill vectors of every kernel, that leave something over, and that need single ones.
PAIRS = (1, 3, 8, 12, 16, 24, 32, 45, 48, 64, 96)
LONG = 131072  # positions


def turned_by(how: Any, keys: torch.Tensor, turn: Turn | None, position: int) -> torch.Tensor:
    """``keys`` [heads, tokens, dim] through a transfer to a target of the same shape."""
    keys = keys.contiguous()
    target = Target(torch.empty_like(keys), torch.empty_like(keys))
    how(array([Block(keys, keys).run(0, keys.shape[1], position, 0)]), turn, target)
    assert same(target.values, keys)
    return target.keys


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("wild", [False, True], ids=["angles", "any bits"])
def test_kernels_equal_plain_torch(kind: Kind, wild: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every number of pairs, with dims before and behind them; NaN, infinities and denormals among the keys.

    Through the caches and past them.
    """
    dtype, pairing, rounded = kind
    generator = torch.Generator().manual_seed(seed)
    for pairs in PAIRS:
        for first, behind in ((0, 0), (1, 0), (0, 5), (16, 24)):
            turn = Turn(*tables(generator, kind, 40, pairs, wild), pairing, rounded, first)
            compile_now(turn, dtype)
            block = Block.draw(generator, 2, 7, (first + 2 * pairs + behind, 3), dtype, shift=first)
            right = turned(block.keys, turn, torch.arange(33, 40))
            for stream_bytes in (0, 1 << 40):
                monkeypatch.setattr(kvstore.tensors.transfer, "STREAM_BYTES", stream_bytes)
                target = Target(*(torch.zeros_like(made) for made in (block.keys, block.values)))
                transfer(array([block.run(0, 7, 33, 0)]), turn, target)
                assert same(target.keys, right)
                assert same(target.values, block.values)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_positions_of_a_long_table(kind: Kind, seed: int) -> None:
    """And a table that is off by one position does not give the same: this test would see it."""
    dtype, pairing, rounded = kind
    generator = torch.Generator().manual_seed(seed)
    turn = Turn(*long_tables(8, dtype if rounded else torch.float32), pairing, rounded)
    off = Turn(turn.cos.roll(1, 0), turn.sin.roll(1, 0), pairing, rounded)
    compile_now(turn, dtype)
    keys = torch.randn(1, 1024, 16, generator=generator).to(dtype)
    for position in (0, 1, 4095, 65536 - 512, LONG - 1024):
        right = turned(keys, turn, torch.arange(position, position + 1024))
        assert same(turned_by(transfer, keys, turn, position), right)
        assert not same(turned_by(transfer, keys, off, position), right)
    whole = torch.randn(1, LONG, 16, generator=generator).to(dtype)
    assert same(turned_by(transfer, whole, turn, 0), turned(whole, turn, torch.arange(LONG)))


def long_tables(pairs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As models make them."""
    angles = torch.arange(LONG)[:, None] * 5e5 ** -(torch.arange(pairs) / pairs)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_special_about_numbers(dtype: torch.dtype) -> None:
    """Signs of zeros, denormals, overflow and ties, spelled out."""
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    ulp = torch.finfo(dtype).eps
    numbers = [
        0.0,
        -0.0,
        tiny,
        -tiny,
        tiny * ulp,
        tiny * 1.5,
        largest,
        -largest,
        1.0,
        1 + ulp,
        1 + 2 * ulp,
        1 + 3 * ulp,
    ]
    numbers += [float("inf"), -float("inf"), float("nan"), 3.14159, -2.71828, ulp, ulp / 2, largest / 2]
    every = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    grid = torch.cartesian_prod(every, every, every)  # x, and the tables
    angles = grid[:, 1:2].contiguous(), grid[:, 2:3].contiguous()
    for y in (0.0, -0.0, 1 + ulp, -largest):
        keys = torch.stack((grid[:, 0], torch.full_like(grid[:, 0], y)), dim=-1)[None]
        for pairing in (HALF, INTERLEAVED):
            for rounded in (True, False)[: 1 + (dtype != torch.float32)]:
                cos, sin = (table if rounded else table.float() for table in angles)
                turn = Turn(cos, sin, pairing, rounded)
                compile_now(turn, dtype)
                right = turned(keys, turn, torch.arange(len(grid)))
                assert same(turned_by(transfer, keys, turn, 0), right)
                assert same(turned_by(plain.transfer, keys, turn, 0), right)


def test_a_turn_is_what_it_says() -> None:
    """By hand: a quarter turn takes (x, y) to (-y, x), and dims outside stay."""
    keys = torch.tensor([[[9.0, 1.0, 2.0, 3.0, 4.0, 8.0]]])
    cos, sin = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for pairing, right in ((HALF, [9, -3, -4, 1, 2, 8]), (INTERLEAVED, [9, -2, 1, -4, 3, 8])):
        turn = Turn(cos, sin, pairing, rounded=True, first=1)
        compile_now(turn, torch.float32)
        assert turned_by(transfer, keys, turn, 1).flatten().tolist() == right
        assert turned(keys, turn, torch.tensor([1])).flatten().tolist() == right


def config(name: str, **more: Any) -> Any:
    shape = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "max_position_embeddings": LONG}
    return getattr(transformers, name)(**shape, **more)


def llama(states: torch.Tensor, positions: torch.Tensor) -> tuple[Any, Turn]:
    """The model's function with its tables, and the turn that it is."""
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config("LlamaConfig"))(states, positions)
    turn = Turn(cos[0, :, :32].contiguous(), sin[0, :, :32].contiguous(), HALF, rounded=True)
    return modeling_llama.apply_rotary_pos_emb(states, states, cos, sin)[1], turn


def glm(states: torch.Tensor, positions: torch.Tensor) -> tuple[Any, Turn]:
    """Half of the dims, interleaved."""
    part = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
    cos, sin = modeling_glm.GlmRotaryEmbedding(config("GlmConfig", **part))(states, positions)
    turn = Turn(cos[0, :, :16].contiguous(), sin[0, :, :16].contiguous(), INTERLEAVED, rounded=True)
    return modeling_glm.apply_rotary_pos_emb(states, states, cos, sin)[1], turn


def cohere(states: torch.Tensor, positions: torch.Tensor) -> tuple[Any, Turn]:
    """Interleaved, in float32 with tables that were rounded."""
    cos, sin = modeling_cohere.CohereRotaryEmbedding(config("CohereConfig"))(states, positions)
    cos_of_pairs, sin_of_pairs = (table[0, :, ::2].float().contiguous() for table in (cos, sin))
    turn = Turn(cos_of_pairs, sin_of_pairs, INTERLEAVED, rounded=states.dtype == torch.float32)
    return modeling_cohere.apply_rotary_pos_emb(states, states, cos, sin)[1], turn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", [llama, glm, cohere], ids=lambda model: model.__name__)
def test_models_do_the_same(model: Any, dtype: torch.dtype, seed: int) -> None:
    keys = torch.randn(1, 3, 300, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for start in (0, 4000, LONG - 300):
        right, turn = model(keys, torch.arange(start, start + 300)[None])
        compile_now(turn, dtype)
        assert same(turned(keys[0], turn, torch.arange(300)), right[0])
        assert same(turned_by(transfer, keys[0], turn, 0), right[0])
        assert not same(turned_by(transfer, keys[0, :, :299], turn, 1), right[0, :, :299])
