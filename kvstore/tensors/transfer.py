"""From blocks to where an engine reads: gather, turn the keys at their placement, scatter, in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from kvstore.compiled import Compiled
from kvstore.errors import BadInput
from kvstore.tensors import geometry, plain
from kvstore.tensors.geometry import BFLOAT16, FLOAT16, FLOAT32, NO_TURN, ROUNDED, Geometry, Kernel
from kvstore.tensors.rope import HALF, INTERLEAVED, Turn
from kvstore.tensors.runs import COLUMN, POSITION, STRIDE, TOKEN, TOKENS, Target

# A layer of this many bytes is written past the caches: it would push out what it does not find room beside.
STREAM_BYTES = 4 << 20

Transfer = Callable[[np.ndarray, Turn | None, Target], None]
DTYPES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
ONE_PAGE = np.zeros(1, dtype=np.int64)  # a head-major target
WITHOUT_TABLES = 1 << 62  # positions that a transfer without a turn takes


def transfer(runs: Any, turn: Turn | None, target: Target) -> None:
    """Brings ``runs`` [n, 7] int64, or what the GPU kernel has made of them (``rope_gpu.Prepared``), into ``target``.

    Of each run: addresses of the block's keys and values in this layer (``[head][stride][dim]``, at the target's
    device), the block's tokens of room, the first token and their number, the position and the target's column of the
    first. ``turn`` None: keys stay as they are. The memory behind the addresses must stay until this returns (CPU) or
    until the current stream has done the work (CUDA).

    Any thread; targets of calls at the same time must not overlap. On the CPU the work is done without Python's lock
    and allocates nothing per run, once the kernel for this kind of turn is there; the first call asks for it.
    ``BadInput``: a run leaves its block, the tables or the target (on the CPU nothing was written then), or tables or
    target are not what ``Turn`` and ``Target`` say.
    """
    if target.keys.device.type == "cuda":
        on_gpu = GPU.get() if target.keys.dtype in DTYPES else None
        (on_gpu or plain.transfer)(runs, turn, target)
        if turn is not None:  # whoever made the tables, in another stream, may drop them before they are read here
            for table in (turn.cos, turn.sin):
                table.record_stream(torch.cuda.current_stream(table.device))
        return
    where, pages = numbers(turn, target)
    compiled = compiled_for(turn, target.keys.dtype)
    kernel = None if compiled is None else compiled.get()
    bad = (kernel or _first_bad)(runs, pages, where)
    if bad >= 0:
        raise BadInput(f"run {bad} leaves its block, the tables or the target: {runs[bad].tolist()}")
    if kernel is None:
        plain.transfer(runs, turn, target)


def compiled_for(turn: Turn | None, dtype: torch.dtype) -> Compiled[Kernel] | None:
    """What turns keys of ``dtype`` so on the CPU; ``wait`` on it to have it from then on. None: plain torch does."""
    if turn is None:
        return KERNELS[NO_TURN]
    if dtype not in DTYPES:
        return None
    form = DTYPES[dtype] + (0 if turn.pairing == HALF else geometry.INTERLEAVED)
    return KERNELS[form + (ROUNDED if turn.rounded and dtype != torch.float32 else 0)]


def numbers(turn: Turn | None, target: Target) -> tuple[Geometry, np.ndarray]:
    """What a kernel has to know of a turn and a target, and the target's pages. ``BadInput`` if they do not fit."""
    keys, values = target.keys, target.values
    if target.pages is None:
        heads, columns, pages, table = keys.shape[0], keys.shape[1], 1, ONE_PAGE
    else:  # a copy if it must be
        pages, columns, heads = keys.shape[:3]
        table = np.ascontiguousarray(target.pages.numpy(), dtype=np.int64)
    if keys.shape[:-1] != values.shape[:-1]:
        raise BadInput(f"keys of shape {list(keys.shape)} do not go with values of shape {list(values.shape)}")
    ends = _steps(keys, target) + _steps(values, target)
    where = Geometry(*ends, heads, max(columns, 1), pages if columns else 0, *_turning(turn, keys), STREAM_BYTES)
    return where, table


def _steps(tensor: torch.Tensor, target: Target) -> tuple[int, int, int, int, int]:
    """Address, steps from page to page, head to head and column to column, and size of a row; in bytes."""
    steps, item, dims = tensor.stride(), tensor.itemsize, tensor.shape[-1]
    if steps[-1] != 1 and dims > 1:
        raise BadInput("the last dim of a target must be contiguous")
    if target.pages is None:
        return tensor.data_ptr(), 0, steps[0] * item, steps[1] * item, dims * item
    return tensor.data_ptr(), steps[0] * item, steps[2] * item, steps[1] * item, dims * item


