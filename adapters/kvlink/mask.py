"""Who sees whom: documents only themselves, all that is shared everything before it."""

from __future__ import annotations

import torch

from kvstore.adapters.kvlink.layout import PADDING, SHARED


def block_mask(segments: torch.Tensor) -> torch.Tensor:
    """Bool [rows, 1, tokens, tokens] of ``segments`` [rows, tokens]: row t sees column s.

    It does when s is not behind t and either both are of one segment, or t's is 0. Documents do not even see the
    system prompt: they are what was encoded alone. Padding (-1) is seen by padding only, which keeps its rows finite.
    """
    causal = causal_mask(segments)
    rows, columns = segments[:, None, :, None], segments[:, None, None, :]
    return causal & ((rows == columns) | (rows == SHARED))


def causal_mask(segments: torch.Tensor) -> torch.Tensor:
    """The same shape for ordinary attention: all that is not behind, but no padding."""
    tokens = segments.shape[1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=segments.device).tril()
    padding = segments == PADDING
    return before & (padding[:, None, :, None] == padding[:, None, None, :])


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as transformers models take it: 0 where a column is seen, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
