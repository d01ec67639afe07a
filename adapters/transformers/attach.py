"""The attach test: one short prompt shows how a model makes its keys, and whether they can be given back exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers.buffers import DTYPES, LayerSpec, dtype_name
from kvstore.adapters.transformers.cache import ReuseCache
from kvstore.adapters.transformers.form import find_form
from kvstore.adapters.transformers.gather import Gather
from kvstore.adapters.transformers.loaded import Loaded
from kvstore.adapters.transformers.probe import ProbeCache, find_rotation, watched_forward
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.rotation import Form, Rotation
from kvstore.adapters.transformers.row import Row
from kvstore.adapters.transformers.served import check_config
from kvstore.errors import Unsupported
from kvstore.load import Place
from kvstore.tensors.transfer import GPU

PREFIX, SUFFIX, SHIFT = 8, 4, 19
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.05}


@dataclass(frozen=True)
class Attached:
    """What the attach test found."""

    specs: tuple[LayerSpec, ...]
    rotations: tuple[Rotation, ...]
    dtype: torch.dtype
    supports: frozenset[str]

    @property
    def device(self) -> torch.device:
        """Where the cache is; the CPU when its layers are on several devices."""
        return common_device(self.specs)

    @property
    def turnable(self) -> bool:
        """Whether kernels can turn the keys of all layers."""
        return all(rotation.form or rotation.function is None for rotation in self.rotations)


def common_device(specs: Sequence[LayerSpec]) -> torch.device:
    """The device of all layers, or the CPU."""
    devices = {spec.device for spec in specs}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random state are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def attach_test(decoder: Any, owner: object, seed: int = 0) -> Attached:
    """Run the test on ``decoder``; raises ``Unsupported`` with the reason when it does not pass."""
    config = decoder.config.get_text_config(decoder=True)
    windows = check_config(decoder.config)
    with undisturbed(decoder):
        return _Test(decoder, config, windows, owner, seed).run()


class _Test:
    """One run: a batch of three rows tells most (the prompt, another ending, another position)."""

    def __init__(self, decoder: Any, config: Any, windows: Sequence[int | None], owner: object, seed: int) -> None:
        self.decoder, self.config, self.windows, self.owner = decoder, config, windows, owner
        weight = next(decoder.parameters())
        self.device = weight.device
        source = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, config.vocab_size, (PREFIX + SUFFIX,), generator=source)
        ending = ids[:PREFIX].clone()
        ending[-2:] = (ending[-2:] + 1) % config.vocab_size
        self.ids = ids[None].to(self.device)
        self.batch = torch.stack((ids[:PREFIX], ending, ids[:PREFIX])).to(self.device)

    def run(self) -> Attached:
        """The test, cheapest doubts first."""
        positions = torch.arange(PREFIX)[None].repeat(3, 1).to(self.device)
        positions[2] += SHIFT
        cache = ProbeCache(self.config)
        seen_angles = watched_forward(
            self.decoder,
            cache,
            input_ids=self.batch,
            position_ids=positions,
            attention_mask=torch.ones_like(self.batch),
        )
        specs, rotations, originals = self._rotations(cache, seen_angles)
        dtype = originals[0].dtype
        if dtype_name(dtype) not in DTYPES or any(keys.dtype != dtype for keys in originals):
            raise Unsupported(f"keys of dtype {', '.join(sorted({str(k.dtype) for k in originals}))} cannot be stored")
        values = [cache.seen[layer][1] for layer in range(len(specs))]
        self._check_causal(originals, values)
        self._check_reload(specs, rotations, originals, values)
        supports = {"exact"}
        if self._shifts(originals, values) and all(window is None for window in self.windows):
            supports |= {"shifted", "modular"}
        return Attached(tuple(specs), tuple(rotations), dtype, frozenset(supports))

    def _rotations(
        self, cache: ProbeCache, angles: list[Any]
    ) -> tuple[list[LayerSpec], list[Rotation], list[torch.Tensor]]:
        if sorted(cache.seen) != list(range(len(self.windows))):
            raise Unsupported(f"{len(cache.seen)} of {len(self.windows)} layers use the cache; all must")
        specs, rotations, originals = [], [], []
        forms: dict[Any, Form | None] = {}  # layers that rotate alike have one
        for layer, window in enumerate(self.windows):
            keys, values, calls = cache.seen[layer]
            if not angles:
                raise Unsupported("the model has no rotary embedding: only decoders that rotate their keys are served")
            rotation = find_rotation(layer, keys, calls, angles)
            if rotation is None:
                rotation = self._unrotated(layer)
            before = rotation.originals(calls, keys)
            if before is None or before.shape != keys.shape:
                raise Unsupported(f"the keys of layer {layer} cannot be seen before rotation")
            _settle_queries(rotation, before)
            for row, start in ((0, 0), (2, SHIFT)):
                if not torch.equal(rotation.rotate(before[row : row + 1], start), keys[row : row + 1]):
                    raise Unsupported(f"rotating the keys of layer {layer} again does not give the same bits")
            heads, dim = keys.shape[1], keys.shape[3]
            alike = (rotation.function, rotation.table, rotation.angle_slots, rotation.part, heads, dim)
            if alike not in forms:
                forms[alike] = find_form(rotation, heads, dim, keys.dtype)
            rotation.form = forms[alike]
            specs.append(LayerSpec(keys.shape[1], keys.shape[3], values.shape[3], keys.device, window))
            rotations.append(rotation)
            originals.append(before)
        return specs, rotations, originals

    def _unrotated(self, layer: int) -> Rotation:
        """A layer without a rotary call: fine when its keys really do not depend on position."""
        cache = ProbeCache(self.config)
        ids = self.ids[:, :1].repeat(2, 1)
        positions = torch.tensor([[0], [SHIFT]], device=self.device)
        # One token sees only itself, so attention does not depend on position, and neither may the keys.
        watched_forward(self.decoder, cache, input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids))
        keys = cache.seen[layer][0]
        if not torch.equal(keys[0], keys[1]):
            raise Unsupported(f"layer {layer} rotates its keys where they cannot be seen before rotation")
        return Rotation()

    def _check_causal(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        for layer, pair in enumerate(zip(keys, values, strict=True)):
            for tensor in pair:
                if _distance(tensor[0, :, : PREFIX - 2], tensor[1, :, : PREFIX - 2]) > TOLERANCE[tensor.dtype]:
                    raise Unsupported(f"the model is not causal: layer {layer} of a prefix depends on what follows")

    def _shifts(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> bool:
        return all(
            _distance(tensor[0], tensor[2]) <= TOLERANCE[tensor.dtype]
            for pair in zip(keys, values, strict=True)
            for tensor in pair
        )

    def _check_reload(
        self,
        specs: list[LayerSpec],
        rotations: list[Rotation],
        originals: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> None:
        """Going on from stored originals must give the bits that going on from the same cache in memory gives."""
        memory = DynamicCache(config=self.config)
        for layer, rotation in enumerate(rotations):
            memory.update(rotation.rotate(originals[layer][:1], 0), values[layer][:1].clone(), layer)
        recorder = Recorder(
            [Row(self.ids[0, :PREFIX].tolist(), specs, originals[0].dtype, PREFIX, lambda: None)],
            torch.ones((1, PREFIX), dtype=torch.bool),
            rotations,
            originals[0].dtype,
            False,
        )
        recorder.end_all("attach test")
        device = common_device(specs)
        if device.type == "cuda":
            GPU.wait()  # compiled and tried out here, on this model, and not while somebody waits for a prompt
        source = _Originals(originals, values, device)
        gather = Gather([source], [PREFIX], PREFIX, specs, rotations, originals[0].dtype, device=device)
        loaded = Loaded(gather, SUFFIX, specs, recorder, _never, patience=0.0)
        mine = ReuseCache(self.owner, loaded, recorder, specs, originals[0].dtype)
        expected, got = self._go_on(memory), self._go_on(mine)
        if not torch.equal(expected, got):
            raise Unsupported("going on from stored keys and values does not give the same bits as going on in memory")

    def _go_on(self, cache: Any) -> torch.Tensor:
        out = self.decoder(
            input_ids=self.ids[:, PREFIX:],
            attention_mask=torch.ones_like(self.ids),
            position_ids=torch.arange(PREFIX, PREFIX + SUFFIX, device=self.device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = out.last_hidden_state
        return hidden


class _Originals:
    """What a load of the store gives, out of tensors; it goes through the very code that serves loads."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], device: torch.device) -> None:
        self._states = [
            (one[0].detach().to(device).contiguous(), other[0].detach().to(device).contiguous())
            for one, other in zip(keys, values, strict=True)
        ]

    def wait(self, layer: int, timeout: float | None = None) -> bool:
        """Everything is there."""
        return layer < len(self._states)

    def places(self, layer: int) -> list[Place]:
        """The only block."""
        keys, values = self._states[layer]
        return [Place(keys.data_ptr(), values.data_ptr(), PREFIX, PREFIX)]

    def fetched(self, layer: int) -> None:
        """Nothing came from disk."""

    def release(self) -> None:
        """Nothing to give back."""


def _never() -> list[tuple[torch.Tensor, torch.Tensor]]:
    raise AssertionError("tensors in memory cannot fail to load")


def _settle_queries(rotation: Rotation, keys: torch.Tensor) -> None:
    """Whether the function works on queries without heads; if not, it is given the keys in their place."""
    if rotation.function is None:
        return
    try:
        rotation.rotate(keys[:1], 0)
    except (RuntimeError, IndexError, ValueError):
        rotation.empty_queries = False


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference in units of the tensor's own spread."""
    one, other = one.float(), other.float()
    spread = float(one.std()) or 1.0
    return float((one - other).abs().max()) / spread
