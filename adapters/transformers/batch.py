"""Rows and padding: what the caller gave, and how it is laid out for the model.

Two layouts. By rows: each row keeps its whole hit, cached tokens right-aligned in the first columns and new tokens
right-aligned in the others; holes are masked and positions are explicit. By columns: the caller's own columns, cut at
one place for all rows; needed where attention counts columns (sliding windows), or where something reads the ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.errors import BadInput, Unsupported


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts: the token ids of each row without padding, and the caller's own tensor."""

    rows: list[list[int]]
    given: torch.Tensor
    single: bool  # one prompt: results are plain values, not lists
    padding: int


@dataclass(frozen=True)
class Plan:
    """A batch laid out for the model; the first ``columns`` are cached, ``tokens[i]`` of them belong to row i."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    columns: int
    tokens: list[int]


def read_prompts(input_ids: Any, attention_mask: Any, padding: int | None, vocabulary: int | None) -> Prompts:
    """Understand what a caller calls prompts: ids as tensor or lists, flat or batched, padded on either side."""
    if isinstance(input_ids, dict) or hasattr(input_ids, "input_ids"):
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    pad = 0 if padding is None else padding
    if isinstance(input_ids, list | tuple) and input_ids and isinstance(input_ids[0], list | tuple):
        width = max(len(row) for row in input_ids)
        if attention_mask is None:
            attention_mask = [[0] * (width - len(row)) + [1] * len(row) for row in input_ids]
        input_ids = [[pad] * (width - len(row)) + list(row) for row in input_ids]
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"input_ids must be token ids, as a list or a tensor: {error}") from None
    if ids.is_floating_point() or ids.is_complex() or ids.ndim not in (1, 2) or ids.numel() == 0:
        raise BadInput(f"input_ids must be whole numbers of shape [tokens] or [rows, tokens], not {tuple(ids.shape)}")
    ids = ids.reshape(1, -1) if ids.ndim == 1 else ids
    here = ids.to("cpu")
    mask = _read_mask(here, attention_mask, padding)
    rows = _rows(here, mask)
    low, top = (int(end) for end in (here if mask is None else here[mask]).aminmax())
    if vocabulary is not None and (top >= vocabulary or low < 0):
        raise BadInput(f"input_ids hold token {top}, but the model's vocabulary has {vocabulary} tokens")
    return Prompts(rows, ids, ids.shape[0] == 1, pad)


def _read_mask(ids: torch.Tensor, given: Any, padding: int | None) -> torch.Tensor | None:
    """True where ``ids``, in host memory, is a token; None where all are."""
    if given is not None:
        mask = torch.as_tensor(given).to("cpu")
        mask = mask.reshape(1, -1) if mask.ndim == 1 else mask
        if mask.ndim != 2:
            raise Unsupported(
                f"an attention mask with {mask.ndim} dimensions is a custom mask, whose keys and values cannot be "
                "shared; give a mask of shape [rows, tokens] or none"
            )
        if mask.shape != ids.shape:
            raise BadInput(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
        return mask != 0
    if padding is None or ids.shape[0] == 1:
        return None
    # As a tokenizer pads: a run of padding in front is no token; the same id further in is one.
    leading = (ids == padding).to(torch.int8).cumprod(dim=1).to(torch.bool)
    leading[:, -1] = False
    return ~leading


def _rows(ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    if mask is None:
        found: list[list[int]] = ids.tolist()
        return found
    rows = []
    for number, (row, valid) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if not any(valid):
            raise BadInput(f"row {number} has no tokens; drop it")
        first, last = valid.index(True), len(valid) - valid[::-1].index(True)
        if not all(valid[first:last]):
            raise Unsupported(
                f"the attention mask hides tokens inside row {number}; such keys and values depend on the mask and "
                "cannot be shared; mask padding at the ends only"
            )
        rows.append(row[first:last])
    return rows


def cut_by_columns(prompts: Prompts, hits: Sequence[int]) -> tuple[int, list[int]]:
    """(columns, tokens of each row) when all rows are cut at one column."""
    width = max(len(row) for row in prompts.rows)
    pads = [width - len(row) for row in prompts.rows]
    columns = min(pad + hit for pad, hit in zip(pads, hits, strict=True))
    tokens = [max(0, columns - pad) for pad in pads]
    return (columns, tokens) if any(tokens) else (0, [0] * len(tokens))


def lay_out(prompts: Prompts, columns: int, tokens: Sequence[int], device: torch.device) -> Plan:
    """Put row i's first ``tokens[i]`` at the end of the cached columns and the rest at the end of all columns."""
    width = columns + max(len(row) - cached for row, cached in zip(prompts.rows, tokens, strict=True))
    if prompts.single and len(prompts.rows[0]) == width == prompts.given.shape[1]:
        # Made where it is wanted: what is sent to a device now stands behind all that a load has sent.
        ids = prompts.given.to(device, torch.long, copy=True)
        return Plan(ids, torch.ones_like(ids), torch.arange(width, device=device)[None], columns, list(tokens))
    ids = torch.full((len(prompts.rows), width), prompts.padding, dtype=torch.long)
    mask = torch.zeros((len(prompts.rows), width), dtype=torch.long)
    positions = torch.zeros((len(prompts.rows), width), dtype=torch.long)
    for number, (row, cached) in enumerate(zip(prompts.rows, tokens, strict=True)):
        values = torch.frombuffer(array("q", row), dtype=torch.long)  # much quicker than from a list
        places = torch.arange(len(row))
        for first, last, stop in ((0, cached, columns), (cached, len(row), width)):
            span = slice(stop - (last - first), stop)
            ids[number, span], positions[number, span] = values[first:last], places[first:last]
            mask[number, span] = 1
    return Plan(ids.to(device), mask.to(device), positions.to(device), columns, list(tokens))


def to_callers_format(out: torch.Tensor, prompts: Prompts, width: int) -> torch.Tensor:
    """Generated sequences as ``model.generate`` would give them: the caller's own columns, then what is new."""
    given = prompts.given.to(out.device)
    if out.shape[0] != given.shape[0]:
        given = given.repeat_interleave(out.shape[0] // given.shape[0], dim=0)
    return torch.cat((given, out[:, width:]), dim=1)
