"""The loss of a long text in every arm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.bench.streaming.arms import Arm

SLICES = 20


@dataclass(frozen=True)
class Score:
    """An arm's loss behind the first context, where arms begin to differ. Nats per token; one token is one byte."""

    arm: str
    says: str
    loss: float
    apart: float  # its loss without the first arm's, mean over the same tokens
    apart_error: float  # standard error of that, over slices of the text
    slices: list[float]  # losses along the text
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp`` of the loss."""
        return math.exp(self.loss)


def score(
    model: Any, ids: torch.Tensor, arms: Sequence[Arm], context: int, progress: Callable[[str, int], None]
) -> list[Score]:
    """Reads ``ids`` [1, tokens] in every arm; ``progress`` is told the arm and tokens that were read."""
    scores: list[Score] = []
    beside: torch.Tensor | None = None
    for arm in arms:
        begin, pieces = time.perf_counter(), []
        for piece in arm.losses(model, ids):
            pieces.append(piece)
            progress(arm.name, len(piece))
        seconds = time.perf_counter() - begin
        losses = torch.cat(pieces)
        assert len(losses) == ids.shape[1] - 1
        parts = losses[context:].tensor_split(SLICES)
        means = torch.stack([part.mean() for part in parts])
        beside = means if beside is None else beside
        apart = means - beside
        scores.append(
            Score(
                arm=arm.name,
                says=arm.says,
                loss=float(losses[context:].mean()),
                apart=float(apart.mean()),
                apart_error=float(apart.std() / math.sqrt(SLICES)),
                slices=means.tolist(),
                seconds=seconds,
            )
        )
    return scores
