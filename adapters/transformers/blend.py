"""Which tokens of modules to compute anew: those whose keys and values at an early layer deviate most (CacheBlend).

Keys and values of layer 0 depend on nothing but the token. So one layer computed for the whole prompt shows, in what
the next one makes of it, what this prompt changes; the pass ends there. Chosen tokens are then computed like new ones:
they attend to everything before them, and take the place of what was loaded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers import capture
from kvstore.adapters.transformers.buffers import Pair
from kvstore.adapters.transformers.composed import Composed
from kvstore.adapters.transformers.gather import Gather
from kvstore.adapters.transformers.joined import Joined
from kvstore.errors import Unsupported

SLOT = 1  # where deviations are measured


class _EnoughError(Exception):
    """The layer that was wanted has been seen."""


class _Early(DynamicCache):
    """A cache that ends the forward pass at one layer."""

    def __init__(self, config: Any, last: int) -> None:
        super().__init__(config=config)
        self.last = last
        self.seen: Pair | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Pair:
        """As usual before the last layer; there, keep what it is given and end."""
        if layer_idx == self.last:
            self.seen = key_states, value_states
            raise _EnoughError
        result: Pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return result


def deviating(joined: Joined, composed: Composed, loads: Sequence[Any], share: float) -> list[int] | None:
    """The columns, a ``share`` of those that modules fill, which this prompt changes most at layer ``SLOT``.

    Waits for that layer; None when it cannot be had.
    """
    candidates = [
        column for run in composed.assembly.runs if run.modular for column in range(run.column, run.column + run.cached)
    ]
    count = math.ceil(share * len(candidates))
    if not count or len(candidates) == count:
        return candidates[:count]
    if len(joined.attached.specs) <= SLOT:
        raise Unsupported(f"a blend needs a model that stores more than {SLOT} layers; use mode='modular'")
    attached, spec = joined.attached, joined.attached.specs[SLOT]
    gather = Gather(
        loads, [composed.spans()], composed.total, attached.specs, attached.rotations, attached.dtype, joined.carrier
    )
    if not gather.wait(SLOT, timeout=joined.patience):
        return None
    stop = candidates[-1] + 1
    fresh = spec.exchanged(*_early(joined, composed, stop))
    brought = gather.layer(SLOT, (0,), 0, stop, 0)
    if brought.event is not None:
        brought.event.wait()
    places = torch.tensor(candidates)
    deviation = sum(
        _deviation(ours[0, :, places.to(ours.device)], theirs[0, :, places.to(theirs.device)])
        for ours, theirs in zip(fresh, (brought.keys, brought.values), strict=True)
    )
    assert isinstance(deviation, torch.Tensor)
    return sorted(places[deviation.topk(count).indices].tolist())


def _deviation(fresh: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """Of each token, the squared distance over all heads, in units of the mean square; [heads, tokens, dim] each."""
    fresh, cached = fresh.float().cpu(), cached.float().cpu()
    return (fresh - cached).square().sum(dim=(0, 2)) / cached.square().mean().clamp_min(1e-12)


def _early(joined: Joined, composed: Composed, stop: int) -> Pair:
    """What layer ``SLOT`` is given for the first ``stop`` columns when all of them are computed."""
    plan, decoder = composed.plan(joined.attached.specs[0].device), joined.decoder
    cache = _Early(joined.config, joined.attached.plan.stored[SLOT])
    leaving = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(decoder.forward).parameters else {}
    capture.listen(None)
    try:
        with torch.no_grad():
            decoder(
                input_ids=plan.ids[:, :stop],
                position_ids=plan.positions[:, :stop],
                past_key_values=cache,
                use_cache=True,
                **leaving,
            )
    except _EnoughError:
        pass
    finally:
        capture.leave()
    assert cache.seen is not None
    return cache.seen
