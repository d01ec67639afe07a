"""Attention of a layer whose keys and values are sums of those of other layers; see ``fusion``.

For few queries kernels attend to the sources as they are. For many, and where gradients are wanted, the sums of this
one layer are made, which is little work beside theirs, and torch attends to them; on the GPU only where nothing but
causality hides anything, because torch's own kernels have no other masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvstore.compiled import Compiled
from kvstore.errors import BadInput
from kvstore.tensors.fusion import Fusion, additive, learns, rebuilt, reference, sighted
from kvstore.tensors.geometry import BFLOAT16, FLOAT16, FLOAT32

FEW_ROWS = 64  # query tokens times query heads of a kv head, up to which no sum of the whole context is made on the CPU
MOST_SOURCES = 4
MANY_ROWS = 1024  # of the same, from which on one layer's sums are made on the GPU
WIDEST_ON_GPU = 256  # dims of a head that the GPU's kernel has room for
TILE_NUMBERS = 1 << 19  # that plain torch widens at a time
THREAD_BYTES = 4 << 20  # that make it worth to start a thread
LOG2_E = math.log2(math.e)

Attend = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Fusion, float, Tensor | None], Tensor]
Kernel = Callable[..., None]  # ``fused_cpu.attend_for``
WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
WIDE |= {torch.float64: torch.float64}


def attend(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    fusion: Fusion,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T scaling + mask) V, where K and V are the sums that ``fusion`` says of ``keys`` and ``values``.

    ``queries`` [batch, heads, tokens, dim]; each of ``keys`` [batch, kv heads, context, dim], and of ``values`` with a
    dim of its own; all of one floating dtype and device, with any strides whose last is 1. Query head h belongs to kv
    head ``h // (heads / kv heads)``. ``mask``: see ``fusion.additive``, [batch or 1, 1, tokens, context]. Returns
    [batch, tokens, heads, dim of values], contiguous, of the queries' dtype; rows that see nothing are zero.

    Differentiable with respect to all but the mask. Equal numbers give equal bits, wherever they lie in memory: the
    first call of a dtype waits, for seconds, until its kernel is compiled or known not to be had.
    ``BadInput``: shapes, dtypes or devices that do not go together.
    """
    _check(queries, keys, values, fusion, mask)
    asked = queries, keys, values, fusion, scaling, mask
    if learns(queries, *keys, *values, fusion.keys, fusion.values):
        return _whole(*asked)
    if not queries.numel():
        return queries.new_zeros(*queries.transpose(1, 2).shape[:3], values[0].shape[3])
    kernels = not torch.compiler.is_compiling() and queries.dtype in CPU
    if queries.device.type == "cuda":
        fits = max(keys[0].shape[3], values[0].shape[3]) <= WIDEST_ON_GPU
        on_gpu = (GPU.get() or GPU.wait()) if kernels and fits else None
        if on_gpu is not None:
            return _in_torch(*asked) if torch_attends(queries, keys, values, mask) else on_gpu(*asked)
    if queries.shape[2] * (queries.shape[1] // keys[0].shape[1]) > FEW_ROWS:
        return _whole(*asked)
    if kernels and queries.device.type == "cpu":
        compiled = CPU[queries.dtype]
        kernel = compiled.get() or compiled.wait()
        if kernel is not None:
            return _in_kernel(kernel, *asked)
    return _in_tiles(*asked)


def _check(
    queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], fusion: Fusion, mask: Tensor | None
) -> None:
    if queries.dim() != 4 or queries.dtype not in WIDE:
        raise BadInput(f"queries of shape {list(queries.shape)} and {queries.dtype}; four dims of floats are needed")
    for states, weights in ((keys, fusion.keys), (values, fusion.values)):
        if not 1 <= len(states) <= MOST_SOURCES:
            raise BadInput(f"{len(states)} sources; 1 to {MOST_SOURCES} are needed")
        shape = states[0].shape
        if any(state.shape != shape or state.dim() != 4 for state in states):
            raise BadInput(f"sources of shapes {[list(state.shape) for state in states]}; equal ones are needed")
        if list(weights.shape) != [len(states), shape[1], shape[3]]:
            raise BadInput(f"weights of shape {list(weights.shape)} for {len(states)} sources of {list(shape)}")
        if any(state.dtype != queries.dtype or state.device != queries.device for state in states):
            raise BadInput(f"sources are not of the queries' {queries.dtype} on {queries.device}")
        if any(state.stride(3) != 1 and shape[3] > 1 for state in states):
            raise BadInput("the last dim of a source must be contiguous")
    batch, heads, tokens, dim = queries.shape
    kv_heads, context = keys[0].shape[1:3]
    if not kv_heads or heads % kv_heads or (batch, dim) != (keys[0].shape[0], keys[0].shape[3]):
        raise BadInput(f"queries of shape {list(queries.shape)} do not go with keys of {list(keys[0].shape)}")
    if keys[0].shape[:3] != values[0].shape[:3]:
        raise BadInput(f"keys of shape {list(keys[0].shape)} do not go with values of {list(values[0].shape)}")
    if mask is not None and list(mask.shape) not in ([batch, 1, tokens, context], [1, 1, tokens, context]):
        raise BadInput(f"a mask of shape {list(mask.shape)}; {[batch, 1, tokens, context]} is needed")
    if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise BadInput(f"a mask of {mask.dtype}; bool or floats are needed")


