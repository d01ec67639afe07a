"""A request laid out along its schema: what stands at which position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.keys import TOKEN_BYTES
from kvstore.pml.modules import Leaf, Module, Parameter, Union, members
from kvstore.pml.request import Import, Request


@dataclass(frozen=True, slots=True)
class Stand:
    """Tokens at a position. ``item``: what of the schema they are, or take the room of; None for free text."""

    token_ids: bytes
    position: int
    item: Leaf | Parameter | None
    cached: bool


class Laying:
    """One walk along a schema. ``packed`` closes all gaps; else every item keeps its place in the schema.

    Free text pushes all that is behind it.
    """

    def __init__(self, request: Request, packed: bool) -> None:
        self._request, self._packed = request, packed
        self._pushed = 0  # by free text so far
        self._end = 0

    def stands(self, root: Module) -> Iterator[Stand]:
        """In order; positions never go back."""
        before = self._request.first
        for item in root.items:
            module = self._there(item, self._request.root)
            if module is None:
                yield from self._item(item, root, self._request.root)
                continue
            yield from self._free(before, item.offset)
            before = []
            found = self._request.root.modules[module]
            yield from self._module(module, found)
            yield from self._free(found.behind, item.offset + item.length)
        yield from self._free(self._request.last, root.length)

    def _there(self, item: Leaf | Parameter | Module | Union, within: Import) -> Module | None:
        return next((module for module in members(item) if module in within.modules), None)

    def _module(self, module: Module, found: Import) -> Iterator[Stand]:
        for item in module.items:
            inner = self._there(item, found)
            if inner is not None:
                yield from self._module(inner, found.modules[inner])
            else:
                yield from self._item(item, module, found)

    def _item(self, item: Leaf | Parameter | Module | Union, module: Module, found: Import) -> Iterator[Stand]:
        if isinstance(item, Leaf):
            yield self._stand(item.token_ids, item.offset, item, module.cached)
        elif isinstance(item, Parameter) and found.arguments.get(item):
            yield self._stand(found.arguments[item], item.offset, item, False)

    def _free(self, texts: list[bytes], offset: int) -> Iterator[Stand]:
        for tokens in texts:
            yield self._stand(tokens, offset, None, False)
            self._pushed += len(tokens) // TOKEN_BYTES

    def _stand(self, tokens: bytes, offset: int, item: Leaf | Parameter | None, cached: bool) -> Stand:
        position = self._end if self._packed else offset + self._pushed
        self._end = position + len(tokens) // TOKEN_BYTES
        return Stand(tokens, position, item, cached)
