"""Loads of whole blocks from the host tier into a Hugging Face cache, keys turned on the way, beside plain memcpy.

The cache is allocated once, and memcpy writes to the same memory. What was loaded is compared bit for bit with the
rotation of transformers' own Llama, and that comparison is shown keys that are one position off, which it must refuse.
"""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import kvstore
from kvstore import Layout, Store
from kvstore.bench.micro.host import LAYOUTS, NAMESPACE, TOTAL, prompt, save_chain
from kvstore.bench.micro.limits import compare, copy, in_threads, memory
from kvstore.match import Match
from kvstore.tensors.rope import HALF, Turn
from kvstore.tensors.runs import Target, runs_of
from kvstore.tensors.transfer import compiled_for, transfer

Pair = tuple[torch.Tensor, torch.Tensor]
COMPILING = 120.0  # seconds that the kernel may take to be compiled


class Row:
    """One thread's share: a chain of blocks in the store, and the cache that it is loaded into."""

    def __init__(self, store: Store, layout: Layout, blocks: int, seed: int) -> None:
        self.store, self.layout, self.blocks = store, layout, blocks
        self.ids = prompt(seed, blocks * layout.block_tokens)
        self.source = memory(blocks * layout.payload_bytes(layout.block_tokens))
        whole = torch.frombuffer(self.source, dtype=torch.bfloat16)
        whole.copy_(torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).repeat(len(whole) >> 20))
        self.target = memory(len(self.source))
        self.cache = [self._layer(layer) for layer in range(len(layout.layers))]
        save_chain(store, layout, self.ids, self.source, check=True)

    def _layer(self, layer: int) -> Pair:
        """Keys and values of one layer as transformers has them, [heads, tokens, dim]; no bytes are shared."""
        shape, tokens = self.layout.layers[layer], len(self.ids)
        start = self.blocks * self.layout.layer_offsets(self.layout.block_tokens)[layer] // self.layout.itemsize
        pair, whole = [], torch.frombuffer(self.target, dtype=torch.bfloat16)
        for dim in (shape.key_dim, shape.value_dim):
            count = shape.heads * tokens * dim
            pair.append(whole[start : start + count].view(shape.heads, tokens, dim))
            start += count
        return pair[0], pair[1]

    def match(self, blocks: int) -> Match:
        """Finds the chain's first blocks."""
        return self.store.match(NAMESPACE, self.layout, self.ids[: blocks * self.layout.block_tokens] + array("I", [0]))

    def load(self, turn: Turn) -> None:
        """Brings the whole chain into the cache."""
        self.bring(self.match(self.blocks), turn)

    def bring(self, match: Match, turn: Turn) -> None:
        """Brings what was matched into the cache."""
        load = self.store.load(match)
        assert load.tokens == match.tokens, f"{load.tokens} of {match.tokens} tokens came back"
        for layer, (keys, values) in enumerate(self.cache):
            assert load.wait(layer)
            runs = np.array(runs_of(load.places(layer), 0, load.tokens, 0, 0), dtype=np.int64)
            transfer(runs, turn, Target(keys, values))
        load.release()

    def originals(self, layer: int) -> Pair:
        """What was saved of a layer, [heads, tokens, dim]."""
        layout, shape = self.layout, self.layout.layers[layer]
        size, start = layout.payload_bytes(layout.block_tokens), layout.layer_offsets(layout.block_tokens)[layer]
        blocks = torch.frombuffer(self.source, dtype=torch.bfloat16).view(self.blocks, size // layout.itemsize)
        pair = []
        for dim in (shape.key_dim, shape.value_dim):
            count, first = shape.heads * layout.block_tokens * dim, start // layout.itemsize
            piece = blocks[:, first : first + count].view(self.blocks, shape.heads, layout.block_tokens, dim)
            pair.append(piece.transpose(0, 1).reshape(shape.heads, -1, dim))
            start += count * layout.itemsize
        return pair[0], pair[1]

    def bit_equal(self, shift: int = 0) -> bool:
        """Whether every layer of the cache has the bits that transformers' own Llama makes of what was saved."""
        cos, sin = model_tables(self.layout.layers[0].key_dim, len(self.ids), shift)
        for layer, (keys, values) in enumerate(self.cache):
            saved, same_values = self.originals(layer)
            _, expected = apply_rotary_pos_emb(saved[None, :1], saved[None], cos, sin)
            if not torch.equal(bits(keys), bits(expected[0])) or not torch.equal(bits(values), bits(same_values)):
                return False
        return True


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, for which -0.0 is not 0.0."""
    return tensor.view(torch.int16)


def model_tables(dim: int, tokens: int, shift: int = 0) -> Pair:
    """Cosines and sines of transformers' Llama in bfloat16 for positions from ``shift`` on, [1, tokens, dim]."""
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, max_position_embeddings=1 << 17)
    like = torch.empty(0, dtype=torch.bfloat16)
    cos, sin = LlamaRotaryEmbedding(config)(like, torch.arange(shift, shift + tokens)[None])
    return cos, sin


