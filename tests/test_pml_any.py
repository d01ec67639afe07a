"""Any schema and any prompt of it, against a reference that is written down again, letter by letter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pml_words import letters, prompt, schema

from kvstore.composition import Placement
from kvstore.walk import chains_of

Tree = list[Any]  # ["text", str], ["room", name, length], ["module", name, trees], ["union", modules]
WORD = st.text("abcdefgh", min_size=1, max_size=4)
NAMES = itertools.count()


def fresh(kind: str) -> st.SearchStrategy[str]:
    return st.builds(lambda: f"{kind}{next(NAMES)}")


def module(inside: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.tuples(st.just("module"), fresh("m"), st.lists(inside, max_size=4)).map(list)


TEXT = st.tuples(st.just("text"), WORD).map(list)
ROOMS = st.tuples(st.just("room"), fresh("p"), st.integers(1, 5)).map(list)
TREES: st.SearchStrategy[Tree] = st.recursive(
    TEXT | ROOMS,
    lambda inside: (
        module(inside) | st.tuples(st.just("union"), st.lists(module(inside), min_size=1, max_size=3)).map(list)
    ),
    max_leaves=12,
)


def markup(tree: Tree) -> str:
    if tree[0] == "text":
        return str(tree[1])
    if tree[0] == "room":
        return f'<parameter name="{tree[1]}" length="{tree[2]}"/>'
    inside = "".join(map(markup, tree[-1]))
    return f"<union>{inside}</union>" if tree[0] == "union" else f'<module name="{tree[1]}">{inside}</module>'


def width(tree: Tree) -> int:
    if tree[0] in ("text", "room"):
        return len(tree[1]) if tree[0] == "text" else int(tree[2])
    return (max if tree[0] == "union" else sum)([*map(width, tree[-1]), 0][: len(tree[-1]) or 1])


class Reference:
    """Draws a prompt, and says letter by letter what stands where."""

    def __init__(self, data: st.DataObject, everything: bool) -> None:
        self.data, self.everything = data, everything
        self.there: list[tuple[int, str]] = []

    def some(self) -> bool:
        return self.everything or self.data.draw(st.booleans())

    def write(self, tree: Tree, at: int) -> str:
        """Lays a tree out; what a prompt says of it."""
        if tree[0] == "text":
            self.there += [(at + number, letter) for number, letter in enumerate(tree[1])]
        elif tree[0] == "union" and self.some():
            return self.module(self.data.draw(st.sampled_from(tree[1])), at)
        elif tree[0] == "module" and self.some():
            return self.module(tree, at)
        return ""

    def module(self, tree: Tree, at: int) -> str:
        arguments, inside = "", ""
        for item in tree[2]:
            if item[0] == "room" and self.some():
                size = item[2] if self.everything else self.data.draw(st.integers(0, item[2]))
                arguments += f' {item[1]}="{"R" * size}"'
                self.there += [(at + number, "R") for number in range(size)]
            inside += self.write(item, at)
            at += width(item)
        return f"<{tree[1]}{arguments}>{inside}</{tree[1]}>"

    def prompt(self, trees: list[Tree]) -> str:
        at, pushed, said = 0, 0, ""
        for tree in trees:
            named = self.write(tree, at + pushed)
            said += named
            at += width(tree)
            if named and not self.everything and self.data.draw(st.booleans()):
                said += "FREE"
                self.there += [(at + pushed + number, letter) for number, letter in enumerate("FREE")]
                pushed += 4
        last = max((at + pushed, *(position + 1 for position, _ in self.there)))
        if said.endswith("FREE"):  # it is at the end: behind all that the schema reserves, and what is always there
            self.there = self.moved_to_the_end(trees, at + pushed - 4)
            return said
        self.there += [(last + number, letter) for number, letter in enumerate("END")]
        return said + "END"

    def moved_to_the_end(self, trees: list[Tree], end: int) -> list[tuple[int, str]]:
        place = max(index for index, (_, letter) in enumerate(self.there) if letter == "F")
        behind = [(position - 4, letter) for position, letter in self.there[place + 4 :]]
        return [*self.there[:place], *behind, *((end + number, letter) for number, letter in enumerate("FREE"))]


@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
@settings(max_examples=80, deadline=None)
@given(trees=st.lists(TREES.filter(lambda tree: tree[0] != "room"), max_size=6), data=st.data())
def test_any_schema_is_laid_out_as_the_rules_say(trees: list[Tree], data: st.DataObject, everything: bool) -> None:
    reference = Reference(data, everything)
    said = reference.prompt(trees)
    inside = "".join(map(markup, trees))
    made = schema(inside)
    found, packed = prompt(made, said), prompt(schema(inside, layout="packed"), said)
    assert [(at, chr(token)) for at, token in zip(found.position_ids, found.token_ids, strict=True)] == reference.there
    assert packed.token_ids == found.token_ids == [ord(letter) for _, letter in reference.there]
    assert packed.position_ids == list(range(len(packed)))
    assert len(made) == sum(map(width, trees))
    chains = [placed for each in made.encodings() for placed in chains_of(each)]
    for part in found.parts:
        if isinstance(part, Placement):
            assert any((part.chain, part.start, part.stop) == (each.chain, each.start, each.stop) for each in chains)
        else:
            assert letters(part.token_ids).isupper()
