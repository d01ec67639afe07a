"""A file of settings: what it says, and on which line it says it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.errors import BadInput

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 256 << 10
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_UNSEEN = re.compile("[\x7f-\x9f]")  # what JSON lets through and terminals obey
_TOML_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", re.DOTALL)

Keys = tuple[str, ...]


def quoted(text: str) -> str:
    """As a string of TOML on one line, with nothing in it that a terminal would obey."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def dotted(keys: Keys) -> str:
    """A path of keys as TOML writes it."""
    return ".".join(key if _BARE.fullmatch(key) else quoted(key) for key in keys)


@dataclass
class Document:
    """The values of a file as TOML or YAML makes them, and the lines of all keys. Keys without a value are not there.

    ``faults``: what makes it no document, in sentences that begin with the line where it is known.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Keys, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Document:
        """Raises ``BadInput`` for a file that cannot be read, or of no kind that is known."""
        readers = {".toml": _read_toml, ".yaml": _read_yaml, ".yml": _read_yaml}
        if path.suffix not in readers:
            raise BadInput("settings are in TOML or YAML; give the file a name that ends in .toml, .yaml or .yml")
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            text = data.decode("utf-8-sig")
        except OSError as error:
            raise BadInput(f"cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadInput(f"is not in UTF-8, see byte {error.start}") from error
        if len(data) > MAX_BYTES:
            raise BadInput("is too long for a file of settings")
        document = cls()
        try:
            readers[path.suffix](text, document)
        except RecursionError:
            document.faults.append("is nested too deeply for a file of settings")
        return document

    def line(self, keys: Keys) -> int | None:
        """The line of a key, or of the nearest one above it."""
        return next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), None)


def _read_toml(text: str, document: Document) -> None:
    try:
        document.values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _TOML_PLACE.fullmatch(str(error))
        said, line = (match[1], match[2]) if match else (str(error), None)
        document.faults.append(f"line {line or text.count(chr(10)) + 1}: {said}")
        return
    table: Keys = ()
    for line, statement in _statements(text):
        found = tomllib.loads(statement)
        header = statement.lstrip().startswith("[")
        keys = list(_paths(found))
        if header:
            table = max(keys, key=len)
        for path in keys:
            document.lines.setdefault(path if header else table + path, line)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each statement of a document that is one, with its first line: as many lines as make a document alone."""
    first, lines = 1, ""
    for number, line in enumerate(re.split(r"(?<=\n)", text), 1):
        lines += line
        try:
            tomllib.loads(lines)
        except tomllib.TOMLDecodeError:
            continue
        yield first, lines
        first, lines = number + 1, ""


def _paths(values: object) -> Iterator[Keys]:
    if isinstance(values, list):
        for one in values:
            yield from _paths(one)
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield (key,)
            yield from ((key, *below) for below in _paths(value))


def _read_yaml(text: str, document: Document) -> None:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise BadInput("needs PyYAML; install it, or write the settings in TOML") from error

    try:
        loader = yaml.SafeLoader(text)
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                document.faults.append(f"line {line}: aliases have no place in settings; write the value out")
            elif getattr(event, "tag", None) not in (None, "!"):
                document.faults.append(f"line {line}: tags have no place in settings; write the value plainly")
        if document.faults:
            return
        node = loader.get_single_node()
        if node is not None and not isinstance(node, yaml.MappingNode):
            document.faults.append("line 1: settings are written as `key: value`")
        elif node is not None:
            _note_lines(node, (), document)
            values = {} if document.faults else loader.construct_document(node)
            document.values = _without_nothing(values)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        document.faults.append(f"line {mark.line + 1}: {said}" if mark else said)
    except ValueError as error:  # a date that there never was
        document.faults.append(f"holds a value that is none: {error}")


def _note_lines(node: yaml.Node, above: Keys, document: Document) -> None:
    """Lines of all keys; keys that are there twice, or are no text, are faults."""
    import yaml

    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            document.faults.append(f"line {line}: a key must be text; put it in quotes")
            continue
        path = (*above, key.value)
        if path in document.lines:
            document.faults.append(f"line {line}: {dotted(path)} is on line {document.lines[path]} already")
        document.lines.setdefault(path, line)
        _note_lines(value, path, document)


def _without_nothing(values: dict[str, Any]) -> dict[str, Any]:
    """YAML's `key:` with nothing behind it says nothing."""
    return {
        key: _without_nothing(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
