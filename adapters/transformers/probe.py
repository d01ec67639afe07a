"""Finding every layer's rotation by watching one forward pass on a short prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers import capture
from kvstore.adapters.transformers.capture import Call
from kvstore.adapters.transformers.rotation import (
    Rotation,
    Slot,
    Table,
    arguments,
    get_argument,
    outputs_of,
    same_memory,
)
from kvstore.errors import Unsupported


@dataclass(frozen=True)
class Angles:
    """One call of a module that gives cosines and sines, or both as complex numbers."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[torch.Tensor, ...]

    @cached_property
    def table(self) -> Table | None:
        """A table for any position, one for all layers; None when no argument looks like positions."""
        return _table_of(self)


class ProbeCache(DynamicCache):
    """A plain cache that keeps what each ``update`` was given, and the rotary calls since the update before."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.calls = capture.heard()
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor, list[Call]]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store as usual, and keep what was seen."""
        self.seen[layer_idx] = (key_states, value_states, list(self.calls))
        self.calls.clear()
        result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return result


@contextmanager
def watching_angles(model: torch.nn.Module) -> Iterator[list[Angles]]:
    """Collects the calls of modules that return tensors for integer positions."""
    seen: list[Angles] = []

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        outputs = outputs_of(result)
        if outputs:
            seen.append(Angles(module, args, kwargs, outputs))

    rotary = [module for module in model.modules() if "rotary" in type(module).__name__.lower()]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in rotary]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watched_forward(decoder: Any, cache: ProbeCache, **inputs: Any) -> list[Angles]:
    """One forward pass of ``decoder`` over ``inputs`` with everything watched."""
    capture.listen(cache.calls)
    try:
        with watching_angles(decoder) as angles:
            decoder(past_key_values=cache, use_cache=True, **inputs)
    finally:
        capture.leave()
    return angles


def find_rotation(layer: int, keys: torch.Tensor, calls: list[Call], angles: list[Angles]) -> Rotation | None:
    """The rotation behind ``keys``; None when no rotary call made them."""
    for call in reversed(calls):
        tensors = [(slot, value) for slot, value in arguments(call.args, call.kwargs) if _is_states(value)]
        results = call.result if isinstance(call.result, tuple) else (call.result,)
        for which, made in enumerate(results):
            shape = _how_it_became(made, keys)
            if shape is None:
                continue
            transposed, part = shape
            sources = [slot for slot, value in tensors if value.shape == made.shape]
            if not sources:
                continue
            # Functions of (q, k) return (q, k): the last tensor of the keys' shape that is at the same place.
            slot = tensors[which][0] if which < len(tensors) and tensors[which][0] in sources else sources[-1]
            queries = tuple(other for other, _ in tensors if other != slot)
            table, angle_slots = _find_table(layer, call, {slot, *queries}, angles)
            result = which if isinstance(call.result, tuple) else None
            return Rotation(
                call.function, call.args, call.kwargs, slot, result, queries, angle_slots, table, transposed, part
            )
    return None


def _is_states(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point()


def _how_it_became(made: torch.Tensor, keys: torch.Tensor) -> tuple[bool, tuple[int, int] | None] | None:
    """Whether ``keys`` are ``made``, seen (transposed, as a part of the dims); None: they are something else."""
    if not _is_states(made):
        return None
    for transposed in (False, True):
        seen = made.transpose(1, 2) if transposed else made
        if (not transposed and seen is keys) or same_memory(seen, keys):
            return transposed, None
        rest = keys.shape[-1] - seen.shape[-1]
        if seen.shape[:-1] == keys.shape[:-1] and rest > 0:
            for first in (0, rest):
                if torch.equal(seen, keys[..., first : first + seen.shape[-1]]):
                    return transposed, (first, first + seen.shape[-1])
    return None


def _find_table(
    layer: int, call: Call, taken: set[Slot], angles: list[Angles]
) -> tuple[Table, tuple[tuple[Slot, int], ...]]:
    """The rotary module's call whose outputs are the angles of ``call``, and where they go."""
    wanted = [
        (slot, value)
        for slot, value in arguments(call.args, call.kwargs)
        if slot not in taken and isinstance(value, torch.Tensor)
    ]
    for found in reversed(angles):
        places = [(slot, _place(value, found.outputs)) for slot, value in wanted]
        if wanted and all(which is not None for _, which in places):
            table = found.table
            if table is not None:
                return table, tuple((slot, which) for slot, which in places if which is not None)
    raise Unsupported(
        f"layer {layer} rotates keys by angles that no rotary module of the model gives; "
        "only models with a rotary embedding module can be served"
    )


def _place(value: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> int | None:
    for which, output in enumerate(outputs):
        if output is value or same_memory(output, value):
            return which
    return None


def _table_of(found: Angles) -> Table | None:
    state: Slot | None = None
    positions: Slot | None = None
    for slot, value in arguments(found.args, found.kwargs):
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                state = slot
            elif value.ndim == 2:
                positions = slot
    if positions is None:
        return None
    args, kwargs = found.args, dict(found.kwargs)
    if state is not None:
        # Only its dtype and device are read; an empty one keeps no activations alive.
        empty = get_argument(args, kwargs, state).new_empty(0)
        if isinstance(state, int):
            args = (*args[:state], empty, *args[state + 1 :])
        else:
            kwargs[state] = empty
    length = int(get_argument(args, kwargs, positions).shape[-1])
    if any(output.ndim != 3 or output.shape[-2] != length for output in found.outputs):
        return None
    return Table(found.module, args, kwargs, state, positions)
