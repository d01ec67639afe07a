"""Settings one by one: for people, who also want to know where each comes from, and as a file that loads again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from kvstore.settings.document import Keys, dotted, quoted
from kvstore.settings.kind import SECRET, Kind
from kvstore.settings.schema import Settings, Table, Tenant

ANY = "NAME"  # stands for the name of a tenant where there is none
_TABLES = {"redis": "Redis", "encryption": "Encryption", "tcp": "Tcp", "tenants": "Tenant"}


@dataclass(frozen=True)
class Row:
    """One setting: what it is called and may be, its value and default as TOML writes them, and what it means.

    ``origin``: the line, variable or flag that set it, or "default". Secrets are never in here.
    """

    name: str
    type: str
    value: str
    default: str
    origin: str
    description: str


@dataclass(frozen=True)
class Leaf:
    """One setting, as the schema and the program have it."""

    keys: Keys
    kind: Kind
    value: Any
    default: Any
    description: str


def explain(settings: Settings) -> list[Row]:
    """All settings, in the order of the schema; those of tenants for each of them, or once where there are none."""
    return [
        Row(
            dotted(leaf.keys),
            leaf.kind.name,
            _shown(leaf.kind, leaf.value),
            _shown(leaf.kind, leaf.default),
            settings.origin(leaf.keys),
            leaf.description,
        )
        for leaf in leaves(settings)
    ]


def as_toml(settings: Settings) -> str:
    """A file that loads as the same settings, but for secrets, which it leaves out."""
    lines: list[str] = []
    for keys, model in _tables(settings):
        lines += ["", f"[{dotted(keys)}]"] if keys else []
        for leaf in _leaves(keys, model):
            value = _shown(leaf.kind, leaf.value)
            name = dotted(leaf.keys[-1:])
            lines.append(f"# {name}: {value or 'not set'}" if value in ("", SECRET) else f"{name} = {value}")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The schema in JSON, of what may stand in a file."""
    schema = Settings.model_json_schema()
    for leaf in leaves(Settings()):
        table = schema["$defs"][_TABLES[leaf.keys[0]]] if len(leaf.keys) > 1 else schema
        field = table["properties"][leaf.keys[-1]]
        field["default"] = leaf.kind.show(leaf.default)
        if field["default"] is None:
            del field["default"]
    for name in ("redis", "encryption", "tcp"):
        schema["properties"][name] = {"$ref": f"#/$defs/{_TABLES[name]}"}
    url = {"type": ["string", "boolean"]}  # which may stand there alone
    schema["properties"]["redis"] = {"anyOf": [schema["properties"]["redis"], url]}
    return schema


def leaves(settings: Settings) -> Iterator[Leaf]:
    """All settings one by one; where there is no tenant, those that one would have, below ``ANY``."""
    models = [*_tables(settings)]
    for keys, model in models if settings.tenants else [*models, (("tenants", ANY), Tenant())]:
        yield from _leaves(keys, model)


def _tables(settings: Settings) -> Iterator[tuple[Keys, Table]]:
    yield (), settings
    for name in type(settings).model_fields:
        if isinstance(table := getattr(settings, name), Table):
            yield (name,), table
    yield from ((("tenants", name), tenant) for name, tenant in settings.tenants.items())


def _leaves(above: Keys, model: Table) -> Iterator[Leaf]:
    for name, field in type(model).model_fields.items():
        if kind := _kind(field):
            value = getattr(model, name)
            yield Leaf((*above, name), kind, value, field.default, field.description or "")


def _kind(field: FieldInfo) -> Kind | None:
    return next((one for one in field.metadata if isinstance(one, Kind)), None)


def _shown(kind: Kind, value: Any) -> str:
    """As TOML writes it; nothing where it cannot be written."""
    shown = kind.shown(value)
    if shown is None or shown == SECRET:
        return shown or ""
    if isinstance(shown, list):
        return f"[{', '.join(map(str, shown))}]"
    return quoted(shown) if isinstance(shown, str) else str(shown)
