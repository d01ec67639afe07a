"""Memory and time per token of a long answer, as it grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

from kvstore.adapters.transformers.window import WindowCache

STATUS = Path("/proc/self/statm")
PAGE = 4096
SLICES = 10


@dataclass(frozen=True)
class Slice:
    """A part of the answer. Times are medians in seconds."""

    tokens: int  # generated up to its end
    seconds: float
    model_seconds: float  # of which in the model; the rest is ``generate``'s own
    cache_bytes: int
    resident_bytes: int | None


@contextmanager
def timing(model: Any) -> Iterator[list[float]]:
    """Seconds of each forward pass."""
    began: list[float] = []
    took: list[float] = []
    handles = [
        model.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())),
        model.register_forward_hook(lambda *_: took.append(time.perf_counter() - began.pop())),
    ]
    try:
        yield took
    finally:
        for handle in handles:
            handle.remove()


def decode(
    model: Any, cache: WindowCache, prompt: torch.Tensor, tokens: int, progress: Callable[[int], None]
) -> list[Slice]:
    """``model.generate`` of ``tokens`` greedy tokens behind ``prompt`` [1, n], in slices."""
    every = max(1, tokens // SLICES)
    slices: list[Slice] = []
    times = [time.perf_counter()]

    def watch(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        times.append(time.perf_counter())
        done = ids.shape[1] - prompt.shape[1]
        if done % every == 0:
            steps = [after - before for before, after in pairwise(times[1:])]  # without the prompt
            model_seconds = statistics.median(took[-len(steps) :])
            slices.append(Slice(done, statistics.median(steps), model_seconds, cache.size, resident()))
            del times[:-1]
            took.clear()
            progress(every)
        return torch.zeros(1, dtype=torch.bool)

    with timing(model) as took:
        watching = StoppingCriteriaList([watch])
        options = {"max_new_tokens": tokens, "do_sample": False, "stopping_criteria": watching}
        model.generate(prompt, past_key_values=cache, **options)
    return slices


def resident() -> int | None:
    """Bytes of this process in memory, where the system says."""
    return int(STATUS.read_text().split()[1]) * PAGE if STATUS.is_file() else None
