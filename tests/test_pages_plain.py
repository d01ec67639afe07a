"""Pages that are what their tensors' shapes say: moves are as transfers there, on a GPU too."""

from __future__ import annotations

import pytest
import torch
from devices import CUDA
from paged import POSITIONS, Cache, as_bytes
from transfers import Block, Kind, any_bits, array, tables

from kvstore.errors import Unsupported
from kvstore.tensors.grids import Pages
from kvstore.tensors.pages import gather, put, take
from kvstore.tensors.rope import HALF, Turn
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import transfer

BF16: Kind = (torch.bfloat16, HALF, False)
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
Pair = tuple[torch.Tensor, torch.Tensor]


def views(device: str, way: str) -> Pair:
    """Keys and values [6 pages, 16 tokens, 2 heads, 32], as GPU engines have them."""
    if way == "apart":
        both = torch.zeros(2, 6, 16, 2, 32, dtype=torch.bfloat16, device=device)
        return both[0], both[1]
    if way == "heads first":
        packed = torch.zeros(6, 2, 16, 64, dtype=torch.bfloat16, device=device).transpose(1, 2)
    else:
        packed = torch.zeros(6, 16, 2, 64, dtype=torch.bfloat16, device=device)
    return packed[..., :32], packed[..., 32:]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["apart", "packed", "heads first"])
def test_plain_pages(way: str, device: str, seed: int) -> None:
    """The same as a transfer, and back again, run by run and all at once."""
    generator = torch.Generator().manual_seed(seed)
    cos, sin = (table.to(device) for table in tables(generator, BF16, POSITIONS, 16))
    turn = Turn(cos, sin, HALF, rounded=False)
    block = Block(*(any_bits(generator, (2, 50, 32), torch.bfloat16).to(device) for _ in "kv"))
    block.keys.copy_(torch.randn(block.keys.shape, generator=generator))
    made, right = views(device, way), views(device, way)
    table = torch.tensor([4, 1, 5], device=device)
    runs = array([block.run(3, 40, 7, 5), block.run(0, 2, 0, 46)])
    put(runs, turn, Pages.plain(*made), table.cpu().numpy())
    transfer(runs, turn, Target(*right, table))
    assert all(torch.equal(as_bytes(one), as_bytes(two)) for one, two in zip(made, right, strict=True))
    pages, back = Pages.plain(*made), Block(*(torch.zeros_like(part) for part in (block.keys, block.values)))
    take(array([back.run(3, 40, 0, 5), back.run(0, 2, 0, 46)]), pages, table)
    assert torch.equal(as_bytes(back.values[:, 3:43]), as_bytes(block.values[:, 3:43]))
    every = Block(*(torch.zeros(2, 43, 32, dtype=torch.bfloat16, device=device) for _ in "kv"))
    gather(pages, table, 5, every.keys, every.values)
    for all_at_once, run_by_run in ((every.keys, back.keys), (every.values, back.values)):
        assert torch.equal(as_bytes(all_at_once[:, :40]), as_bytes(run_by_run[:, 3:43]))
        assert torch.equal(as_bytes(all_at_once[:, 41:]), as_bytes(run_by_run[:, :2]))


def test_orders_that_are_no_tensors_are_told(seed: int) -> None:
    pages = Cache.draw(("columns", "rows"), 2, 2, 16, (32, 32), torch.bfloat16, seed).pages
    with pytest.raises(Unsupported, match="keep an order"):
        gather(pages, torch.tensor([0]), 0, torch.zeros(2, 16, 32), torch.zeros(2, 16, 32))
