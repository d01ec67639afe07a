"""Layer plans: which layers of a model keep keys and values, and how the others rebuild theirs from them.

A plan is what a block holds: stored layers only, in order. It says nothing of weights; those are the model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvstore.errors import BadInput
from kvstore.layout import LayerShape, Layout

FIELDS = ("keys", "values", "weighted")


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A layer without keys and values of its own.

    ``keys`` and ``values`` name the stored layers that they come from, by number in the model. Not ``weighted``: the
    one source as it is. ``weighted``: a sum of the sources, each multiplied by a learned vector over its channels, in
    which both channels of a rotary pair of the keys share one number (FusedKV, section 3).
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    weighted: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """For each layer of a model, from the bottom: None where it is stored, else how it is rebuilt. Hashable."""

    name: str
    layers: tuple[Rebuilt | None, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise BadInput(f"the layer plan {self.name!r} has no layers")
        for number, layer in enumerate(self.layers):
            if layer is not None:
                self._check_sources(number, layer)

    def _check_sources(self, number: int, layer: Rebuilt) -> None:
        for what, sources in (("keys", layer.keys), ("values", layer.values)):
            place = f"layer plan {self.name!r}: the {what} of layer {number}"
            if not sources or (len(sources) > 1 and not layer.weighted):
                raise BadInput(f"{place} need one source, or a weighted sum of several; they have {len(sources)}")
            if len(set(sources)) < len(sources):
                raise BadInput(f"{place} name a source twice; name each layer once")
            for source in sources:
                if not 0 <= source < number:
                    raise BadInput(f"{place} come from layer {source}; a source must be one of the layers below")
                if self.layers[source] is not None:
                    raise BadInput(f"{place} come from layer {source}, which is rebuilt itself; name a stored layer")

    # -- what is stored -----------------------------------------------------------------------------------------------

    @cached_property
    def stored(self) -> tuple[int, ...]:
        """The stored layers, by number in the model; a block holds them in this order."""
        return tuple(number for number, layer in enumerate(self.layers) if layer is None)

    @cached_property
    def sources(self) -> dict[int, int]:
        """The stored layers that others are rebuilt from, each with the last layer that needs it."""
        last: dict[int, int] = {}
        for number, layer in enumerate(self.layers):
            if layer is not None:
                last |= dict.fromkeys((*layer.keys, *layer.values), number)
        return last

    @property
    def is_standard(self) -> bool:
        """Whether every layer is stored."""
        return len(self.stored) == len(self.layers)

    def layout(self, shapes: Sequence[LayerShape], dtype: str, block_tokens: int) -> Layout:
        """Layout of blocks of a model whose layers, all of them, have these shapes.

        ``BadInput``: a rebuilt layer and a source of its differ in heads or dims, or the plan is for another number of
        layers.
        """
        self.check(shapes)
        return Layout(tuple(shapes[number] for number in self.stored), dtype, block_tokens)

    def spread(self, stored: Sequence[LayerShape]) -> tuple[LayerShape, ...]:
        """Shapes of all layers, out of those of the stored ones: a rebuilt layer has its first sources'."""
        known = dict(zip(self.stored, stored, strict=True))
        shapes = []
        for number, layer in enumerate(self.layers):
            keys, values = (number, number) if layer is None else (layer.keys[0], layer.values[0])
            shapes.append(LayerShape(known[keys].heads, known[keys].key_dim, known[values].value_dim))
        return tuple(shapes)

    def check(self, shapes: Sequence[LayerShape]) -> None:
        """Raises ``BadInput`` unless these shapes, one for each layer of the model, suit the plan."""
        if len(shapes) != len(self.layers):
            raise BadInput(f"layer plan {self.name!r} is for {len(self.layers)} layers; the model has {len(shapes)}")
        for number, layer in enumerate(self.layers):
            if layer is None:
                continue
            wanted = shapes[number]
            for source in layer.keys:
                found = shapes[source]
                self._check_equal("keys", number, source, (wanted.heads, wanted.key_dim), (found.heads, found.key_dim))
            for source in layer.values:
                found = shapes[source]
                mine, theirs = (wanted.heads, wanted.value_dim), (found.heads, found.value_dim)
                self._check_equal("values", number, source, mine, theirs)

    def _check_equal(
        self, what: str, number: int, source: int, wanted: tuple[int, int], found: tuple[int, int]
    ) -> None:
        if found != wanted:
            raise BadInput(
                f"layer plan {self.name!r}: layer {number} has {wanted[0]} key-value heads of {wanted[1]} dims, and "
                f"its {what} come from layer {source}, which has {found[0]} of {found[1]}; they must be equal"
            )

    # -- as text ------------------------------------------------------------------------------------------------------

    def to_list(self) -> list[dict[str, Any] | None]:
        """As a configuration file holds it; ``read`` takes it back."""
        return [
            None
            if layer is None
            else {"keys": list(layer.keys), "values": list(layer.values), "weighted": layer.weighted}
            for layer in self.layers
        ]

    @property
    def text(self) -> str:
        """What a fingerprint holds of it: all that decides what stored bytes mean; not its name."""
        return "standard" if self.is_standard else json.dumps(self.to_list(), separators=(",", ":"))


