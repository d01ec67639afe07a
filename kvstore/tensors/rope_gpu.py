"""One pass over memory on the GPU: gather from raw addresses, turn the keys, scatter to where an engine reads.

Needs Triton. Under Triton's interpreter (``TRITON_INTERPRET=1`` before the first import) the addresses are the host's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvstore.errors import BadInput
from kvstore.tensors.rope import HALF, Turn
from kvstore.tensors.rope_triton import move
from kvstore.tensors.runs import COLUMN, POSITION, STRIDE, TOKEN, TOKENS, VALUES, Target

WIDEST = 16  # bytes of the widest access of a thread
TILE_BYTES = 8192  # of one head that a program moves at a time: four widest accesses of each of its threads
# A product or sum that the model rounds must not become part of a multiply-add, which rounds once.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Programs from which on one program takes several heads and reads its tables once: some waves of the largest GPUs.
ENOUGH_PROGRAMS = 4096
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@dataclass(frozen=True, eq=False)
class Prepared:
    """Runs that are on the device already. For many layers at once: one copy instead of one per layer.

    To be used on the stream that they were prepared on, or on one that waits for it; and to be kept until the last
    launch with them is done if that is another one. A launch with prepared runs can be captured in a CUDA graph.
    """

    table: torch.Tensor  # [n, 7] or [layers, n, 7] int64
    longest: int  # tokens of the longest run
    positions: int  # that the tables must have
    columns: int  # that the target must have
    address_bits: int  # all addresses, joined by "or": tells how they are aligned

    def layer(self, number: int) -> Prepared:
        """The runs of one layer."""
        return Prepared(self.table[number], self.longest, self.positions, self.columns, self.address_bits)


def prepare(runs: np.ndarray, device: torch.device) -> Prepared:
    """Sends ``runs`` ([n, 7], or [layers, n, 7]; int64) to ``device`` on the current stream, without waiting for it.

    ``BadInput``: a run leaves its block.
    """
    if not runs.size:
        return Prepared(torch.empty(runs.shape, dtype=torch.int64, device=device), 0, 0, 0, 0)
    tokens = runs[..., TOKENS]
    if runs[..., TOKEN:].min() < 0 or (runs[..., TOKEN] + tokens > runs[..., STRIDE]).any():
        raise BadInput("a run leaves its block, or has a negative position or column")
    table = torch.from_numpy(np.ascontiguousarray(runs, dtype=np.int64))
    if device.type == "cuda":
        try:
            pinned = table.pin_memory()  # torch does not use it again before the copy is done
        except RuntimeError:  # no more memory can be pinned: the copy is staged
            pinned = table
        table = pinned.to(device, non_blocking=True)
    return Prepared(
        table,
        int(tokens.max()),
        int((runs[..., POSITION] + tokens).max()),
        int((runs[..., COLUMN] + tokens).max()),
        int(np.bitwise_or.reduce(runs[..., : VALUES + 1], axis=None)),
    )


def transfer(runs: np.ndarray | Prepared, turn: Turn | None, target: Target) -> None:
    """``tensors.transfer.transfer`` for a target on CUDA: one launch on the current stream, nothing waits.

    ``BadInput``: a run leaves its block, the tables or the target, or tables or target are not what ``Turn`` and
    ``Target`` say; nothing was launched then. What ``target.pages`` holds is not looked at: it is on the device.
    The first call for a kind of turn, target and alignment compiles for seconds; no number of tokens or heads does.
    """
    ready = runs if isinstance(runs, Prepared) else prepare(runs, target.keys.device)
    if not ready.longest:
        return
    constants = form(ready.address_bits, turn, target)
    columns = target.keys.shape[1] * (1 if target.pages is None else target.pages.shape[0])
    if ready.columns > columns:
        raise BadInput(f"runs end at column {ready.columns}, the target at {columns}")
    if turn is not None and ready.positions > turn.cos.shape[0]:
        raise BadInput(f"runs end at position {ready.positions}, the tables at {turn.cos.shape[0]}")
    heads = _heads(target)
    chunks = triton.cdiv(ready.longest, constants["TILE"])
    pieces = 2 * chunks * ready.table.shape[0]  # of one head: keys and values
    heads_each = min(heads, max(1, pieces * heads // ENOUGH_PROGRAMS))
    groups = triton.cdiv(heads, heads_each)
    numbers = _numbers(ready.table.data_ptr(), chunks, groups, heads_each, turn, target)
    with torch.cuda.device_of(target.keys):
        move[(pieces * groups,)](*numbers, **constants, **OPTIONS)


def _heads(target: Target) -> int:
    return target.keys.shape[0 if target.pages is None else 2]


def _numbers(table: int, chunks: int, groups: int, each: int, turn: Turn | None, target: Target) -> tuple[int, ...]:
    """The kernel's arguments: addresses, counts, steps in bytes."""
    pages = 0 if target.pages is None else target.pages.data_ptr()
    cos, sin = (0, 0) if turn is None else (turn.cos.data_ptr(), turn.sin.data_ptr())
    addresses = table, cos, sin, target.keys.data_ptr(), target.values.data_ptr(), pages
    steps: list[int] = []  # from one head, column and page to the next
    for tensor in (target.keys, target.values):
        first, second, third = (step * tensor.itemsize for step in tensor.stride()[:3])
        steps += [first, second, 0] if target.pages is None else [third, second, first]
    return *addresses, chunks, groups, each, _heads(target), *steps


