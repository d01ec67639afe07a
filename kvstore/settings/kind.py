"""What a setting may be: how it is read from what somebody wrote, how it is written back, and what it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

SECRET = "(secret)"


@dataclass(frozen=True)
class Kind:
    """Stands in ``Annotated[TYPE, Kind(...)]``, and does all of the checking of one setting that stands alone.

    ``read`` takes the value as it was written (text from the environment, whatever TOML or YAML make of theirs) and
    the setting's name. It raises ``BadInput`` with a sentence that begins with this name: where the setting stands is
    put before it. ``show`` gives text, a number or a list that ``read`` makes the same value of, or None where only
    leaving it out does. A value of which ``secret`` says so never leaves the program, and no sentence names it.
    """

    name: str
    read: Callable[[object, str], Any]
    show: Callable[[Any], object] = lambda value: value
    json: Mapping[str, Any] = field(default_factory=dict, hash=False)
    secret: Callable[[Any], bool] = lambda value: False

    def shown(self, value: Any) -> Any:
        """As ``show``, but for secrets."""
        return SECRET if self.secret(value) else self.show(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        name = handler.field_name or "value"
        return core_schema.no_info_plain_validator_function(
            lambda value: self.read(value, name),
            serialization=core_schema.plain_serializer_function_ser_schema(self.shown),
        )

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return dict(self.json)
