"""Sets of modules that are encoded together, as a schema's author names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore.errors import BadInput
from kvstore.pml.markup import known
from kvstore.pml.modules import Module, Union
from kvstore.pml.request import Import, Request


def scaffold(root: Module, names: Sequence[str], place: str, placeholder: bytes) -> tuple[list[Module], Request]:
    """The modules of a set in document order, and the prompt that has just these, with all room filled.

    Members that stand for the unions of a module are in the set with it. Raises ``BadInput``, naming ``place``.
    """
    chosen: dict[Module, None] = {}
    request = Request(Import())
    for name in names:
        path = _path(root, name, place)
        within = request.root
        for module in path:
            within = within.modules.setdefault(module, Import())
        for module, inner in _with_defaults(path[-1], within):
            inner.arguments = {one: one.filled(placeholder) for one in module.parameters.values()}
            chosen[module] = None
    if len(chosen) < 2:
        raise BadInput(f"{place}: a scaffold names two modules at least; one alone is encoded anyway")
    for module in chosen:
        if not module.cached:
            raise BadInput(f'{place}: {module.name!r} has cache="false", so it cannot be encoded ahead')
    _check_unions(root, request.root, place)
    return [module for module in root.walk() if module in chosen], request


def _path(root: Module, name: str, place: str) -> list[Module]:
    found = list(_paths(root, name))
    if not found:
        paths = list(_all(root))
        raise BadInput(f"{place}: there is no module {name!r}{known(name, paths)}")
    if len(found) > 1:
        raise BadInput(
            f"{place}: {name!r} can be read in {len(found)} ways; rename a module that has a dot in its name"
        )
    return found[0]


def _paths(module: Module, name: str) -> Iterator[list[Module]]:
    """All ways to read a dotted path; names may hold dots themselves."""
    for inner in module.modules.values():
        if name == inner.name:
            yield [inner]
        elif name.startswith(inner.name + "."):
            for rest in _paths(inner, name[len(inner.name) + 1 :]):
                yield [inner, *rest]


def _all(module: Module, before: str = "") -> Iterator[str]:
    for inner in module.modules.values():
        yield before + inner.name
        yield from _all(inner, f"{before}{inner.name}.")


def _with_defaults(module: Module, within: Import) -> Iterator[tuple[Module, Import]]:
    yield module, within
    for item in module.items:
        if isinstance(item, Union) and item.default is not None:
            inner = within.modules.setdefault(item.default, Import())
            yield from _with_defaults(item.default, inner)


def _check_unions(module: Module, within: Import, place: str) -> None:
    for item in module.items:
        if isinstance(item, Union):
            there = [member.name for member in item.members if member in within.modules]
            if len(there) > 1:
                raise BadInput(f"{place}: {' and '.join(there)} are of one union, so no prompt has both")
    for inner, found in within.modules.items():
        _check_unions(inner, found, place)
