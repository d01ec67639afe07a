"""Finding a plain form of a model's rotation, which a kernel can do: same bits, one pass over memory.

The model's own function stays the judge. A form counts only when it gives the function's bits on random keys, near
position 0 and far from it; where none does, keys are turned by the function itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch

from kvstore.adapters.transformers.rotation import ALL, EVERY_SECOND, FIRST_HALF, Form, Rotation
from kvstore.tensors.rope import HALF, INTERLEAVED, turned

TRIED = 96  # tokens in each trial
FAR = 4000  # where the second trial starts


def find_form(rotation: Rotation, heads: int, dim: int, dtype: torch.dtype) -> Form | None:
    """The form that equals ``rotation`` on keys of ``heads`` and ``dim``; None when there is none."""
    if rotation.function is None or rotation.table is None:
        return None
    source = torch.Generator().manual_seed(dim)
    keys = (4 * torch.randn((1, heads, TRIED, dim), generator=source)).to(dtype)
    device = rotation.table.upto(FAR + TRIED)[0].device
    keys = keys.to(device)
    expected = {start: rotation.rotate(keys, start) for start in (0, FAR)}
    for form in _forms(rotation, dim, dtype):
        turn = form.upto(FAR + TRIED)
        if turn.first + 2 * turn.pairs > dim:
            continue
        if all(
            torch.equal(turned(keys, turn, torch.arange(start, start + TRIED, device=device)), wanted)
            for start, wanted in expected.items()
        ):
            return form
    return None


def _forms(rotation: Rotation, dim: int, dtype: torch.dtype) -> Iterator[Form]:
    """What could be, likeliest first."""
    table = rotation.table
    assert table is not None
    outputs = table.upto(FAR + TRIED)
    first = 0 if rotation.part is None else rotation.part[0]
    used = sorted({which for _, which in rotation.angle_slots})
    for cos, sin in permutations(used, 2):
        angles = outputs[cos]
        if angles.shape != outputs[sin].shape or not angles.is_floating_point():
            continue
        rounding = [True, False] if angles.dtype == dtype else [False]
        for half in (FIRST_HALF, EVERY_SECOND, ALL):
            for rounded in rounding if dtype != torch.float32 else [True]:
                for pairing in (HALF, INTERLEAVED):
                    yield Form(table, cos, sin, half, pairing, rounded, first)
