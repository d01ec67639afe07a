"""The attach test: one short prompt shows how a model makes its keys, and whether they can be given back exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers.buffers import DTYPES, LayerSpec, Pair, dtype_name
from kvstore.adapters.transformers.cache import ReuseCache
from kvstore.adapters.transformers.form import find_form, is_steady
from kvstore.adapters.transformers.gather import Gather, Span
from kvstore.adapters.transformers.loaded import Loaded
from kvstore.adapters.transformers.originals import Originals
from kvstore.adapters.transformers.probe import ProbeCache, find_rotation, watched_forward
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.rotation import Form, Rotation
from kvstore.adapters.transformers.row import Row
from kvstore.adapters.transformers.served import Served, check_config
from kvstore.errors import BadInput, Unsupported
from kvstore.layout import LayerShape, Layout
from kvstore.plan import LayerPlan
from kvstore.tensors.transfer import GPU

PREFIX, SUFFIX, SHIFT = 8, 4, 19
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.05}


@dataclass(frozen=True)
class Attached:
    """What the attach test found. ``specs`` and ``rotations`` are those of the layers that ``plan`` stores."""

    plan: LayerPlan
    specs: tuple[LayerSpec, ...]
    rotations: tuple[Rotation, ...]
    dtype: torch.dtype
    supports: frozenset[str]

    @property
    def device(self) -> torch.device:
        """Where the cache is; the CPU when its layers are on several devices."""
        return common_device(self.specs)

    def layout(self, block_tokens: int) -> Layout:
        """Of blocks that hold the stored layers."""
        return self.plan.layout(self.plan.spread(shapes_of(self.specs)), dtype_name(self.dtype), block_tokens)

    @property
    def turnable(self) -> bool:
        """Whether kernels can turn the keys of all layers."""
        return all(rotation.form or rotation.function is None for rotation in self.rotations)


def shapes_of(specs: Sequence[LayerSpec]) -> list[LayerShape]:
    """As a layout has them."""
    return [LayerShape(spec.heads, spec.key_dim, spec.value_dim) for spec in specs]


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
    served = check_config(decoder.config)
    with undisturbed(decoder):
        return _Test(decoder, config, served, owner, seed).run()


class _Layer(NamedTuple):
    """What is found of a stored layer, and what it made: keys before rotation and values, as a block has them."""

    spec: LayerSpec
    rotation: Rotation
    keys: torch.Tensor
    values: torch.Tensor


class _Test:
    """One run: a batch of three rows tells most (the prompt, another ending, another position)."""

    def __init__(self, decoder: Any, config: Any, served: Served, owner: object, seed: int) -> None:
        self.decoder, self.config, self.owner = decoder, config, owner
        self.plan, self.windows = served.plan, served.windows
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
        layers = self._layers(cache, seen_angles)
        dtype = layers[0].keys.dtype
        if dtype_name(dtype) not in DTYPES or any(layer.keys.dtype != dtype for layer in layers):
            raise Unsupported(
                f"keys of dtype {', '.join(sorted({str(layer.keys.dtype) for layer in layers}))} cannot be stored"
            )
        specs, rotations = tuple(layer.spec for layer in layers), tuple(layer.rotation for layer in layers)
        try:
            self.plan.check(self.plan.spread(shapes_of(specs)))
        except BadInput as error:
            raise Unsupported(str(error)) from None
        states = [(layer.keys, layer.values) for layer in layers]
        self._check_causal(states)
        self._check_reload(specs, rotations, states)
        supports = {"exact"}
        if self._shifts(states):
            supports |= {"shifted", "modular"}
        return Attached(self.plan, specs, rotations, dtype, frozenset(supports))

    def _layers(self, cache: ProbeCache, angles: list[Any]) -> list[_Layer]:
        """The stored layers, by slot."""
        if tuple(sorted(cache.seen)) != self.plan.stored:
            wanted = "all" if self.plan.is_standard else f"those of the layer plan, {list(self.plan.stored)},"
            raise Unsupported(f"{len(cache.seen)} of {len(self.plan.layers)} layers use the cache; {wanted} must")
        if not angles:
            raise Unsupported("the model has no rotary embedding: only decoders that rotate their keys are served")
        forms: dict[Any, Form | None] = {}  # layers that rotate alike have one
        return [
            self._layer(number, window, cache, angles, forms)
            for number, window in zip(self.plan.stored, self.windows, strict=True)
        ]

    def _layer(
        self, number: int, window: int | None, cache: ProbeCache, angles: list[Any], forms: dict[Any, Form | None]
    ) -> _Layer:
        first, second, calls = cache.seen[number]
        rotation, swapped = find_rotation(number, first, calls, angles), False
        if rotation is None:  # in MLA it is the second that turns
            rotation = find_rotation(number, second, calls, angles)
            swapped = rotation is not None
        if rotation is None:
            rotation = self._unrotated(number)
        keys, values = (second, first) if swapped else (first, second)
        before = rotation.originals(calls, keys)
        if before is None or before.shape != keys.shape:
            raise Unsupported(f"the keys of layer {number} cannot be seen before rotation")
        _settle_queries(rotation, before)
        for row, start in ((0, 0), (2, SHIFT)):
            if not torch.equal(rotation.rotate(before[row : row + 1], start), keys[row : row + 1]):
                raise Unsupported(f"rotating the keys of layer {number} again does not give the same bits")
        heads, dim = keys.shape[1], keys.shape[3]
        alike = (rotation.function, rotation.table, rotation.angle_slots, rotation.part, heads, dim)
        if alike not in forms:
            if not is_steady(rotation, heads, dim, keys.dtype):
                raise Unsupported(
                    f"layer {number} gives a key other bits when other keys are rotated with it, so that stored keys "
                    f"cannot be given back exactly; use the model in another dtype than {dtype_name(keys.dtype)}"
                )
            forms[alike] = find_form(rotation, heads, dim, keys.dtype)
        rotation.form = forms[alike]
        return _Layer(LayerSpec(heads, dim, values.shape[3], keys.device, window, swapped), rotation, before, values)

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

    def _check_causal(self, states: Sequence[Pair]) -> None:
        for number, pair in zip(self.plan.stored, states, strict=True):
            for tensor in pair:
                if _distance(tensor[0, :, : PREFIX - 2], tensor[1, :, : PREFIX - 2]) > TOLERANCE[tensor.dtype]:
                    raise Unsupported(f"the model is not causal: layer {number} of a prefix depends on what follows")

    def _shifts(self, states: Sequence[Pair]) -> bool:
        return all(_distance(tensor[0], tensor[2]) <= TOLERANCE[tensor.dtype] for pair in states for tensor in pair)

    def _check_reload(self, specs: Sequence[LayerSpec], rotations: Sequence[Rotation], states: Sequence[Pair]) -> None:
        """Going on from stored originals must give the bits that going on from the same cache in memory gives."""
        memory, dtype = DynamicCache(config=self.config), states[0][0].dtype
        for slot, (keys, values) in enumerate(states):
            pair = specs[slot].exchanged(rotations[slot].rotate(keys[:1], 0), values[:1].clone())
            memory.update(*pair, self.plan.stored[slot])
        recorder = Recorder(
            [Row(self.ids[0, :PREFIX].tolist(), specs, dtype, PREFIX, lambda: None)],
            torch.ones((1, PREFIX), dtype=torch.bool),
            rotations,
            dtype,
            False,
        )
        recorder.end_all("attach test")
        device = common_device(specs)
        if device.type == "cuda":
            GPU.wait()  # compiled and tried out here, on this model, and not while somebody waits for a prompt
        source = Originals(states, device)
        gather = Gather([source], [[Span(0, 0, PREFIX, 0, 0)]], PREFIX, specs, rotations, dtype, device=device)
        loaded = Loaded(gather, SUFFIX, specs, recorder, _never, patience=0.0)
        mine = ReuseCache(self.owner, loaded, recorder, self.plan, specs, dtype)
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


def _never() -> list[Pair]:
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