def _turning(turn: Turn | None, keys: torch.Tensor) -> tuple[int, int, int, int, int]:
    """First dim, pairs, addresses of cosines and sines, positions."""
    if turn is None:
        return 0, 0, 0, 0, WITHOUT_TABLES
    cos, sin = turn.cos, turn.sin
    dtype = keys.dtype if turn.rounded else torch.float32
    if not (cos.dtype == sin.dtype == dtype and cos.shape == sin.shape):
        raise BadInput(f"tables of {cos.dtype} and {sin.dtype}, where {dtype} is needed, or not of one shape")
    positions, pairs = cos.shape
    if not (cos.is_contiguous() and sin.is_contiguous() and 0 <= turn.first <= keys.shape[-1] - 2 * pairs):
        raise BadInput(f"{pairs} pairs from dim {turn.first} on do not fit keys of {keys.shape[-1]}")
    return turn.first, pairs, cos.data_ptr(), sin.data_ptr(), positions


def _first_bad(runs: np.ndarray, pages: np.ndarray, where: Geometry) -> int:
    """The number of the first run that is out of bounds, or -1; what a kernel says, for when there is none."""
    tokens = runs[:, TOKENS]
    bad = (runs[:, TOKEN:] < 0).any(axis=1) | (runs[:, TOKEN] + tokens > runs[:, STRIDE])
    bad |= runs[:, POSITION] + tokens > where.positions
    bad |= runs[:, COLUMN] + tokens > where.page * pages.size
    for number, (column, count) in enumerate(zip(runs[:, COLUMN].tolist(), tokens.tolist(), strict=True)):
        used = pages[column // where.page : -(-(column + count) // where.page)]
        bad[number] |= bool(((used < 0) | (used >= where.pages)).any())
    return int(bad.argmax()) if bad.any() else -1


def _build(form: int) -> Kernel:
    """The compiled kernel, after it did as plain torch does: whole rows, parts, vectors that overlap, single pairs."""
    from kvstore.tensors.rope_cpu import kernel_for

    kernel = kernel_for(form)
    generator = torch.Generator().manual_seed(form)
    dtype = next((dtype for dtype, number in DTYPES.items() if number == form & 3), torch.bfloat16)
    rounded = bool(form & ROUNDED) or dtype == torch.float32
    pairing = INTERLEAVED if form & geometry.INTERLEAVED else HALF
    for (pairs, first), stream_from in product(((64, 0), (41, 1), (12, 16), (5, 2)), (0, STREAM_BYTES)):
        stride, dims = 19, 2 * (pairs + first)
        keys, values = (torch.randn(2, stride, dims, generator=generator).to(dtype) for _ in "kv")
        cos, sin = (torch.randn(50, pairs, generator=generator).to(dtype if rounded else torch.float32) for _ in "cs")
        turn = None if form == NO_TURN else Turn(cos, sin, pairing, rounded, first)
        source = keys.data_ptr(), values.data_ptr(), stride
        runs = np.array([[*source, 1, 17, 30, 2], [*source, 0, 3, 5, 20]], dtype=np.int64)
        made, right = (Target(*torch.zeros(2, 2, 24, dims, dtype=dtype)) for _ in "mr")
        where, pages = numbers(turn, made)
        bad = kernel(runs, pages, where._replace(stream_from=stream_from))
        plain.transfer(runs, turn, right)
        if bad >= 0 or not (torch.equal(made.keys, right.keys) and torch.equal(made.values, right.values)):
            raise ValueError(f"it does not do as plain torch does, with {pairs} pairs")
    return kernel


def _build_gpu() -> Transfer:
    """The Triton kernel, after it did as plain torch does on the device; what it needs for other turns comes later."""
    from kvstore.tensors import rope_gpu

    device, generator = torch.device("cuda"), torch.Generator().manual_seed(1)
    keys = torch.randn(2, 19, 64, generator=generator).to(device, torch.bfloat16)
    cos, sin = torch.randn(2, 50, 32, generator=generator).to(device, torch.bfloat16)
    turn = Turn(cos, sin, HALF, rounded=True)
    runs = np.array([[keys.data_ptr(), keys.data_ptr(), 19, 1, 17, 30, 2]], dtype=np.int64)
    made, right = (Target(*torch.zeros(2, 2, 24, 64, dtype=torch.bfloat16, device=device)) for _ in "mr")
    rope_gpu.transfer(runs, turn, made)
    plain.transfer(runs, turn, right)
    if not (torch.equal(made.keys, right.keys) and torch.equal(made.values, right.values)):
        raise ValueError("it does not do as plain torch does")
    return rope_gpu.transfer


def _kernels() -> Iterator[tuple[int, Compiled[Kernel]]]:
    yield NO_TURN, Compiled("the CPU kernel that only copies", partial(_build, NO_TURN))
    for (dtype, number), pairing, rounds in product(DTYPES.items(), (HALF, INTERLEAVED), (False, True)):
        form = number + (0 if pairing == HALF else geometry.INTERLEAVED) + (ROUNDED if rounds else 0)
        if dtype != torch.float32 or not rounds:  # float32 needs no form that rounds
            name = f"the CPU kernel for {dtype}, {pairing}{', rounded' if rounds else ''}"
            yield form, Compiled(name, partial(_build, form))


KERNELS = dict(_kernels())
GPU: Compiled[Transfer] = Compiled("the GPU kernel", _build_gpu)
