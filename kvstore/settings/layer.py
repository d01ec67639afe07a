"""Where settings come from: a file, the environment, flags. Each is a layer; a later one goes over an earlier one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from kvstore.errors import BadInput
from kvstore.settings.document import Document, Keys, dotted
from kvstore.settings.schema import Settings

PREFIX, BETWEEN = "KVSTORE_", "__"
SHORT = {"redis": "url"}  # a table that may be given as one value, and the setting that this is
# What Kubernetes puts into a pod's environment for every Service whose name begins with "kvstore".
_SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")


class Layer:
    """Values as they were written, in nested tables.

    ``faults``: what is wrong with the source itself, in sentences. ``unknown``: names that no schema could have.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.faults: list[str] = []
        self.unknown: list[Keys] = []

    def has(self, keys: Keys) -> bool:
        """Whether it says anything of a setting or table."""
        table: Any = self.values
        for key in keys:
            if not isinstance(table, Mapping) or key not in table:
                return False
            table = table[key]
        return True

    def spelled(self, keys: Keys) -> str:
        """A setting's name as this source writes it."""
        return dotted(keys)

    def place(self, keys: Keys) -> str:
        """Where this source says it."""
        return self.spelled(keys)

    def rank(self, keys: Keys) -> int:
        """In which order its settings are spoken of."""
        return 0


class FileLayer(Layer):
    """A file in TOML or YAML."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self._document = path, Document()
        try:
            self._document = Document.read(path)
        except BadInput as error:
            self.faults.append(f"{path} {error}")
        for fault in self._document.faults:
            self.faults.append(f"{path}, {fault}" if fault.startswith("line ") else f"{path} {fault}")
        for key, value in self._document.values.items():
            self.values[key] = _in_full(key, value)

    def rank(self, keys: Keys) -> int:
        """By lines."""
        return self._document.line(keys) or 0

    def place(self, keys: Keys) -> str:
        """The file, and the line where it is known."""
        line = self._document.line(keys)
        return f"{self.path}, line {line}" if line else str(self.path)


class _Variables(Settings, BaseSettings):
    """The schema, with what pydantic-settings wants to know to read an environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter=BETWEEN, enable_decoding=False)


class EnvironLayer(Layer):
    """Variables ``KVSTORE_HOST``, ``KVSTORE_REDIS__URL`` and so on."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__()
        self._names: dict[Keys, str] = {}
        for name in sorted(environ):
            if not name.startswith(PREFIX) or _SERVICE_LINK.fullmatch(name.removeprefix(PREFIX)):
                continue
            keys = tuple(name.removeprefix(PREFIX).lower().split(BETWEEN))
            keys = (*keys, SHORT[keys[0]]) if len(keys) == 1 and keys[0] in SHORT else keys
            if keys in self._names:
                self.faults.append(f"{self._names[keys]} and {name} are the same setting; leave one of them out")
            self._names[keys] = name
        source = EnvSettingsSource(_Variables)
        source.env_vars = {self.spelled(keys).lower(): environ[name] for keys, name in self._names.items()}
        self.values = source()
        self.unknown = [keys for keys in self._names if not self.has(keys)]  # what the schema did not take up

    def spelled(self, keys: Keys) -> str:
        """As a variable."""
        return PREFIX + BETWEEN.join(keys).upper()

    def place(self, keys: Keys) -> str:
        """The variable as it was written."""
        return self._names.get(keys, self.spelled(keys))


class FlagLayer(Layer):
    """Flags of a command line, by the names of settings: "host", "max_sessions", "redis.ttl". None: not given."""

    def __init__(self, flags: Mapping[str, object]) -> None:
        super().__init__()
        self._names: dict[Keys, str] = {}
        for name, value in flags.items():
            if value is None:
                continue
            keys = tuple(name.split("."))
            table = self.values
            for key in keys[:-1]:
                table = table.setdefault(key, {})
            table[keys[-1]] = _in_full(name, value)
            self._names[(*keys, SHORT[name]) if name in SHORT else keys] = "--" + name.replace("_", "-")

    def spelled(self, keys: Keys) -> str:
        """As a flag."""
        short = keys[:1] if keys[0] in SHORT and keys[1:] == (SHORT[keys[0]],) else keys
        return self._names.get(keys, "--" + ".".join(short).replace("_", "-"))


def _in_full(key: str, value: object) -> object:
    return value if key not in SHORT or isinstance(value, Mapping) else {SHORT[key]: value}
