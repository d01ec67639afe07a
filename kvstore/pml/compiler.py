"""Markup becomes modules: text is encoded leaf by leaf, and everything is given its place."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

from kvstore.errors import BadInput
from kvstore.files import OsFiles
from kvstore.keys import TOKEN_BYTES
from kvstore.pml.markup import MAX_BYTES, Element, Letters, blank, collapsed, known, too_large
from kvstore.pml.modules import Leaf, Module, Parameter, Union
from kvstore.pml.words import ROLES, Turn, Words

MAX_TOKENS = 1 << 24  # that a schema may reserve
WHERE = {  # tags that cannot stand everywhere
    "parameter": "put it into a module; nothing could give a schema an argument",
    "scaffold": "put it directly under <schema>",
}
TAGS = {"module", "union", "parameter", "scaffold", *ROLES}
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
COUNT = re.compile(r"[0-9]{1,8}")


class Compiler:
    """Compiles one schema."""

    def __init__(self, words: Words, folder: Path | None, size: int) -> None:
        """``folder``: where files that the schema names are; ``size``: bytes of the schema itself."""
        self._words, self._folder, self._size = words, folder, size
        self.scaffolds: list[tuple[str, list[str]]] = []  # place, names of modules

    def schema(self, root: Element) -> Module:
        """The root module. Raises ``BadInput`` with the place of what is not allowed."""
        if root.tag != "schema":
            root.refuse('a schema is written <schema name="...">')
        root.only("name")
        module = Module(_name(root), root.place, 0)
        self._fill(module, root, frozenset({"module", "union", "scaffold", *ROLES}))
        return module

    def _fill(self, module: Module, element: Element, allowed: Container[str]) -> None:
        """Goes on with what stands in an element."""
        run: list[Letters] = []
        before = ""  # the last tag
        for child in element.children:
            if isinstance(child, Letters):
                run.append(child)
            elif child.tag not in TAGS:
                _check_literal(child)
                run.append(Letters(child.written(), verbatim=True))
            elif child.tag not in allowed:
                child.refuse(f"<{child.tag}> cannot stand in {module.name!r}: {WHERE[child.tag]}")
            elif child.tag == "scaffold":
                self._scaffold(child)
            else:
                self._text(module, _leaf(run, before == child.tag == "parameter"))
                run, before = [], child.tag
                self._tag(module, child, allowed)
        self._text(module, _leaf(run, False))

    def _text(self, module: Module, text: str) -> None:
        tokens = self._words.encode(text)
        if tokens:
            module.add(Leaf(tokens, module.offset + module.length))

    def _tag(self, module: Module, element: Element, allowed: Container[str]) -> None:
        if element.tag in ROLES:
            element.only()
            turn = self._turn(element)
            if element.children:
                self._text(module, turn.before)
                self._fill(module, element, allowed)
                self._text(module, turn.behind)
            else:
                self._text(module, turn.empty)
            return
        if element.tag == "parameter":
            module.add(self._parameter(module, element))
        elif element.tag == "union":
            module.add(self._union(module, element))
        else:
            module.add(self._module(module, element))
        if module.offset + module.length > MAX_TOKENS:
            element.refuse(f"up to here the schema reserves more than {MAX_TOKENS} tokens")

    def _turn(self, element: Element) -> Turn:
        try:
            return self._words.turn(element.tag)
        except BadInput as error:
            element.refuse(str(error))

    def _module(self, parent: Module, element: Element) -> Module:
        element.only("name", "cache", "src")
        name = _name(element, parent.modules)
        if name in ROLES:
            element.refuse(f"{name!r} is a role's tag; call the module something else")
        cache = element.attributes.get("cache", "true" if parent.cached else "false")
        if cache not in ("true", "false"):
            element.refuse(f'cache is "true" or "false", not {cache!r}')
        module = Module(name, element.place, parent.offset + parent.length, cache == "true")
        if "src" in element.attributes:
            self._text(module, self._file(element, element.attributes["src"]))
        self._fill(module, element, frozenset({"module", "union", "parameter", *ROLES}))
        return module

    def _union(self, parent: Module, element: Element) -> Union:
        element.only("scaffold")
        offset, found = parent.offset + parent.length, dict[str, Module]()
        for child in element.children:
            if isinstance(child, Letters):
                if not blank([child]):
                    element.refuse("a union holds modules only; put its text into one of them, or before the union")
            elif child.tag != "module":
                child.refuse("a union holds modules only")
            elif child.attributes.get("name") in found:
                child.refuse(f"the name {child.attributes['name']!r} is taken; names differ within a module")
            else:
                member = self._module(parent, child)
                found[member.name] = member
        if not found:
            element.refuse("a union holds at least one module")
        default = element.attributes.get("scaffold")
        if default is not None and default not in found:
            element.refuse(f"the union has no member {default!r}{known(default, found)}")
        return Union(tuple(found.values()), found[default] if default else None, offset)

    def _parameter(self, module: Module, element: Element) -> Parameter:
        element.only("name", "length", "len", "scaffold")
        name = _name(element, module.parameters)
        if ("length" in element.attributes) is ("len" in element.attributes):
            element.refuse('give either length="..." or len="...", in tokens')
        if element.children:
            element.refuse("a parameter is empty; text that stands in for the argument is its scaffold attribute")
        count = element.attributes.get("length", element.attributes.get("len", ""))
        if not COUNT.fullmatch(count) or not int(count):
            element.refuse(f"a length is a number of tokens, at least 1; {count!r} is not")
        scaffold = self._words.encode(element.attributes.get("scaffold", ""))
        if len(scaffold) // TOKEN_BYTES > int(count):
            element.refuse(f"the scaffold has {len(scaffold) // TOKEN_BYTES} tokens, and there is room for {count}")
        return Parameter(name, int(count), scaffold, module.offset + module.length)

    def _scaffold(self, element: Element) -> None:
        element.only("modules")
        if element.children:
            element.refuse("a scaffold is empty; its modules attribute names the modules")
        self.scaffolds.append((element.place, element.asked("modules").split()))

    def _file(self, element: Element, src: str) -> str:
        """Text of a file in the schema's folder, as it is."""
        if self._folder is None:
            element.refuse("src needs a folder; use Schema.load(path), or give parse(..., folder=...)")
        folder = self._folder.resolve()
        path = (folder / src).resolve()
        if not path.is_relative_to(folder):
            element.refuse(f"src={src!r} leads out of the schema's folder")
        if not path.is_file():
            element.refuse(f"there is no file {src!r} in the schema's folder")
        try:
            data = OsFiles().read_small(str(path), MAX_BYTES + 1)
            text = data.decode()
        except OSError as error:
            element.refuse(f"src={src!r} cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            element.refuse(f"src={src!r} is not UTF-8 at byte {error.start}")
        self._size += len(data)
        if self._size > MAX_BYTES:
            too_large(f"{element.place}: the schema with its files", self._size)
        return text


def _name(element: Element, taken: Container[str] = ()) -> str:
    name = element.asked("name")
    if not NAME.fullmatch(name):
        element.refuse(f"{name!r} is no name; one has letters, digits, _ . and -, and begins with a letter or _")
    if name in taken:
        element.refuse(f"the name {name!r} is taken; names differ within a module")
    return name


def _leaf(run: list[Letters], between: bool) -> str:
    """The text of a leaf. White space alone is a space between two parameters, and anywhere else a way to write."""
    return collapsed(run) if between or not blank(run) else ""


def _check_literal(element: Element) -> None:
    """Raises ``BadInput`` if markup of ours stands in a tag that is text: it would be text too."""
    for child in element.children:
        if isinstance(child, Element):
            if child.tag in TAGS:
                child.refuse(f"<{element.tag}> is text, so <{child.tag}> cannot stand in it")
            _check_literal(child)
