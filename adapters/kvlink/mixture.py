"""A mixture of files of examples, drawn from by weight: the same for the same step, wherever a training begins."""

from __future__ import annotations

import itertools
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvstore.adapters.kvlink.data import Encode, Example, Reader, Words, checked
from kvstore.adapters.kvlink.layout import Laid
from kvstore.adapters.kvlink.links import LinkTokens
from kvstore.errors import BadInput

# By kind, the weight of a file that names none: the mixture that link tokens were first trained with.
WEIGHTS = {"text": 20.0, "chat": 30.0, "chat_memory": 25.0, "qa": 10.0, "qa_memory": 10.0, "summary": 5.0}
FILE_FIELDS = {"path", "kind", "weight"}


@dataclass(frozen=True, eq=False)
class Source:
    """One file of one kind. Every line is checked when it is opened; lines are read again as they are drawn."""

    path: Path
    kind: str
    weight: float
    offsets: array[int] = field(repr=False)  # of its lines, in bytes
    numbers: array[int] = field(repr=False)  # of its lines, from 1

    @classmethod
    def open(cls, path: Path, kind: str, weight: float | None = None) -> Source:
        """Raises ``BadInput`` with file and line for what cannot be trained on."""
        if kind not in WEIGHTS:
            raise BadInput(f"{path}: there is no kind {kind!r}; choose from {', '.join(WEIGHTS)}")
        weight = WEIGHTS[kind] if weight is None else weight
        if not weight > 0:
            raise BadInput(f"{path}: a weight of {weight} draws nothing; give a number above 0, or leave the file out")
        offsets, numbers, offset = array("Q"), array("Q"), 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        _at(path, number, checked, kind, line)
                        offsets.append(offset)
                        numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from None
        if not offsets:
            raise BadInput(f"{path} has no examples")
        return cls(path, kind, weight, offsets, numbers)

    def __len__(self) -> int:
        return len(self.offsets)

    def example(self, number: int, reader: Reader, tokens: int) -> Example:
        """Its example ``number``, in at most so many tokens. Raises ``BadInput`` with file and line."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[number])
            line = file.readline()

        def made() -> Example:
            return reader.example(self.kind, checked(self.kind, line)).fitted(reader.links, tokens)

        example: Example = _at(self.path, self.numbers[number], made)
        return example

    def examples(self, reader: Reader, tokens: int) -> Iterator[Example]:
        """All in order."""
        return (self.example(number, reader, tokens) for number in range(len(self)))


class Mixture:
    """Sources with weights. Drawing depends on nothing but seed, step and row, so training can go on anywhere."""

    def __init__(self, sources: Sequence[Source], reader: Reader, tokens: int = 4096, seed: int = 0) -> None:
        """``tokens``: the most that an example takes. Raises ``BadInput`` for no sources at all."""
        if not sources:
            raise BadInput("a mixture needs at least one file")
        self.sources, self.reader, self.tokens, self.seed = list(sources), reader, tokens, seed
        self._bounds = list(itertools.accumulate(source.weight for source in self.sources))

    @classmethod
    def read(
        cls,
        path: Path,
        encode: Encode,
        links: LinkTokens,
        end: Sequence[int] = (),
        tokens: int = 4096,
        seed: int = 0,
    ) -> Mixture:
        """From a JSON file ``{"files": [{"path", "kind", "weight"}, ...], "words": {...}}``.

        Paths count from its folder. Raises ``BadInput`` with the place for whatever is wrong.
        """
        given = _described(path)
        if not isinstance(given.get("files"), list):
            raise BadInput(f'{path} lacks "files": a list of {{"path", "kind", "weight"}}')
        sources = [_source(path, number, one) for number, one in enumerate(given["files"])]
        return cls(sources, Reader(encode, links, words_of(path), end), tokens, seed)

    def draw(self, step: int, row: int) -> tuple[Source, int]:
        """The source and the number of its example that a row of a step gets."""
        source = random.Random(f"{self.seed} {step} {row}")
        chosen = source.choices(self.sources, cum_weights=self._bounds)[0]
        return chosen, source.randrange(len(chosen))

    def batch(self, step: int, rows: int) -> list[Laid]:
        """The rows of a step. Raises ``BadInput`` with file and line."""
        made = []
        for row in range(rows):
            source, number = self.draw(step, row)
            made.append(source.example(number, self.reader, self.tokens).laid(self.reader.links))
        return made

    def digest(self) -> str:
        """Changes with anything that changes what is drawn, but for the bytes of lines."""
        made = blake2b(repr((vars(self.reader.words), self.reader.links, self.reader.end)).encode(), digest_size=16)
        made.update(repr((self.tokens, self.seed)).encode())
        for source in self.sources:
            made.update(repr((source.path.name, source.kind, source.weight)).encode())
            made.update(source.offsets.tobytes())
        return made.hexdigest()


def words_of(path: Path) -> Words:
    """What the mixture at ``path`` puts around the parts of examples. Raises ``BadInput`` for what it cannot."""
    given, names = _described(path).get("words", {}), {one.name for one in fields(Words)}
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise BadInput(f'{path}: "words" is no object of texts')
    if unknown := sorted(set(given) - names):
        raise BadInput(f'{path}: "words" has {", ".join(unknown)}; there are {", ".join(sorted(names))}')
    return Words(**given)


def _described(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise BadInput(f"{path} is no JSON object")
    return given


def _source(path: Path, number: int, given: Any) -> Source:
    where = f"{path}: file {number}"
    if not isinstance(given, dict) or not {"path", "kind"} <= set(given) <= FILE_FIELDS:
        raise BadInput(f'{where} needs "path" and "kind", may have "weight", and nothing else')
    weight = given.get("weight")
    if weight is not None and not isinstance(weight, int | float):
        raise BadInput(f"{where} has a weight that is no number")
    return Source.open(path.parent / str(given["path"]), str(given["kind"]), weight)


def _at(path: Path, number: int, call: Any, *args: Any) -> Any:
    """Adds the place to what is wrong there."""
    try:
        return call(*args)
    except BadInput as error:
        raise BadInput(f"{path}, line {number}: {error}") from None
