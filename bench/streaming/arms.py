"""Ways to go on when the context is full, and the loss of every token of a long text in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from kvstore.adapters.transformers.window import WindowCache
from kvstore.policies.overflow import Window, streaming, truncation

Losses = Iterator[torch.Tensor]  # nats of the next tokens, piece by piece of the text
SINKS = 4
ROWS = 8  # windows that are computed at once
WHOLE = 256  # tokens of a pass of the cache that nothing is dropped from


@dataclass(frozen=True, eq=False)
class Arm:
    """One way. ``losses(model, ids)``: of the tokens behind each of ``ids`` [1, tokens], all but the last."""

    name: str
    says: str
    losses: Callable[[Any, torch.Tensor], Losses]
    policy: Window | None = field(default=None)


def arms(window: Callable[[Window], WindowCache], context: int) -> list[Arm]:
    """All of them, for a model that was trained on ``context`` tokens."""
    half, recomputed = context // 2, context // 8

    def windowed(name: str, says: str, policy: Window) -> Arm:
        def losses(model: Any, ids: torch.Tensor) -> Losses:
            return _through(model, ids, window(policy), policy)

        return Arm(name, says, losses, policy)

    return [
        windowed("sinks and window", f"{SINKS} sinks, token by token", streaming(context, SINKS, 1)),
        windowed("sinks and window, 16 at a time", f"{SINKS} sinks, 16 tokens go at once", streaming(context, SINKS)),
        windowed("window only", "no sinks, token by token", streaming(context, 0, 1)),
        windowed("window only, 16 at a time", "no sinks, 16 tokens go at once", streaming(context, 0)),
        Arm(
            "recomputed",
            f"the latest tokens read anew, every {recomputed} tokens",
            lambda model, ids: _recomputed(model, ids, context, recomputed, 0),
        ),
        Arm(
            "recomputed behind the sinks",
            f"the first {SINKS} tokens and the latest read anew, every {recomputed}",
            lambda model, ids: _recomputed(model, ids, context, recomputed, SINKS),
        ),
        windowed("truncated", "the oldest half goes, the rest is rotated anew", truncation(context)),
        windowed(
            "truncated behind the sinks", f"the same with {SINKS} sinks", truncation(context, half / context, SINKS)
        ),
        Arm(
            "truncated, not rotated",
            "the oldest half goes; keys as they were, new tokens numbered by the cache's length",
            lambda model, ids: _not_rotated(model, ids, context, half),
        ),
        Arm("all kept", "nothing goes: beyond the trained length", _all_kept),
    ]


def _of(logits: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
    """The losses behind ``logits`` [1, n, vocabulary] of the tokens from ``first`` on."""
    return cross_entropy(logits[0].float(), ids[0, first + 1 : first + 1 + logits.shape[1]], reduction="none")


def _read(model: Any, ids: torch.Tensor, first: int, stop: int, cache: Any) -> torch.Tensor:
    out = model(input_ids=ids[:, first:stop], past_key_values=cache, use_cache=True)
    return _of(out.logits, ids, first)


def _through(model: Any, ids: torch.Tensor, cache: Any, policy: Window) -> Losses:
    read, end = 0, ids.shape[1] - 1
    while read < end:
        stop = min(end, policy.boundary(read))
        yield _read(model, ids, read, stop, cache)
        read = stop


def _recomputed(model: Any, ids: torch.Tensor, context: int, every: int, sinks: int) -> Losses:
    """After the first context, ``every`` tokens are read at once behind what fits before them, with no cache at all."""
    end = ids.shape[1] - 1
    yield _read(model, ids, 0, min(end, context), None)
    starts = range(context, end, every)
    for row in range(0, len(starts), ROWS):
        texts, lengths = [], []
        for start in starts[row : row + ROWS]:
            stop = min(end, start + every)
            texts.append(torch.cat((ids[0, :sinks], ids[0, stop - context + sinks : stop])))
            lengths.append(stop - start)
        logits = model(input_ids=torch.stack(texts), use_cache=False).logits
        for text, start, length in zip(logits, starts[row : row + ROWS], lengths, strict=True):
            yield _of(text[None, -length:], ids, start)


def _not_rotated(model: Any, ids: torch.Tensor, context: int, dropped: int) -> Losses:
    read, end, cache = 0, ids.shape[1] - 1, DynamicCache(config=model.config)
    while read < end:
        if cache.get_seq_length() == context:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, dropped:], layer.values[:, :, dropped:]
        stop = min(end, read + context - cache.get_seq_length())
        yield _read(model, ids, read, stop, cache)
        read = stop


def _all_kept(model: Any, ids: torch.Tensor) -> Losses:
    cache, end = DynamicCache(config=model.config), ids.shape[1] - 1
    for read in range(0, end, WHOLE):
        yield _read(model, ids, read, min(end, read + WHOLE), cache)
