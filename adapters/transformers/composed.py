"""A composed prompt laid out for the model: what is brought, what is computed, and what each computed token may see.

Columns are the prompt's tokens in order. Where all that is left to compute stands behind all that is cached, the
model reads it as it reads any prompt that goes on. Otherwise the prompt is *scattered*: the model is given the
computed tokens alone, a mask that lets each see what stands before it, and layers that put them in their columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kvstore.adapters.transformers.batch import Plan
from kvstore.adapters.transformers.buffers import LayerSpec
from kvstore.adapters.transformers.gather import Span
from kvstore.assembly import Assembly, Run
from kvstore.errors import BadInput


@dataclass(frozen=True, eq=False)
class Scattered:
    """The columns that the first forward pass computes, sorted, and how many there are in all."""

    columns: torch.Tensor  # [computed] int64, on the model's device
    total: int
    leading: int  # columns before the first computed one
    windows: tuple[int | None, ...]  # of the layers
    kind: str  # of attention: "eager" adds masks, everything else selects by them

    def chosen(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of the given columns are computed; ``ids``: all of the prompt, all from ``leading`` on, or just those.

        Raises ``BadInput`` for anything else: the rest could not be put where it belongs.
        """
        width = ids.shape[1]
        if width == self.total:
            return self.columns
        if width == self.total - self.leading:
            return self.columns - self.leading
        if width == len(self.columns):
            return torch.arange(width, device=ids.device)
        raise BadInput(
            f"this prompt must be read in one forward pass of {len(self.columns)} or {self.total} tokens, not {width}"
        )

    def mask(self, like: torch.Tensor, dtype: torch.dtype) -> Any:
        """What ``columns`` may see of all, [1, 1, computed, total]; by kind of layer where layers differ."""
        made = {window: self._mask(window, like.device, dtype) for window in set(self.windows)}
        if len(made) == 1:
            return made.popitem()[1]
        return {"full_attention" if window is None else "sliding_attention": mask for window, mask in made.items()}

    def _mask(self, window: int | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        distance = self.columns.to(device)[:, None] - torch.arange(self.total, device=device)
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        if self.kind == "eager":
            hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
            return torch.where(seen, torch.zeros((), dtype=dtype, device=device), hidden)[None, None]
        return seen[None, None]


class Composed:
    """An assembly with what is decided of it: which columns the model computes, and which it is given."""

    def __init__(self, assembly: Assembly, recomputed: Iterable[int] = ()) -> None:
        """``recomputed``: columns that are cached, but computed all the same."""
        self.assembly = assembly
        self.total = len(assembly.composition)
        self.computed = sorted({*assembly.missing(), *recomputed})
        self.leading = self.computed[0]

    @property
    def scattered(self) -> bool:
        """Whether something cached stands behind something that is computed."""
        return len(self.computed) < self.total - self.leading

    @cached_property
    def loaded(self) -> int:
        """Columns that layers are brought with."""
        return self.total if self.scattered else self.leading

    def spans(self) -> list[Span]:
        """What is brought, one span for each run."""
        return [
            Span(source, run.first - run.match.skipped, run.cached, run.position, run.column)
            for source, run in enumerate(self.assembly.runs)
            if run.cached
        ]

    def takes(self, run: Run) -> tuple[int, int]:
        """Where a run's tokens begin among the computed ones, and how many of them it keeps."""
        first = run.column + run.cached
        return self._place[first] if first < run.stop else 0, run.stop - first

    @cached_property
    def _place(self) -> dict[int, int]:
        return {column: place for place, column in enumerate(self.computed)}

    def plan(self, device: torch.device) -> Plan:
        """The prompt as ``generate`` takes it; the first ``leading`` columns are cached."""
        composition = self.assembly.composition
        ids, positions = (
            torch.frombuffer(array("q", row), dtype=torch.long)[None].to(device)
            for row in (composition.token_ids, composition.position_ids)
        )
        return Plan(ids, torch.ones_like(ids), positions, self.leading, [self.leading])

    def scatter(self, specs: Sequence[LayerSpec], kind: str) -> Scattered | None:
        """For layers and mask; None when nothing is scattered."""
        if not self.scattered:
            return None
        columns = torch.tensor(self.computed, device=specs[0].device)
        return Scattered(columns, self.total, self.leading, tuple(spec.window for spec in specs), kind)
