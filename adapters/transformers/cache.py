"""The cache that a hit hands to the model: loads lazily what is stored, records what is new."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer

from kvstore.adapters.transformers import capture
from kvstore.adapters.transformers.batch import Plan
from kvstore.adapters.transformers.buffers import LayerSpec
from kvstore.adapters.transformers.composed import Scattered
from kvstore.adapters.transformers.layers import LazyLayer, layer_for
from kvstore.adapters.transformers.loaded import Loaded
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.timeline import Timeline
from kvstore.errors import BadInput
from kvstore.plan import LayerPlan


class ReuseCache(DynamicCache):
    """A ``DynamicCache`` as far as any model or ``generate`` can tell."""

    def __init__(
        self,
        owner: object,  # the Reuse that made it; only its forward passes are recorded
        loaded: Loaded,
        recorder: Recorder,
        layer_plan: LayerPlan,
        specs: Sequence[LayerSpec],  # of the layers that the plan stores
        dtype: torch.dtype,
        plan: Plan | None = None,
        stamp: object = None,
        tenant: str = "",
        scattered: Scattered | None = None,
    ) -> None:
        self._stored = [layer_for(loaded, slot, spec.window, scattered) for slot, spec in enumerate(specs)]
        self._slots = {number: slot for slot, number in enumerate(layer_plan.stored)}  # the model counts all its layers
        layers = [
            self._stored[self._slots[number]] if number in self._slots else DummyLayer()
            for number in range(len(layer_plan.layers))
        ]
        Cache.__init__(self, layers=layers)
        self.owner = weakref.ref(owner)
        self.loaded, self.recorder, self.stamp, self.tenant = loaded, recorder, stamp, tenant
        self._specs, self._dtype = specs, dtype
        self._last, self._swapped = len(specs) - 1, any(spec.swapped for spec in specs)
        self._plan = plan  # until the first forward pass
        self._scattered = scattered  # likewise
        self._keeper = owner if scattered is not None else None  # likewise: without its hook it cannot be read
        # How far positions are ahead of columns: a prompt with gaps goes on behind them.
        self._ahead = 0 if plan is None or len(plan.tokens) > 1 else int(plan.positions[0, -1]) + 1 - plan.ids.shape[1]
        self._timed = True  # likewise
        self._reading = False  # a forward pass is running
        # A dropped cache must not keep leases or private blocks; neither refers back to it.
        self._drop = weakref.finalize(self, _drop, loaded, recorder)
        self._drop.atexit = False

    @property
    def timeline(self) -> Timeline:
        """When each layer was fetched, loaded and computed."""
        return self.loaded.timeline

    # -- the forward pass ---------------------------------------------------------------------------------------------

    def arranged(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the decoder without what the cache holds already, and with what they lack."""
        ids: Any = inputs.get("input_ids")
        positions: Any = inputs.get("position_ids")
        scattered, self._scattered = self._scattered, None
        if scattered is not None:
            if not (is_matrix(ids) and is_matrix(positions) and positions.shape[1] == ids.shape[1]):
                raise BadInput("a composed prompt is read by token ids and position ids; pass hit.inputs as they are")
            self._plan, self._keeper, chosen = None, None, scattered.chosen(ids)
            mask = scattered.mask(ids, self._dtype)
            return {**inputs, "input_ids": ids[:, chosen], "position_ids": positions[:, chosen], "attention_mask": mask}
        known = self._unread(ids, positions)
        if known:
            return {**inputs, "input_ids": ids[:, known:], "position_ids": positions[:, known:]}
        if positions is None and self._ahead and is_matrix(ids):
            first = self.get_seq_length() + self._ahead
            return {**inputs, "position_ids": torch.arange(first, first + ids.shape[1], device=ids.device)[None]}
        return inputs

    def _unread(self, ids: Any, positions: Any) -> int:
        """How many leading columns of these inputs are in the cache already: not 0 when the prompt comes whole again.

        That is what assisted generation does with a cache that it is given, and what ``model(**hit.inputs)`` asks for.
        Its positions start over, so it cannot be a text that goes on with the same words.
        """
        plan, self._plan = self._plan, None
        if plan is None or not plan.columns or not is_matrix(ids) or not is_matrix(positions):
            return 0
        if ids.shape[1] < plan.ids.shape[1] or positions.shape[1] != ids.shape[1] or ids.shape[0] % plan.ids.shape[0]:
            return 0
        times = ids.shape[0] // plan.ids.shape[0]
        same = torch.equal(ids[::times, : plan.columns], plan.ids[:, : plan.columns]) and torch.equal(
            positions[::times, : plan.columns].expand(plan.ids.shape[0], -1), plan.positions[:, : plan.columns]
        )
        return plan.columns if same else 0

    def begin(self, ids: Any, mask: Any, positions: Any) -> None:
        """The decoder starts on these inputs."""
        recorder = self.recorder
        capture.listen(recorder.calls)
        self._reading = True
        if self._timed:
            self.loaded.begun()
        if is_matrix(ids) and ids.shape[0] != len(recorder.places):
            # `generate` repeats the inputs for beams and several returned sequences, but not the cache it is given.
            times, rest = divmod(ids.shape[0], len(recorder.places))
            if times > 1 and not rest:
                self.batch_repeat_interleave(times)
            else:
                recorder.end_all(f"{ids.shape[0]} sequences were given to a cache of {len(recorder.places)}")
        recorder.begin(ids, mask, positions)

    def finish(self) -> None:
        """The decoder is done, or failed; or it was refused its inputs, and did not begin."""
        if not self._reading:
            return
        self._reading = False
        capture.leave()
        if self._timed:
            self._timed = not self.loaded.finished()
        self.recorder.finish()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the new states, wait for what is stored of this layer, and give both to attention.

        Of every token that is generated this is called once for each layer: no call more than needed.
        """
        slot, recorder = self._slots[layer_idx], self.recorder
        if recorder.seen is not None and not (self._timed or self._swapped):
            recorder.seen.append((slot, key_states, value_states, *recorder.calls))
            recorder.calls.clear()
            if slot == self._last:
                capture.stop()
            layer = self.layers[layer_idx]
            update = DynamicLayer.update if type(layer) is LazyLayer and not layer.waiting else type(layer).update
            found: tuple[torch.Tensor, torch.Tensor] = update(layer, key_states, value_states, *args, **kwargs)
            return found
        if self._timed:
            self.loaded.reached(slot)
        states = self._specs[slot].exchanged(key_states, value_states)
        if recorder.seen is not None:
            recorder.seen.append((slot, *states, *recorder.calls))
            recorder.calls.clear()
        else:
            recorder.layer(slot, *states)
        if slot == self._last:
            capture.stop()  # what layers above rotate is not stored, and would be kept for nothing
        result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._timed:
            self.loaded.passed(slot, key_states.shape[0], key_states.shape[-2])
        return result

    # -- what changes the batch or its length -------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search."""
        self.recorder.select(beam_idx.tolist())
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.recorder.repeat(repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences."""
        self.recorder.select(torch.as_tensor(indices).tolist())
        super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number, as transformers has it)."""
        unread = any(layer.waiting for layer in self._stored)
        super().crop(tokens_to_remove)
        if unread and not any(layer.waiting for layer in self._stored):
            self.loaded.release()  # nobody will ask for it
        self.recorder.crop(abs(tokens_to_remove), unread)

    def reset(self) -> None:
        """Forget everything; nothing more is recorded."""
        self.recorder.end_all("the cache was reset")
        self.loaded.release()
        super().reset()

    # -- what reads it outside a forward pass -------------------------------------------------------------------------

    def fetch(self) -> None:
        """Bring every layer that still waits."""
        for layer, spec in zip(self._stored, self._specs, strict=True):
            layer.fetch(torch.empty(0, dtype=self._dtype, device=spec.device))

    def __iter__(self) -> Iterator[Any]:
        self.fetch()
        return iter(super().__iter__())

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicCache:
        """A plain copy that loads and records nothing."""
        self.fetch()
        copy = DynamicCache(list(self))
        for number, mine in enumerate(self.layers):
            if isinstance(mine, DummyLayer):
                copy.layers[number] = DummyLayer()
                continue
            layer = copy.layers[number]
            layer.keys, layer.values = mine.keys.clone(), mine.values.clone()
            if hasattr(mine, "cumulative_length"):
                layer.cumulative_length, layer.record_past = mine.cumulative_length, mine.record_past
        return copy


def is_matrix(value: Any) -> bool:
    """Whether it is a tensor of rows and columns, as token ids are."""
    return isinstance(value, torch.Tensor) and value.ndim == 2


def _drop(loaded: Loaded, recorder: Recorder) -> None:
    loaded.release()
    recorder.discard()
