"""A schema, compiled: prompts become compositions, and it says what is to be encoded for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from kvstore.composition import Composition, Part, Placement, Text
from kvstore.errors import BadInput
from kvstore.files import OsFiles
from kvstore.keys import token_bytes
from kvstore.pml.compiler import Compiler
from kvstore.pml.encoding import Encoding, encoding
from kvstore.pml.laying import Laying
from kvstore.pml.markup import MAX_BYTES, read, too_large
from kvstore.pml.modules import Leaf, Module
from kvstore.pml.request import Request
from kvstore.pml.scaffold import scaffold
from kvstore.pml.words import Words

Layout = Literal["paper", "packed"]


class Schema:
    """Immutable once it is made; any thread, if the tokenizer is.

    ``len()`` is the number of positions that it reserves: prompts need room for all of them, whatever they import.
    """

    def __init__(self, root: Module, words: Words, layout: Layout, context: bytes) -> None:
        """``parse`` and ``load`` make it."""
        self.name = root.name
        self._root, self._words, self._packed = root, words, layout == "packed"
        self._context = context
        self._placeholder = words.placeholder() if any(module.parameters for module in root.walk()) else b""
        self._alone: list[Encoding] = []
        self._together: list[Encoding] = []  # the largest first
        for module in root.walk():
            own = ((item, item.offset) for item in module.own())
            made = encoding([module], own, self._placeholder, context) if module.cached else None
            if made is not None:
                self._alone.append(made)
        self._placed = {leaf: placed for made in self._alone for leaf, placed in made.placed.items()}

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        tokenizer: Any,
        layout: Layout = "paper",
        context: object = (),
        scaffolds: Iterable[Sequence[str]] = (),
        roles: Mapping[str, Sequence[str]] | None = None,
        folder: str | Path | None = None,
        source: str = "schema",
    ) -> Self:
        """From its text.

        ``tokenizer``: of Hugging Face, or anything with ``encode(text) -> list[int]``. ``layout``: "paper" leaves the
        room of what a prompt does not have, "packed" closes it. ``context``: tokens that every chain begins with, and
        that are not placed. ``scaffolds``: sets of modules, by dotted path, that are encoded together besides.
        ``roles``: for a role the texts before and behind its turns, instead of the chat template's. ``folder``: where
        ``src`` finds files. ``source``: what errors call the text.

        Raises ``BadInput`` with line, column and tag.
        """
        if layout not in ("paper", "packed"):
            raise BadInput(f"layout={layout!r}; give 'paper' or 'packed'")
        words = Words(tokenizer, roles)
        element = read(text, source)
        compiler = Compiler(words, None if folder is None else Path(folder), len(text.encode()))
        schema = cls(compiler.schema(element), words, layout, token_bytes(context))
        for number, names in enumerate(scaffolds):
            listed = names.split() if isinstance(names, str) else list(names)
            compiler.scaffolds.append((f"scaffolds[{number}]", listed))
        for place, names in compiler.scaffolds:
            schema._add(place, names)
        return schema

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Self:
        """From a UTF-8 file; ``src`` reads from its folder. Options and errors are those of ``parse``."""
        path, files = Path(path), OsFiles()
        try:
            size = files.size(str(path))
            if size > MAX_BYTES:
                too_large(str(path), size)
            text = files.read_small(str(path), MAX_BYTES + 1).decode()
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadInput(f"{path} is not UTF-8 at byte {error.start}") from None
        return cls.parse(text, **{"folder": path.parent, "source": path.name, **options})

    def _add(self, place: str, names: Sequence[str]) -> None:
        """One more scaffold."""
        modules, request = scaffold(self._root, names, place, self._placeholder)
        inside = {item for module in modules for item in module.own()}
        stands = Laying(request, self._packed).stands(self._root)
        items = ((stand.item, stand.position) for stand in stands if stand.item in inside)
        made = encoding(modules, items, self._placeholder, self._context)
        if made is not None:
            self._together.append(made)
            self._together.sort(key=lambda each: -len(each.modules))

    def __len__(self) -> int:
        return self._root.length

    def encodings(self) -> list[Composition]:
        """What has to be computed and stored, each alone: compositions of texts, modules first, then scaffolds."""
        return [made.composition for made in (*self._alone, *self._together)]

    def prompt(self, text: str) -> Composition:
        """A prompt: what is cached as placements, all else as text.

        Raises ``BadInput`` with line, column and tag for what the schema does not have, arguments that are too long,
        and for a prompt without a token.
        """
        request = Request.of(text, self._root, self._words)
        stands = list(Laying(request, self._packed).stands(self._root))
        if not stands:
            raise BadInput("the prompt has no tokens; import a module, or add text")
        there = [(stand.item, stand.position) for stand in stands]
        placed = dict(self._placed)
        free = set(request.root.walk())
        for made in self._together:
            if free.issuperset(made.modules) and made.fits(there):
                free.difference_update(made.modules)
                placed |= made.placed
        parts: list[Part] = []
        for stand in stands:
            if isinstance(stand.item, Leaf) and stand.cached:
                chain = placed[stand.item]
                parts.append(Placement(chain.chain, chain.start, chain.stop, stand.position))
            else:
                parts.append(Text(stand.token_ids, stand.position))
        return Composition(tuple(parts))
