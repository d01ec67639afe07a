"""Rotation of queries and keys, for both ways to pair dims, by the tables of transformers' rotary embedding."""

from __future__ import annotations

import torch


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``states`` [batch, heads, tokens, dim], turned by tables [batch or 1, tokens, dim] whose halves are equal.

    In the states' dtype, every product and sum rounded to it, as Llama and Qwen3 do.
    """
    half = states.shape[-1] // 2
    if interleaved:
        cos, sin = (table[..., :half].repeat_interleave(2, dim=-1) for table in (cos, sin))
        across = torch.stack((-states[..., 1::2], states[..., 0::2]), dim=-1).flatten(-2)
    else:
        across = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cos.unsqueeze(1) + across * sin.unsqueeze(1)


def apply_rotary_pos_emb(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``turned``, under the name by which the store's adapter knows the rotation of keys; queries do not pass here."""
    return turned(keys, cos, sin, interleaved)
