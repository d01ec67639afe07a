"""A cache of constant size for a conversation that may grow without end: what its policy drops goes, the rest stays."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer

from kvstore.adapters.transformers import capture
from kvstore.adapters.transformers.attach import Attached
from kvstore.adapters.transformers.cache import is_matrix
from kvstore.adapters.transformers.timeline import Timeline
from kvstore.adapters.transformers.window_layer import Reading, WindowLayer
from kvstore.adapters.transformers.window_recorder import WindowRecorder
from kvstore.errors import BadInput, Unsupported
from kvstore.policies.overflow import Window


class WindowCache(DynamicCache):
    """For one conversation, of ``policy.context`` columns. Positions are its own: the index of a token in it.

    Only the model that it was made for can use it. What is dropped is gone, so it cannot be cropped, and it is one
    sequence: no beams. ``recorder``: keeps what is read for the store; ``stamp``: of the weights that make it.
    """

    def __init__(
        self, owner: object, decoder: Any, policy: Window, attached: Attached, tenant: str = "", stamp: object = None
    ) -> None:
        self.owner, self.policy, self.tenant, self.stamp = weakref.ref(owner), policy, tenant, stamp
        self._keeper = owner  # without whose hook it cannot be used
        self.timeline = Timeline()  # of what the store gave
        self._decoder = decoder
        self._reading = reading = Reading()
        stored = attached.plan.stored
        self._stored = [
            WindowLayer(spec, rotation, attached.dtype, policy.context, reading, number)
            for number, spec, rotation in zip(stored, attached.specs, attached.rotations, strict=True)
        ]
        self._earlier: list[torch.Tensor] = []  # hidden states of a pass that was cut into pieces, before the last
        layers = dict(zip(stored, self._stored, strict=True))
        Cache.__init__(self, layers=[layers.get(n) or DummyLayer() for n in range(len(attached.plan.layers))])

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Which tokens of the history it holds, as ranges (first, behind the last)."""
        read, held = self._reading.read, self._reading.held
        if read == held:
            return [(0, read)] if read else []
        sinks = self.policy.sinks
        return [(first, stop) for first, stop in ((0, sinks), (read - held + sinks, read)) if first < stop]

    @property
    def size(self) -> int:
        """Bytes that it takes, always."""
        return sum(layer.size for layer in self._stored)

    @property
    def stored(self) -> list[WindowLayer]:
        """The layers that hold something, in order."""
        return self._stored

    @property
    def recorder(self) -> Any:
        """The ``WindowRecorder`` that keeps what is read for the store, or None."""
        return self._reading.recorder

    def record(self, recorder: WindowRecorder) -> None:
        """Keep what is read from here on. Its private blocks go back when this cache is dropped."""
        self._reading.recorder = recorder
        weakref.finalize(self, recorder.discard).atexit = False

    def filled(self, read: int, held: int) -> None:
        """The layers were filled with what is kept of the first ``read`` tokens, in ``held`` columns."""
        self._reading.read, self._reading.held = read, held

    # -- the forward pass ---------------------------------------------------------------------------------------------

    def arranged(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's inputs for one pass that drops nothing within it; what comes before that has been read then.

        Whatever positions and mask are given, a token stands at its index in the cache and sees all before it. Raises
        ``BadInput`` for what a windowed conversation cannot be.
        """
        ids = _checked(inputs, self.policy.context)
        *firsts, last = self._pieces(ids.shape[1])
        earlier = []
        for piece in firsts:
            out = self._decoder(**{**inputs, "input_ids": ids[:, :piece], "attention_mask": None})
            earlier.append(out[0])
            ids = ids[:, piece:]
        start = self._make_room(last)
        self._earlier = earlier
        positions = torch.arange(start, start + last, device=ids.device)[None]
        return {**inputs, "input_ids": ids, "position_ids": positions, "attention_mask": None}

    def _pieces(self, tokens: int) -> list[int]:
        """How many tokens each pass reads, of ``tokens`` new ones."""
        read, sizes = self._reading.read, []
        end = read + tokens
        while read < end:
            stop = min(end, self.policy.boundary(read))
            sizes.append(stop - read)
            read = stop
        return sizes

    def _make_room(self, tokens: int) -> int:
        """Drops what has to go before ``tokens`` are read; the index of the first of them."""
        reading, policy = self._reading, self.policy
        gone = policy.dropped(reading.read + tokens) - (reading.read - reading.held)
        if gone:
            for layer in self._stored:
                layer.drop(policy.sinks, gone, reading.held)
            reading.held -= gone
        return reading.held

    def begin(self, ids: Any, mask: Any, positions: Any) -> None:
        """The decoder starts on inputs that were ``arranged``."""
        reading = self._reading
        if reading.recorder is not None:
            reading.recorder.begin(ids[0].tolist(), reading.read)
        reading.new, reading.layers = ids.shape[1], 0
        capture.listen(reading.calls)

    def finish(self) -> None:
        """The decoder is done, or failed: then it is as if it had not begun."""
        reading = self._reading
        if not reading.new:
            return
        capture.leave()
        reading.calls.clear()
        whole = reading.layers == len(self._stored)
        if reading.recorder is not None:
            reading.recorder.finish(whole)
        if whole:
            reading.read += reading.new
            reading.held += reading.new
        reading.new = 0

    def completed(self, output: Any) -> Any:
        """The decoder's output with the hidden states of what was read before its last pass; None: as it is."""
        earlier, self._earlier = self._earlier, []
        if not earlier or output is None:
            return None
        whole = torch.cat((*earlier, output[0]), dim=1)
        if isinstance(output, tuple):
            return whole, *output[1:]
        output["last_hidden_state"] = whole
        return output

    # -- what cannot be -----------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ``Unsupported``."""
        raise Unsupported("a windowed conversation cannot be cropped (or assisted): what was dropped is gone")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Raises ``Unsupported``."""
        raise Unsupported("a windowed conversation is one sequence: beams cannot be served")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises ``Unsupported``."""
        raise Unsupported("a windowed conversation is one sequence; give each its own cache")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Raises ``Unsupported``."""
        raise Unsupported("a windowed conversation is one sequence; give each its own cache")

    def reset(self) -> None:
        """Forget everything, and record no more; the memory stays."""
        self._reading.read = self._reading.held = 0
        if self._reading.recorder is not None:
            self._reading.recorder.end_all("the cache was reset")
        for layer in self._stored:
            layer.reset()


def _checked(inputs: dict[str, Any], context: int) -> torch.Tensor:
    """The token ids of a forward pass, [1, tokens]."""
    ids: Any = inputs.get("input_ids")
    mask: Any = inputs.get("attention_mask")
    if not is_matrix(ids):
        raise BadInput("a windowed conversation is read by token ids; give input_ids")
    if ids.shape[0] != 1:
        raise BadInput(f"a windowed conversation is one sequence, not {ids.shape[0]}; give each its own cache")
    if not ids.shape[1]:
        raise BadInput("no tokens were given; the model has read them all already")
    # Of a mask of the whole history, what is read and what may be held; so long histories take no longer.
    if mask is not None and not (is_matrix(mask) and bool(mask[:, -context - ids.shape[1] :].all())):
        raise BadInput("a windowed conversation has no padding and no mask of its own; give its tokens alone")
    checked: torch.Tensor = ids
    return checked
