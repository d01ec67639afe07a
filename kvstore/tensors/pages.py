"""Between blocks and the paged cache of an engine, whatever order its pages keep: there and back, keys turned or not.

An engine's cache of one layer has pages of some tokens each. Where an element of a page lies may be another matter
than what the tensor's shape says: ``probe`` finds it out. ``Pages.plain`` is for tensors that are what they say.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import torch

from kvstore.compiled import Compiled
from kvstore.errors import BadInput
from kvstore.tensors import pages_plain
from kvstore.tensors.geometry import Kernel
from kvstore.tensors.grids import Grid, Pages
from kvstore.tensors.pages_trials import trials
from kvstore.tensors.paging import STAGE, TAKE, Paging, PagingKernel
from kvstore.tensors.rope import Turn
from kvstore.tensors.runs import COLUMN, KEYS, STRIDE, VALUES, Target
from kvstore.tensors.transfer import KERNELS, STREAM_BYTES, compiled_for, numbers, transfer

__all__ = ["Grid", "Pages", "gather", "put", "put_kernel", "take", "TAKE_KERNEL"]


def put(
    runs: np.ndarray, turn: Turn | None, pages: Pages, table: np.ndarray | torch.Tensor, first_head: int = 0
) -> None:
    """Brings ``runs`` [n, 7] int64, as ``transfer`` has them, from blocks into ``pages``.

    ``table`` [m] int64: the page that holds columns ``i * page_tokens`` and after. The heads of the pages are heads
    ``first_head`` and after of the blocks, which must have them. ``turn`` None: keys stay as they are.

    Any thread; what calls at the same time write must not overlap. On the CPU the work is done without Python's lock
    and allocates nothing per run, once the kernel for this kind of turn is there; the first call asks for it. On CUDA
    it is ``transfer``, on the current stream, and what a table on the device holds is not looked at. The memory behind
    the addresses must stay until this returns (CPU) or until the stream has done the work (CUDA).
    ``BadInput``: a run leaves its block, the tables or the pages (on the CPU nothing was written then), or tables are
    not what ``Turn`` says. ``Unsupported``: on CUDA, pages that are no ``tensors``.
    """
    if first_head < 0:
        raise BadInput(f"the first head of a block is head 0, not {first_head}")
    if first_head:
        runs = runs.copy()
        for address, grid in ((KEYS, pages.keys), (VALUES, pages.values)):
            runs[:, address] += first_head * runs[:, STRIDE] * grid.dims.size * pages.dtype.itemsize
    if pages.device.type == "cuda":
        transfer(runs, turn, Target(*pages.tensors, torch.as_tensor(table, device=pages.device)))
    elif not _moved(put_kernel(turn, pages.dtype), runs, turn, pages, np.asarray(table)):
        pages_plain.put(runs, turn, pages, np.asarray(table))


def take(runs: np.ndarray, pages: Pages, table: np.ndarray | torch.Tensor) -> None:
    """The other way: from ``pages`` into blocks of as many heads, which the addresses of ``runs`` [n, 7] say.

    As ``put`` in all else; positions are not looked at.
    """
    if pages.device.type == "cuda":
        table = torch.as_tensor(table, device=pages.device)
        for row in runs.tolist():
            gather(pages, table, row[COLUMN], *pages_plain.rows_of(row, pages))
    elif not _moved(TAKE_KERNEL, runs, None, pages, np.asarray(table)):
        pages_plain.take(runs, pages, np.asarray(table))


def gather(pages: Pages, table: torch.Tensor, column: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Fills ``keys`` and ``values`` [heads, tokens, dim] with the columns from ``column`` on; for saves from a GPU.

    ``table`` [m] int64 is on the pages' device; what it holds is not looked at. Runs on the current stream, in a few
    launches for any number of tokens. ``Unsupported``: pages that are no ``tensors``.
    """
    columns = torch.arange(column, column + keys.shape[1], device=pages.device)
    numbers, inside = table[columns // pages.page_tokens], columns % pages.page_tokens
    for cache, target in zip(pages.tensors, (keys, values), strict=True):
        target.copy_(cache[numbers, inside].transpose(0, 1))


def put_kernel(turn: Turn | None, dtype: torch.dtype) -> Compiled[PagingKernel] | None:
    """What ``put`` uses for such keys on the CPU; ``wait`` on it to have it from then on. None: plain torch does."""
    turning = compiled_for(turn, dtype)
    return None if turning is None else PUT_KERNELS[turning]


def _moved(
    compiled: Compiled[PagingKernel] | None, runs: np.ndarray, turn: Turn | None, pages: Pages, table: np.ndarray
) -> bool:
    """Whether the kernel is there, and has done it. ``BadInput``: something is out of bounds."""
    paging = _paging(turn, pages, STREAM_BYTES)
    kernel = compiled.get() if compiled is not None and (paging.batch or turn is None) else None
    runs, table = np.ascontiguousarray(runs, dtype=np.int64), np.ascontiguousarray(table, dtype=np.int64)
    bad = _first_bad(runs, table, paging) if kernel is None else kernel(runs, table, paging, *pages.sides)
    if bad >= 0:
        raise BadInput(f"run {bad} leaves its block, the tables or the pages: {runs[bad].tolist()}")
    return kernel is not None


def _paging(turn: Turn | None, pages: Pages, stream_from: int) -> Paging:
    """What a kernel has to know beside the pages' sides. ``BadInput``: the tables do not fit."""
    dims = pages.keys.dims.size, pages.values.dims.size
    where, _ = numbers(turn, Target(*(torch.empty((1, 1, dim), dtype=pages.dtype) for dim in dims)))
    angles = 0 if turn is None else where.pairs * turn.cos.itemsize
    turning = where.first, where.pairs, where.cos, where.sin, where.positions, angles, 0
    batch = 1 << (STAGE // max(where.key_bytes, 1)).bit_length() >> 1  # 0: the stage has no room for one key
    return Paging(pages.heads, pages.page_tokens, pages.count, *turning, batch, stream_from)


def _first_bad(runs: np.ndarray, table: np.ndarray, paging: Paging) -> int:
    """The number of the first run that is out of bounds, or -1; what a kernel says, for when there is none."""
    good = table[(table >= 0) & (table < paging.pages)].size == table.size
    for number, (stride, token, tokens, position, column) in enumerate(runs[:, STRIDE:].tolist()):
        used = table[max(column, 0) // paging.page : -(-(column + tokens) // paging.page)]
        inside = min(token, tokens, position, column) >= 0 and token + tokens <= stride
        inside &= position + tokens <= paging.positions and column + tokens <= paging.page * table.size
        if not inside or (not good and bool(((used < 0) | (used >= paging.pages)).any())):
            return number
    return -1


def _build(form: int) -> PagingKernel:
    """The compiled kernel, after it did as plain torch does."""
    from kvstore.tensors.pages_cpu import kernel_for

    kernel = kernel_for(form)
    for trial, stream_from in product(trials(form), (0, STREAM_BYTES)):
        pages, runs, table = trial.pages, trial.runs, trial.table
        memory = trial.blocks if form == TAKE else pages.memory[0]
        before = memory.clone()
        bad = kernel(runs, table, _paging(trial.turn, pages, stream_from), *pages.sides)
        made = memory.clone()
        memory.copy_(before)
        if form == TAKE:
            pages_plain.take(runs, pages, table)
        else:
            pages_plain.put(runs, trial.turn, pages, table)
        if bad >= 0 or not torch.equal(made.view(torch.uint8), memory.view(torch.uint8)):
            raise ValueError(f"it does not do as plain torch does, with {pages.dtype} in the order {pages.sides}")
    return kernel


# By the kernel of ``transfer`` that turns keys in the same way.
PUT_KERNELS: dict[Compiled[Kernel], Compiled[PagingKernel]] = {
    kernel: Compiled(f"{kernel.name}, into pages", partial(_build, form)) for form, kernel in KERNELS.items()
}
TAKE_KERNEL: Compiled[PagingKernel] = Compiled("the CPU kernel that takes out of pages", partial(_build, TAKE))