def read(given: object, layers: int) -> LayerPlan:
    """The plan that a name, or a list of one item per layer (None, or keys, values, weighted), stands for.

    Raises ``BadInput`` with the place for what is neither.
    """
    if isinstance(given, str):
        return named(given, layers)
    if not isinstance(given, list | tuple):
        raise BadInput(f"a layer plan is one of {', '.join(PLANS)}, or a list of one item per layer; not {given!r}")
    if len(given) != layers:
        raise BadInput(f"the layer plan lists {len(given)} layers; the model has {layers}")
    return LayerPlan("custom", tuple(_read_layer(number, item) for number, item in enumerate(given)))


def _read_layer(number: int, item: object) -> Rebuilt | None:
    if item is None:
        return None
    if not isinstance(item, dict) or not {"keys", "values"} <= item.keys() <= set(FIELDS):
        raise BadInput(
            f'layer plan, layer {number}: give null for a stored layer, or {{"keys": [n], "values": [n], '
            f'"weighted": true or false}}; not {item!r}'
        )
    sources = []
    for what in ("keys", "values"):
        listed = item[what]
        if not isinstance(listed, list | tuple) or not all(type(source) is int for source in listed):
            raise BadInput(f"layer plan, layer {number}: {what} must be a list of layer numbers, not {listed!r}")
        sources.append(tuple(listed))
    return Rebuilt(sources[0], sources[1], bool(item.get("weighted", False)))


def named(name: str, layers: int) -> LayerPlan:
    """The plan of this name for a model of ``layers``. Raises ``BadInput`` for names and sizes that there are not."""
    make = PLANS.get(name)
    if make is None:
        raise BadInput(f"there is no layer plan {name!r}; choose from {', '.join(PLANS)}")
    return LayerPlan(name, make(layers))


def _standard(layers: int) -> tuple[Rebuilt | None, ...]:
    return (None,) * layers


def _cla(layers: int) -> tuple[Rebuilt | None, ...]:
    """Cross-layer attention: of each two neighbours the lower one is stored, for both."""
    return tuple(Rebuilt((number - 1,), (number - 1,)) if number % 2 else None for number in range(layers))


def _halves(
    keys: Callable[[int], Sequence[int]], values: Callable[[int], Sequence[int]], weighted: bool = False
) -> Any:
    """Plans that store the lower half (and the middle of an odd number); its top layer is passed to both functions."""

    def make(layers: int) -> tuple[Rebuilt | None, ...]:
        half = (layers + 1) // 2
        if half < 2:
            raise BadInput(f"this layer plan needs a first and a middle layer, so at least 3 layers, not {layers}")
        upper = Rebuilt(tuple(keys(half - 1)), tuple(values(half - 1)), weighted)
        return (None,) * half + (upper,) * (layers - half)

    return make


PLANS: dict[str, Callable[[int], tuple[Rebuilt | None, ...]]] = {
    "standard": _standard,
    "cla": _cla,
    "yoco": _halves(lambda top: [top], lambda top: [top]),
    "fusedkv-lite": _halves(lambda top: [top], lambda top: [0]),
    "fusedkv-lite-reversed": _halves(lambda top: [0], lambda top: [top]),
    "fusedkv": _halves(lambda top: [0, top], lambda top: [0, top], weighted=True),
}
