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
MANY = 2049  # tokens, so that torch shares the work among its threads


def find_form(rotation: Rotation, heads: int, dim: int, dtype: torch.dtype) -> Form | None:
    """The form that equals ``rotation`` on keys of ``heads`` and ``dim``; None when there is none."""
    if rotation.function is None or rotation.table is None:
        return None
    source = torch.Generator().manual_seed(dim)
    keys = (4 * torch.randn((1, heads, TRIED, dim), generator=source)).to(dtype)
    device = rotation.table.upto(FAR + TRIED)[0].device
    keys = keys.to(device)
    # A product of complex numbers may be fused. That shows in float32; rounded to 16 bits it would show once in a year.
    fused = any(output.is_complex() for output in rotation.table.upto(FAR + TRIED))
    trials = [(tried, start) for tried in ((keys, keys.float()) if fused else (keys,)) for start in (0, FAR)]
    expected = [rotation.rotate(tried, start) for tried, start in trials]
    for form in _forms(rotation, dim, dtype):
        turn = form.upto(FAR + TRIED)
        if turn.first + 2 * turn.pairs > dim:
            continue
        if all(
            torch.equal(turned(tried, turn, torch.arange(start, start + TRIED, device=device)), wanted)
            for (tried, start), wanted in zip(trials, expected, strict=True)
        ):
            return form
    return None


def is_steady(rotation: Rotation, heads: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether a key has the same bits at its position, whatever is turned with it and however it lies in memory.

    Elementwise functions of torch do not all keep to that: one that fuses a multiply-add in the rest of a loop, and
    not in its vectors, makes keys of a prompt that no load of them in other pieces can give back.
    """
    if rotation.table is None:
        return True
    source = torch.Generator().manual_seed(dim)
    device = rotation.table.upto(MANY)[0].device
    wide = (4 * torch.randn((1, heads, MANY, 2 * dim), generator=source)).to(device, dtype)
    keys = wide[..., dim:]
    expected = rotation.rotate(keys, 0)
    return all(
        torch.equal(rotation.rotate(given[:, :, first:last], first), expected[:, :, first:last])
        for given in (keys, keys.contiguous())
        for first, last in ((0, 1), (1, 4), (4, 95), (95, MANY))
    )


def _forms(rotation: Rotation, dim: int, dtype: torch.dtype) -> Iterator[Form]:
    """What could be, likeliest first."""
    table = rotation.table
    assert table is not None
    used = {which for _, which in rotation.angle_slots}
    outputs = {place: part for place, (which, part) in enumerate(table.known(FAR + TRIED).real) if which in used}
    first = 0 if rotation.part is None else rotation.part[0]
    for cos, sin in permutations(outputs, 2):
        angles = outputs[cos]
        if angles.shape != outputs[sin].shape or not angles.is_floating_point():
            continue
        rounding = [True, False] if angles.dtype == dtype else [False]
        for half in (FIRST_HALF, EVERY_SECOND, ALL):
            for rounded in rounding if dtype != torch.float32 else [True]:
                for pairing in (HALF, INTERLEAVED):
                    yield Form(table, cos, sin, half, pairing, rounded, first)
