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
from kvstore.adapters.transformers.blended import Blended
from kvstore.adapters.transformers.buffers import LayerSpec
from kvstore.adapters.transformers.gather import Span
from kvstore.adapters.transformers.row import Copy
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


def _runs(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Pairs that both go up by one, joined: (one, other, length)."""
    runs: list[tuple[int, int, int]] = []
    for one, other in pairs:
        if runs and (one, other) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((one, other, 1))
    return runs


class Composed:
    """An assembly with what is decided of it: which columns the model computes, and which it is given."""

    def __init__(self, assembly: Assembly, recomputed: Iterable[int] = (), blended: Blended | None = None) -> None:
        """``recomputed``: columns that are cached, but computed all the same. ``blended``: the chain that they make."""
        self.assembly, self.blended = assembly, blended
        self.total = len(assembly.composition)
        self.computed = sorted({*assembly.missing(), *recomputed})
        self.leading = self.computed[0]

    @property
    def scattered(self) -> bool:
        """Whether something cached stands behind something that is computed."""
        return len(self.computed) < self.total - self.leading

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

    @property
    def kept(self) -> list[Run]:
        """The runs whose own chains go on with what is computed here; behind the start of a blend there are none."""
        stop = self.total if self.blended is None else self.blended.column
        return [run for run in self.assembly.runs if run.column < stop]

    @property
    def blend_stored(self) -> tuple[int, int]:
        """Which source holds the blend's chain, and how many tokens of it; none when it is made here."""
        assert self.blended is not None
        for source, run in enumerate(self.assembly.runs):
            if run.column == self.blended.column and run.chain.context == self.blended.chain.context:
                return source, run.cached
        return 0, 0

    def computed_runs(self, start: int) -> list[tuple[int, int, int]]:
        """The computed columns from ``start`` on in runs: place among the computed, distance from ``start``, length."""
        return _runs([(self._place[column], column - start) for column in self.computed if column >= start])

    def copies(self, start: int) -> list[Copy]:
        """Of the columns from ``start`` on, those that are loaded and stay as they are."""
        found, anew = [], set(self.computed)
        for source, run in enumerate(self.assembly.runs):
            columns = [c for c in range(max(run.column, start), run.column + run.cached) if c not in anew]
            first = run.first - run.match.skipped - run.column
            found += [Copy(source, *each) for each in _runs([(first + column, column - start) for column in columns])]
        return found

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