def form(address_bits: int, turn: Turn | None, target: Target) -> dict[str, Any]:
    """The kernel's constants; each set of them is compiled for itself. ``address_bits``: see ``Prepared``."""
    keys, values = target.keys, target.values
    fits = keys.shape[:-1] == values.shape[:-1] and keys.dtype == values.dtype and keys.itemsize in WORDS
    if not fits or any(tensor.stride(-1) != 1 and tensor.shape[-1] > 1 for tensor in (keys, values)):
        raise BadInput("keys and values of a target must go together, their last dims contiguous")
    pages = target.pages
    if pages is not None and not (pages.dtype == torch.int64 and pages.is_contiguous() and pages.device == keys.device):
        raise BadInput(f"pages of {pages.dtype} on {pages.device}; contiguous int64 on {keys.device} is needed")
    item, dims = keys.itemsize, (keys.shape[-1], values.shape[-1])
    bits = address_bits | dims[0] * item | dims[1] * item
    for tensor in (keys, values):
        if tensor.shape[-1]:
            bits |= tensor.data_ptr()
            for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
                bits |= step * item if size > 1 else 0
    return {
        "KEY_DIM": dims[0],
        "VALUE_DIM": dims[1],
        "PAGE_TOKENS": 0 if target.pages is None else keys.shape[1],
        "TILE": max(1, TILE_BYTES // triton.next_power_of_2(max(dims) * item)),
        "WORD": WORDS[item],
        "ALIGNED": _aligned(bits),
        **_turning(turn, keys, _aligned(bits)),
    }


def _aligned(bits: int) -> int:
    """The widest access that suits addresses and steps which, joined by "or", are ``bits``."""
    return min(bits & -bits, WIDEST) or WIDEST


def _turning(turn: Turn | None, keys: torch.Tensor, aligned: int) -> dict[str, Any]:
    """The constants that say how keys turn."""
    if turn is None:
        return {"FIRST": 0, "PAIRS": 0, "PAIRED": "", "KIND": "", "TABLE": "", "TABLES_ALIGNED": 1}
    cos, sin = turn.cos, turn.sin
    dtype = keys.dtype if turn.rounded else torch.float32
    if keys.dtype not in NAMES or not (cos.dtype == sin.dtype == dtype and cos.shape == sin.shape):
        raise BadInput(f"keys of {keys.dtype} do not turn by tables of {cos.dtype} and {sin.dtype}")
    if not cos.device == sin.device == keys.device:
        raise BadInput(f"tables on {cos.device} and {sin.device} cannot turn keys on {keys.device}")
    if not (cos.is_contiguous() and sin.is_contiguous() and 0 <= turn.first <= keys.shape[-1] - 2 * turn.pairs):
        raise BadInput(f"{turn.pairs} pairs from dim {turn.first} on do not fit keys of {keys.shape[-1]}")
    paired = "half"
    if turn.pairing != HALF:  # both of a pair in one access, where they lie that way
        paired = "words" if aligned >= 2 * keys.itemsize and turn.first % 2 == 0 else "apart"
    return {
        "FIRST": turn.first,
        "PAIRS": turn.pairs,
        "PAIRED": paired,
        "KIND": NAMES[keys.dtype],
        "TABLE": NAMES[dtype],
        "TABLES_ALIGNED": _aligned(cos.data_ptr() | sin.data_ptr() | turn.pairs * cos.itemsize),
    }
