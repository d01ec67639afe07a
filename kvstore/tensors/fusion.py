"""Layers whose keys and values are weighted sums of those of other layers, channel by channel, and plain torch for it.

From FusedKV: ``K_i = sum_j a_j * K_j`` and ``V_i = sum_j b_j * V_j``, where K_j are keys as they are cached, that is
after their rotation by RoPE. Nothing is rotated again. A sum of rotated keys is the rotated sum, and scores depend on
distances only, if both channels of a rotary pair have the same weight: then ``a_j * R k = R (a_j * k)`` for each R that
rotates the pair. For unequal weights w, w' of a pair, the score has a second part, ``(w - w') / 2`` times a term that
depends on the sum of the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import BadInput
from kvstore.tensors.rope import HALF, INTERLEAVED

PIECE = 1024  # tokens that are summed at a time where nobody wants gradients


@dataclass(frozen=True, eq=False)
class Fusion:
    """The weights of one layer, each [sources, kv heads, dim] of float32, on any device; ``keys`` must be tied."""

    keys: Tensor
    values: Tensor


def tied(weights: Tensor, pairing: str) -> Tensor:
    """[..., dim/2] numbers, one for each rotary pair, as [..., dim]: the same in both channels of a pair.

    ``pairing``: of ``rope``. ``BadInput`` for another one.
    """
    if pairing == HALF:
        return torch.cat((weights, weights), dim=-1)
    if pairing == INTERLEAVED:
        return weights.repeat_interleave(2, dim=-1)
    raise BadInput(f"pairing {pairing!r}; {HALF!r} or {INTERLEAVED!r} is needed")


def learns(*tensors: Tensor) -> bool:
    """Whether a gradient is wanted with respect to any of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def rebuilt(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of ``states``, each [batch, kv heads, tokens, dim]; a new contiguous tensor of their dtype.

    ``weights``: [sources, kv heads, dim]. The sum is computed in float32 and rounded once; in float64 for float64.
    Differentiable; without gradients, only pieces of the sum exist in float32. ``BadInput``: not as many weights as
    states.
    """
    tokens = states[0].shape[2]
    if learns(*states, weights) or tokens <= PIECE:
        return summed(states, weights).to(states[0].dtype)
    made = torch.empty(states[0].shape, dtype=states[0].dtype, device=states[0].device)
    for start in range(0, tokens, PIECE):
        piece = slice(start, start + PIECE)
        made[:, :, piece] = summed([state[:, :, piece] for state in states], weights)
    return made


def summed(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``rebuilt`` before it is rounded.

    Products and sums are separate operations, not multiply-adds: how those round depends on where vectors begin.
    """
    if len(states) != weights.shape[0]:
        raise BadInput(f"{len(states)} sources, and weights for {weights.shape[0]}")
    wide = torch.promote_types(states[0].dtype, torch.float32)
    factors = weights.to(device=states[0].device, dtype=wide).unsqueeze(2)
    made = states[0].contiguous().to(wide) * factors[0]
    for state, factor in zip(states[1:], factors[1:], strict=True):
        made = made + state.contiguous().to(wide) * factor
    return made


def additive(mask: Tensor | None, tokens: int, context: int, like: Tensor) -> Tensor | None:
    """What to add to scores [..., tokens, context]: the mask's numbers, and -inf where nothing is to be seen.

    ``mask``: None for causal, the last query seeing all of the context; bool with True for what is seen; or numbers,
    of which all that are at most half the lowest of their dtype hide. The result has ``like``'s dtype and device, and
    is None where all is seen.
    """
    if mask is None:
        if tokens == 1:
            return None
        shown = torch.ones(tokens, context, dtype=torch.bool, device=like.device).tril(context - tokens)
        return like.new_zeros(1, 1, tokens, context).masked_fill(~shown, -torch.inf)
    if mask.dtype == torch.bool:
        return like.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return mask.to(like.dtype).masked_fill(hidden, -torch.inf)


def sighted(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``bias`` [..., tokens, context] that see nothing, as True in [..., tokens, 1]; and a bias whose rows all
    see something, so that no softmax of them, nor its gradient, is NaN.
    """
    blind = (bias == -torch.inf).all(dim=-1, keepdim=True)
    return blind, bias.masked_fill(blind, 0)


def reference(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    fusion: Fusion,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """``fused_attention.attend`` in its plainest form, for comparison: all in float32, or float64 for float64.

    Rows that see nothing are zero.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    k = summed([state.to(wide) for state in keys], fusion.keys)
    v = summed([state.to(wide) for state in values], fusion.values)
    k, v = (states.repeat_interleave(queries.shape[1] // k.shape[1], dim=1) for states in (k, v))
    scores = queries.to(wide) @ k.transpose(-1, -2) * scaling
    bias = additive(mask, queries.shape[2], k.shape[2], scores)
    if bias is None:
        made = scores.softmax(dim=-1) @ v
    else:
        blind, bias = sighted(bias)
        made = ((scores + bias).softmax(dim=-1) @ v).masked_fill(blind, 0)
    return made.transpose(1, 2).to(queries.dtype).contiguous()
