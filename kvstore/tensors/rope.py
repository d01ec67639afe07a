"""What a rotation of keys is, and the plain torch form of it that every kernel must equal bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HALF, INTERLEAVED = "half", "interleaved"


@dataclass(frozen=True, eq=False)
class Turn:
    """How keys are turned: which dims, paired how, by which tables, in which arithmetic.

    Key dims ``first`` to ``first + 2 * pairs`` turn, the others stay. With ``pairing`` "half", dim ``i`` of the turned
    ones goes with ``i + pairs``; with "interleaved", ``2i`` goes with ``2i + 1``. For a pair (x, y) at position p:
    ``x' = x cos[p] - y sin[p]`` and ``y' = y cos[p] + x sin[p]``.

    ``rounded``: the tables have the keys' dtype, and every product and sum is rounded to it, as a model does that
    computes in it. Otherwise the tables are float32, and so is the arithmetic; only the result is rounded. Nothing is
    ever fused into a multiply-add. For float32 keys both are the same; ``rounded`` is True then.
    """

    cos: torch.Tensor  # [positions, pairs], contiguous
    sin: torch.Tensor
    pairing: str
    rounded: bool
    first: int = 0

    @property
    def pairs(self) -> int:
        """Number of pairs of dims that turn."""
        return int(self.cos.shape[-1])


def turned(keys: torch.Tensor, turn: Turn, positions: torch.Tensor) -> torch.Tensor:
    """``keys`` of shape [..., tokens, dim] at ``positions`` [tokens]; a new tensor of the same dtype."""
    first, last = turn.first, turn.first + 2 * turn.pairs
    part = keys[..., first:last]
    if turn.pairing == HALF:
        x, y = part[..., : turn.pairs], part[..., turn.pairs :]
    else:
        x, y = part[..., 0::2], part[..., 1::2]
    cos, sin = turn.cos[positions], turn.sin[positions]
    if not turn.rounded:
        x, y = x.float(), y.float()
    one, two = x * cos - y * sin, y * cos + x * sin
    if turn.pairing == HALF:
        made = torch.cat((one, two), dim=-1)
    else:
        made = torch.stack((one, two), dim=-1).flatten(-2)
    return torch.cat((keys[..., :first], made.to(keys.dtype), keys[..., last:]), dim=-1)
