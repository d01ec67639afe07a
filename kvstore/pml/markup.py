"""Markup as a tree that knows where everything stands, read by expat with nothing that can grow or reach out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import groupby
from typing import NoReturn
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from kvstore.errors import BadInput

MAX_BYTES = 64 << 20  # of a schema with all files that it names
MAX_DEPTH = 64  # elements within elements
MAX_ELEMENTS = 1 << 18
SPACES = " \t\r\n"  # what XML calls white space
LISTED = 12  # names in an error


@dataclass(frozen=True, slots=True)
class Letters:
    """Characters between two tags; ``verbatim`` ones came as CDATA."""

    text: str
    verbatim: bool


@dataclass(eq=False, slots=True)
class Element:
    """A tag with what is in it. Lines and columns count from 1."""

    tag: str
    attributes: dict[str, str]
    source: str  # what the reader of an error calls the text
    line: int
    column: int
    children: list[Element | Letters] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where it begins, for errors."""
        return f"{self.source}, line {self.line}, column {self.column}, <{self.tag}>"

    def refuse(self, why: str) -> NoReturn:
        """Raises ``BadInput`` that names the place."""
        raise BadInput(f"{self.place}: {why}")

    def only(self, *names: str) -> None:
        """Raises ``BadInput`` for attributes of other names."""
        for name in self.attributes:
            if name not in names:
                self.refuse(f"there is no attribute {name!r} here{known(name, names)}")

    def asked(self, name: str) -> str:
        """An attribute that must be there."""
        value = self.attributes.get(name)
        if value is None:
            self.refuse(f"the attribute {name!r} is missing")
        return value

    def written(self) -> str:
        """As markup again."""
        tag = self.tag + "".join(f" {name}={quoteattr(value)}" for name, value in self.attributes.items())
        inside = "".join(
            child.written() if isinstance(child, Element) else escape(child.text) for child in self.children
        )
        return f"<{tag}>{inside}</{self.tag}>" if self.children else f"<{tag}/>"


def known(name: str, names: Iterable[str]) -> str:
    """How an error goes on about a name that is none of ``names``."""
    there = list(dict.fromkeys(names))
    close = get_close_matches(name, there, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else "; "
    rest = f", and {len(there) - LISTED} more" if len(there) > LISTED else ""
    listed = ", ".join(there[:LISTED]) + rest if there else "nothing"
    return f"{guess}{' Known' if close else 'known'} here: {listed}"


def collapsed(run: Iterable[Letters]) -> str:
    """The text of a run: white space at its ends is one space; CDATA stays as it is."""
    same = groupby(run, lambda letters: letters.verbatim)
    texts = [(verbatim, "".join(letters.text for letters in group)) for verbatim, group in same]
    last = len(texts) - 1
    for number, (verbatim, text) in enumerate(texts):
        if not verbatim and number == 0 and text[0] in SPACES:
            text = " " + text.lstrip(SPACES)
        if not verbatim and number == last and text[-1] in SPACES:
            text = text.rstrip(SPACES) + " "
        texts[number] = verbatim, text
    return "".join(text for _, text in texts)


def blank(run: list[Letters]) -> bool:
    """Whether a run is white space that nobody marked as meant."""
    return not any(letters.verbatim or letters.text.strip(SPACES) for letters in run)


def escaped(text: str) -> str:
    """A string as markup that is read as this very string, white space and all."""
    core = text.strip(SPACES)
    begin = text[: len(text) - len(text.lstrip(SPACES))] if core else text
    end = text[len(begin) + len(core) :]
    ends = (run if not run or (run == " " and core) else f"<![CDATA[{run}]]>" for run in (begin, end))
    return escape(core, {"\r": "&#13;"}).join(ends)


def read(text: str, source: str) -> Element:
    """The root of a document. Raises ``BadInput`` with the place for what is no markup, or more than is read."""
    if not isinstance(text, str):
        raise BadInput(f"{source} is {type(text).__name__}; give its text as a string")
    if len(text) > MAX_BYTES:
        too_large(source, len(text))
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{source} holds half a surrogate pair at character {error.start}; decode it properly") from None
    if len(data) > MAX_BYTES:
        too_large(source, len(data))
    return _Reading(source).read(data)


def too_large(source: str, size: int) -> NoReturn:
    """Raises ``BadInput``."""
    raise BadInput(f"{source} has {size} bytes; at most {MAX_BYTES} are read: split it")


class _Reading:
    """One pass of expat."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._parser = expat.ParserCreate("utf-8")
        self._open: list[Element] = []
        self._root: Element | None = None
        self._elements = 0
        self._verbatim = False
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._letters
        self._parser.StartCdataSectionHandler = self._cdata
        self._parser.EndCdataSectionHandler = self._cdata_end
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.buffer_text = True

    def read(self, data: bytes) -> Element:
        try:
            self._parser.Parse(data, True)
        except expat.ExpatError as error:
            tag = f"<{self._open[-1].tag}>" if self._open else "outside of all tags"
            raise BadInput(
                f"{self._place(tag)}: {expat.ErrorString(error.code)}; write < and & of the text as &lt; and &amp;, "
                "or put it in <![CDATA[ ]]>"
            ) from None
        assert self._root is not None  # expat refuses a document without one
        return self._root

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        line, column = self._parser.CurrentLineNumber, self._parser.CurrentColumnNumber + 1
        element = Element(tag, attributes, self._source, line, column)
        self._elements += 1
        if len(self._open) == MAX_DEPTH:
            element.refuse(f"tags are nested more than {MAX_DEPTH} deep")
        if self._elements > MAX_ELEMENTS:
            element.refuse(f"there are more than {MAX_ELEMENTS} tags; put what is no markup in <![CDATA[ ]]>")
        if self._open:
            self._open[-1].children.append(element)
        else:
            self._root = element
        self._open.append(element)

    def _end(self, tag: str) -> None:
        self._open.pop()

    def _letters(self, text: str) -> None:
        self._open[-1].children.append(Letters(text, self._verbatim))

    def _cdata(self) -> None:
        self._verbatim = True

    def _cdata_end(self) -> None:
        self._verbatim = False

    def _doctype(self, name: str, system: str | None, public: str | None, inside: int) -> NoReturn:
        place = self._place(f"<!DOCTYPE {name}>")
        raise BadInput(f"{place}: document types and entities are not read; remove the declaration")

    def _place(self, tag: str) -> str:
        line, column = self._parser.ErrorLineNumber, self._parser.ErrorColumnNumber + 1
        return f"{self._source}, line {line}, column {column}, {tag}"
