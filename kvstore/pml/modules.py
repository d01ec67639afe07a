"""What a schema is made of: text, parameters, modules within modules, unions; each knows its place in the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.keys import TOKEN_BYTES


@dataclass(frozen=True, eq=False, slots=True)
class Leaf:
    """Text that is always there when its module is. ``offset``: its position in the schema."""

    token_ids: bytes
    offset: int

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.token_ids) // TOKEN_BYTES


@dataclass(frozen=True, eq=False, slots=True)
class Parameter:
    """Room for an argument of up to ``length`` tokens. ``scaffold``: tokens that stand in it while text is encoded."""

    name: str
    length: int
    scaffold: bytes
    offset: int

    def filled(self, placeholder: bytes) -> bytes:
        """What text behind it is encoded behind."""
        return self.scaffold + placeholder * (self.length - len(self.scaffold) // TOKEN_BYTES)


@dataclass(eq=False, slots=True)
class Module:
    """A named part of a schema. Without ``cached`` its text is computed in every prompt. Built once, then only read."""

    name: str
    place: str  # for errors
    offset: int
    cached: bool = True
    length: int = 0  # tokens, with room for arguments and the longest member of each union
    items: list[Leaf | Parameter | Module | Union] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)  # named directly within it, also as members of unions
    union: frozenset[Module] = frozenset()  # of which a prompt has one at most, itself among them

    def add(self, item: Leaf | Parameter | Module | Union) -> None:
        """Goes on with an item; text goes on with text. Its names must be new."""
        self.length += item.length
        last = self.items[-1] if self.items else None
        if isinstance(item, Leaf) and isinstance(last, Leaf):
            self.items[-1] = Leaf(last.token_ids + item.token_ids, last.offset)
            return
        self.items.append(item)
        if isinstance(item, Parameter):
            self.parameters[item.name] = item
        for module in members(item):
            self.modules[module.name] = module
            module.union = frozenset(members(item))

    def own(self) -> Iterator[Leaf | Parameter]:
        """Its text and the room in it, without that of modules within it."""
        for item in self.items:
            if isinstance(item, Leaf | Parameter):
                yield item

    def walk(self) -> Iterator[Module]:
        """It and all modules in it, in document order."""
        yield self
        for module in self.modules.values():
            yield from module.walk()


@dataclass(frozen=True, eq=False, slots=True)
class Union:
    """Modules of which a prompt has one at most. ``default``: the one that scaffolds have."""

    members: tuple[Module, ...]
    default: Module | None
    offset: int

    @property
    def length(self) -> int:
        """Of its longest member."""
        return max(member.length for member in self.members)


Item = Leaf | Parameter | Module | Union


def members(item: Item) -> tuple[Module, ...]:
    """The modules that stand there, if only one at a time."""
    if isinstance(item, Union):
        return item.members
    return (item,) if isinstance(item, Module) else ()