def measure(size: str, threads: int, repeats: int) -> dict[str, Any]:
    """One row of figures; ``ratio`` is in memcpys of as many threads: 1.0 takes as long as one."""
    layout = LAYOUTS[size]
    block = layout.payload_bytes(layout.block_tokens)
    blocks = TOTAL // block
    cos, sin = model_tables(layout.layers[0].key_dim, blocks * layout.block_tokens)
    pairs = layout.layers[0].key_dim // 2
    turn = Turn(cos[0, :, :pairs].contiguous(), sin[0, :, :pairs].contiguous(), HALF, rounded=True)
    with kvstore.open(host=(threads + 1) * (blocks + 4) * layout.full_slot_bytes) as store:
        rows = [Row(store, layout, blocks, seed) for seed in range(threads)]
        kernel = compiled_for(turn, torch.bfloat16)
        ready = kernel is not None and kernel.wait(COMPILING) is not None
        timing = compare(
            _each(rows, lambda row: copy(row.target, row.source, block)),
            _each(rows, lambda row: row.load(turn)),
            repeats,
        )
        equal = all(row.bit_equal() for row in rows)
        assert not rows[0].bit_equal(shift=1), "keys that are one position off were taken for equal"
        allocated = allocated_per_block(rows[0], turn)
    moved = block * blocks * threads / 1e9
    return {
        "ratio": timing.times,
        "spread": timing.times_spread,
        "threads": threads,
        "compiled": ready,
        "bit_equal": equal,
        "gb_per_second": moved / timing.seconds,
        "limit_gb_per_second": moved / timing.limit,
        "cpu_seconds_per_gb": timing.cpu / moved,
        "limit_cpu_seconds_per_gb": timing.limit_cpu / moved,
        "allocated_bytes_per_block": allocated,
    }


def _each(rows: list[Row], work: Callable[[Row], object]) -> Callable[[], None]:
    return lambda: in_threads([lambda row=row: work(row) for row in rows])  # type: ignore[misc]


def allocated_per_block(row: Row, turn: Turn) -> float:
    """Bytes that one more block makes a load allocate, by Python and numpy at the peak and by torch in all.

    From ``Store.load`` on: a match keeps the prompt's token ids, which are no part of a block.
    """
    half = row.blocks // 2

    def once(blocks: int) -> int:
        match = row.match(blocks)
        gc.collect()
        return allocated(lambda: row.bring(match, turn))

    made = {blocks: min(once(blocks) for _ in range(3)) for blocks in (half, row.blocks)}
    return (made[row.blocks] - made[half]) / (row.blocks - half)


def allocated(work: Callable[[], object]) -> int:
    """Bytes that ``work`` allocates in this thread."""
    counted = Allocations()
    tracemalloc.start()
    try:
        with counted:
            work()
        return tracemalloc.get_traced_memory()[1] + counted.bytes
    finally:
        tracemalloc.stop()


class Allocations(TorchDispatchMode):
    """Adds up the memory of results of torch's operators that is not memory of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        made = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(result)}
        self.bytes += sum(size for address, size in made.items() if address not in given)
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