def torch_attends(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None) -> bool:
    """Whether there are so many queries that making the sums for torch's own attention on the GPU pays, and it has one
    that does not hold all scores."""
    (_, heads, tokens, dim), kv_heads = queries.shape, keys[0].shape[1]
    fits = mask is None and queries.itemsize == 2 and dim == values[0].shape[3] and dim % 8 == 0
    return fits and tokens * (heads // kv_heads) >= MANY_ROWS and tokens <= keys[0].shape[2]


def _in_torch(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    fusion: Fusion,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """On the GPU, with this layer's keys and values made in full by a kernel; without gradients and masks."""
    from kvstore.tensors import fused_gpu

    k, v, tokens = fused_gpu.rebuilt(keys, fusion.keys), fused_gpu.rebuilt(values, fusion.values), queries.shape[2]
    bias: Any = causal_lower_right(tokens, k.shape[2])
    made = scaled_dot_product_attention(queries, k, v, attn_mask=bias, scale=scaling, enable_gqa=True)
    return made.transpose(1, 2).contiguous()


def _whole(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    fusion: Fusion,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """With this layer's keys and values made in full; differentiable."""
    k, v, q = rebuilt(keys, fusion.keys), rebuilt(values, fusion.values), queries.contiguous()
    causal = mask is None and q.shape[2] == k.shape[2]
    bias = None if causal else additive(mask, q.shape[2], k.shape[2], q)
    if bias is None:
        made = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=True)
    else:
        blind, bias = sighted(bias)
        made = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling, enable_gqa=True)
        made = made.masked_fill(blind, 0)
    return made.transpose(1, 2).contiguous()


def _in_kernel(
    kernel: Kernel,
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    fusion: Fusion,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """By the compiled kernel for the CPU, in as many threads as torch would use."""
    batch, heads, tokens, dim = queries.shape
    kv_heads, context = keys[0].shape[1:3]
    rows = (queries.detach().float() * (scaling * LOG2_E)).reshape(batch, kv_heads, -1, dim).contiguous()
    added = additive(mask, tokens, context, rows)
    bias = rows.new_zeros(1, 0, 0) if added is None else (added * LOG2_E)[:, 0].contiguous()
    weights = [part.detach().to("cpu", torch.float32).contiguous().numpy() for part in (fusion.keys, fusion.values)]
    sources = [
        np.array([[x.data_ptr(), *(step * x.itemsize for step in x.stride()[:3])] for x in states], dtype=np.int64)
        for states in (keys, values)
    ]
    made = torch.empty(*rows.shape[:3], values[0].shape[3])

    def run(begin: int, end: int) -> None:
        kernel(rows.numpy(), *sources, *weights, bias.numpy(), context, begin, end, made.numpy())

    pairs = batch * kv_heads
    size = sum(state.numel() * state.itemsize for state in (*keys, *values))
    count = max(1, min(torch.get_num_threads(), pairs, size // THREAD_BYTES))
    _run([(pairs * i // count, pairs * (i + 1) // count) for i in range(count)], run)
    return made.view(batch, heads, tokens, -1).transpose(1, 2).to(queries.dtype).contiguous()


def _run(parts: Sequence[tuple[int, int]], run: Callable[[int, int], None]) -> None:
    """Each part in a thread of its own, the first in this one. All have ended then."""
    threads: list[Thread] = []
    for part in parts[1:]:
        thread = Thread(target=run, args=part, name="kvstore-attend")
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            run(*part)
        else:
            threads.append(thread)
    run(*parts[0])
    for thread in threads:
        thread.join()


def _in_tiles(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    fusion: Fusion,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """In plain torch: weights of keys are multiplied into queries, those of values into what comes out."""
    batch, heads, tokens, dim = queries.shape
    kv_heads, context = keys[0].shape[1:3]
    rows = (queries.to(WIDE[queries.dtype]) * scaling).reshape(batch, kv_heads, -1, dim).contiguous()
    absorbed = torch.cat([rows * weights[:, None] for weights in fusion.keys.to(rows)], dim=-1).flatten(0, 1)
    scores = rows.new_empty(batch * kv_heads, rows.shape[2], context)
    for start, tile in _tiles(keys, rows.dtype):
        torch.bmm(absorbed, tile.transpose(1, 2), out=scores[..., start : start + tile.shape[1]])
    seen = _softmax(scores.view(batch, heads, tokens, context), mask).view_as(scores)
    made = rows.new_zeros(batch * kv_heads, rows.shape[2], len(values) * values[0].shape[3])
    for start, tile in _tiles(values, rows.dtype):
        made.baddbmm_(seen[..., start : start + tile.shape[1]], tile)
    parts = made.view(*rows.shape[:3], len(values), -1) * fusion.values.to(rows).transpose(0, 1)[:, None]
    out = parts.sum(dim=3).view(batch, heads, tokens, -1)
    return out.transpose(1, 2).to(queries.dtype).contiguous()


def _tiles(states: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """First token, and a copy of some tokens of all sources: [batch x kv heads, tokens, sources x dim], of ``dtype``.

    Each is overwritten by the next. Copies, because a product of matrices may round by how they lie in memory.
    """
    batch, kv_heads, context, dim = states[0].shape
    size = max(1, min(context, TILE_NUMBERS // max(1, batch * kv_heads * len(states) * dim)))
    room = states[0].new_empty(batch * kv_heads * size * len(states) * dim, dtype=dtype)
    for start in range(0, context, size):
        count = min(size, context - start)
        tile = room[: room.numel() // size * count].view(batch, kv_heads, count, len(states), dim)
        for j, state in enumerate(states):
            tile[..., j, :] = state[:, :, start : start + count]
        yield start, tile.view(batch * kv_heads, count, -1)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Of scores [batch, heads, tokens, context]; zero where nothing is seen."""
    bias = additive(mask, scores.shape[2], scores.shape[3], scores)
    if bias is None:
        return scores.softmax(dim=-1)
    blind, bias = sighted(bias)
    return (scores + bias).softmax(dim=-1).masked_fill(blind, 0)


def _noise(dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor], list[Tensor], Fusion, float, Tensor]:
    """A small problem with all that makes one irregular."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, of)

    keys, values = [noise(2, 2, 150, 40) for _ in range(2)], [noise(2, 150, 2, 24).transpose(1, 2)]
    fusion = Fusion(noise(2, 2, 40, of=torch.float32), noise(1, 2, 24, of=torch.float32))
    mask = torch.rand(2, 1, 3, 150, generator=generator).to(device) > 0.3
    mask[0, 0, 1], mask[1, 0, :, :70] = False, False
    return noise(2, 6, 3, 40), keys, values, fusion, 0.1, mask


def _build(dtype: torch.dtype, number: int) -> Kernel:
    """The compiled kernel, after it did as plain torch does."""
    from kvstore.tensors.fused_cpu import kernel_for

    kernel: Kernel = kernel_for(number)
    problem = _noise(dtype, "cpu")
    torch.testing.assert_close(_in_kernel(kernel, *problem), reference(*problem))
    return kernel


def _build_gpu() -> Attend:
    """The Triton kernel, after it did as plain torch does on the device; what it needs for other shapes comes later."""
    from kvstore.tensors import fused_gpu

    problem = _noise(torch.bfloat16, "cuda")
    torch.testing.assert_close(fused_gpu.attend(*problem), reference(*problem), atol=0.02, rtol=0.02)
    _, keys, _, fusion, _, _ = problem
    if not torch.equal(fused_gpu.rebuilt(keys, fusion.keys), rebuilt(keys, fusion.keys)):
        raise ValueError("it does not sum as plain torch does")
    return fused_gpu.attend


CPU: dict[torch.dtype, Compiled[Kernel]] = {
    dtype: Compiled(f"the CPU kernel for fused attention in {dtype}", partial(_build, dtype, number))
    for dtype, number in ((torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16), (torch.float32, FLOAT32))
}
GPU: Compiled[Attend] = Compiled("the GPU kernel for fused attention", _build_gpu)
