"""From layers to settings, and from what is wrong to sentences."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvstore.errors import BadInput
from kvstore.settings import checks
from kvstore.settings.document import Keys, dotted
from kvstore.settings.layer import EnvironLayer, FileLayer, FlagLayer, Layer
from kvstore.settings.names import beside, meant
from kvstore.settings.rows import leaves
from kvstore.settings.schema import Settings
from kvstore.settings.secret import too_open

_PASSWORD = re.compile(r"://[^\s'\"]*@")
_NOT_A_TABLE = {"model_type", "model_attributes_type", "mapping_type", "dict_type"}


def load(
    file: str | os.PathLike[str] | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    serve: bool = True,
) -> Settings:
    """Settings of a file (TOML or YAML), over them those of the environment, over them those of flags.

    ``flags``: by the names of settings, nested ones with a dot ("redis.ttl"; "redis" alone is its URL); None is not
    given. ``serve``: a daemon is to start with them, so something must say where clients find it.

    Raises ``BadInput`` with a sentence for each thing that is wrong, all at once: names that are unknown, values that
    make no sense or do not go together, and secret files that cannot be read or that others can.
    """
    layers: list[Layer] = [FileLayer(Path(file))] if file is not None else []
    layers += [EnvironLayer(environ), FlagLayer(flags or {})]
    found = _Loading(layers)
    settings = found.settings()
    if not any(layer.faults for layer in layers):
        found.check(settings)
        if serve and settings.socket_path is None and not environ.get("LISTEN_FDS") and not found.failed:
            found.sentences.append("nothing says where clients find the daemon; give --dir DIR or --socket PATH")
    if len(said := list(dict.fromkeys(found.sentences))) > 1:
        raise BadInput("\n  ".join([f"{len(said)} things are wrong with the settings:", *said]))
    if said:
        raise BadInput(said[0])
    return settings


class _Loading:
    """Layers on their way to settings. ``failed``: what is wrong by itself; it counts as not given."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.sentences = [fault for layer in layers for fault in layer.faults]
        self.sentences += [_unknown(layer, keys) for layer in layers for keys in layer.unknown]
        self.failed: list[Keys] = [keys for layer in layers for keys in layer.unknown]

    def settings(self) -> Settings:
        """What the layers make together, without what failed."""
        values: dict[str, Any] = {}
        for layer in self.layers:
            values = _over(values, layer.values)
        try:
            settings = Settings.model_validate(values)
        except ValidationError as error:
            for one in sorted(error.errors(include_url=False, include_input=False), key=self._rank):
                keys = tuple(map(str, one["loc"]))
                said = one.get("ctx", {}).get("error") or one["msg"]
                self.sentences.append(self._sentence(keys, one["type"], str(said)))
                self.failed.append(keys)
                _drop(values, keys)
            settings = Settings.model_validate(values)
        sources = {leaf.keys: self._source(leaf.keys) for leaf in leaves(settings)}
        settings.came_from({keys: layer.place(keys) for keys, layer in sources.items() if layer})
        return settings

    def check(self, settings: Settings) -> None:
        """Adds what is wrong with settings that are right one by one."""
        for fault in checks.faults(settings):
            if any(_touch(keys, failed) for keys in fault.about for failed in self.failed):
                continue  # it may be due to what is missing now
            source = next(((layer, keys) for keys in fault.about if (layer := self._source(keys))), None)
            self.sentences.append(_masked(f"{source[0].place(source[1])}: {fault.text}" if source else fault.text))
        for leaf in leaves(settings):
            source_of = self._source(leaf.keys)
            if isinstance(source_of, FileLayer) and leaf.kind.secret(leaf.value):
                complaint = too_open(source_of.path, f"{dotted(leaf.keys)} is secret", source_of.path.stat())
                self.sentences += [f"{source_of.place(leaf.keys)}: {complaint}"] if complaint else []

    def _rank(self, error: ErrorDetails) -> tuple[int, int]:
        keys = tuple(map(str, error["loc"]))
        layer = self._source(keys)
        return (self.layers.index(layer), layer.rank(keys)) if layer else (0, 0)

    def _source(self, keys: Keys) -> Layer | None:
        return next((layer for layer in reversed(self.layers) if layer.has(keys)), None)

    def _sentence(self, keys: Keys, kind: str, said: str) -> str:
        layer = self._source(keys)
        assert layer is not None, keys
        if kind == "extra_forbidden":
            return _unknown(layer, keys)
        if kind in _NOT_A_TABLE:
            return f"{layer.place(keys)}: {dotted(keys)} is a table of settings, and no setting itself"
        above = dotted(keys[:-1]) + "." if kind == "value_error" and len(keys) > 1 else ""
        return _masked(f"{layer.place(keys)}: {above}{said}")


def _unknown(layer: Layer, keys: Keys) -> str:
    place, name = layer.place(keys), layer.spelled(keys)
    known = meant(keys)
    hint = (
        f"did you mean {layer.spelled(known)}?" if known else f"there are {', '.join(beside(keys) or beside(keys[:1]))}"
    )
    return f"{name} is no setting; {hint}" if place == name else f"{place}: {name} is no setting; {hint}"


def _masked(sentence: str) -> str:
    """Without what may be a password, where a URL was given as something else."""
    return _PASSWORD.sub("://(secret)@", sentence)


def _over(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of both, with the values of ``high`` where both have one; new tables throughout."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _over(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def _drop(values: dict[str, Any], keys: Keys) -> None:
    for key in keys[:-1]:
        values = values[key]
    del values[keys[-1]]


def _touch(one: Keys, other: Keys) -> bool:
    """Whether one is the other, or is in it."""
    return all(a == b for a, b in zip(one, other, strict=False))
