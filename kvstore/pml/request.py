"""What a prompt asks of a schema: which modules, with what arguments, and the free text between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from kvstore.errors import BadInput
from kvstore.keys import TOKEN_BYTES
from kvstore.pml.markup import Element, Letters, blank, collapsed, known, read
from kvstore.pml.modules import Module, Parameter
from kvstore.pml.words import ROLES, Words


@dataclass(eq=False)
class Import:
    """A module that is there."""

    arguments: dict[Parameter, bytes] = field(default_factory=dict)
    modules: dict[Module, Import] = field(default_factory=dict)  # within it
    behind: list[bytes] = field(default_factory=list)  # free text right behind it

    def walk(self) -> list[Module]:
        """All modules within it."""
        return [found for module, inner in self.modules.items() for found in (module, *inner.walk())]


@dataclass(eq=False)
class Request:
    """A prompt, before it is laid out."""

    root: Import
    first: list[bytes] = field(default_factory=list)  # free text before all modules
    last: list[bytes] = field(default_factory=list)  # free text behind everything

    @classmethod
    def of(cls, text: str, schema: Module, words: Words) -> Self:
        """Raises ``BadInput`` with the place of what the schema does not have, or of an argument without room."""
        element = read(text, "prompt")
        if element.tag != "prompt":
            element.refuse(f'a prompt is written <prompt schema="{schema.name}">')
        element.only("schema")
        if element.asked("schema") != schema.name:
            element.refuse(f"this is the schema {schema.name!r}, not {element.attributes['schema']!r}")
        request = cls(Import())
        _Reader(schema, words, request).read(element)
        if request.root.modules:
            last = list(request.root.modules.values())[-1]
            request.last, last.behind = last.behind, []
        else:
            request.last, request.first = request.first, []
        return request


class _Reader:
    """One walk through a prompt's markup."""

    def __init__(self, schema: Module, words: Words, request: Request) -> None:
        self._schema, self._words, self._request = schema, words, request
        self._texts = request.first  # where free text goes

    def read(self, element: Element) -> None:
        """What stands in the prompt itself, or in a role's tag in it."""
        run: list[Letters] = []
        for child in element.children:
            if isinstance(child, Letters):
                run.append(child)
                continue
            self._letters(run)
            run = []
            if child.tag in ROLES:
                self._role(child)
            else:
                self._texts = _imported(child, self._schema, self._request.root, self._words).behind
        self._letters(run)

    def _role(self, element: Element) -> None:
        element.only()
        try:
            turn = self._words.turn(element.tag)
        except BadInput as error:
            element.refuse(str(error))
        if element.children:
            self._text(turn.before)
            self.read(element)
            self._text(turn.behind)
        else:
            self._text(turn.empty)

    def _letters(self, run: list[Letters]) -> None:
        if not blank(run):
            self._text(collapsed(run))

    def _text(self, text: str) -> None:
        tokens = self._words.encode(text)
        if tokens:
            self._texts.append(tokens)


def _imported(element: Element, parent: Module, within: Import, words: Words) -> Import:
    """Adds a module that the prompt names, with all that it names in it."""
    module = parent.modules.get(element.tag)
    if module is None:
        element.refuse(f"{parent.name!r} has no module {element.tag!r}{known(element.tag, parent.modules)}")
    if module in within.modules:
        element.refuse("the module is there already; a prompt has each at most once")
    for other in within.modules.keys() & module.union:
        element.refuse(f"{other.name!r} of the same union is there already; a prompt has one of them at most")
    found = within.modules[module] = Import()
    for name, value in element.attributes.items():
        parameter = module.parameters.get(name)
        if parameter is None:
            element.refuse(f"{module.name!r} has no parameter {name!r}{known(name, module.parameters)}")
        tokens = words.encode(value)
        if len(tokens) // TOKEN_BYTES > parameter.length:
            element.refuse(
                f"the argument {name!r} has {len(tokens) // TOKEN_BYTES} tokens, and there is room for "
                f"{parameter.length}: shorten it, or give the parameter more length"
            )
        found.arguments[parameter] = tokens
    for child in element.children:
        if isinstance(child, Element):
            _imported(child, module, found, words)
        elif not blank([child]):
            element.refuse("free text stands between modules, not in one; put it before or behind the tag")
    return found
