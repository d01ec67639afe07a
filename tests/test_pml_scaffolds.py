"""Scaffolds: modules that are encoded together, for the prompts that have them all where the scaffold had them."""

from __future__ import annotations

from pml_words import letters, prompt, schema, shown, tokens

from kvstore.composition import Chain, Composition, Placement, Text
from kvstore.keys import token_bytes
from kvstore.pml import Schema
from kvstore.walk import chains_of

A, B = '<module name="a">aaa</module>', '<module name="b">bb</module>'
ROOM = '<module name="m">x<parameter name="p" length="4"/>y</module>'
THREE = A + '<module name="c">c<module name="d">dd</module></module>' + B


def test_a_scaffold_is_encoded_besides_and_used_when_all_are_there() -> None:
    made = schema('<scaffold modules="c.d a"/>' + THREE)
    assert [shown(each) for each in made.encodings()] == ["0+aaa", "0+c", "0+dd", "0+bb", "0+aaa|4+dd"]
    together = chains_of(made.encodings()[-1])
    assert together[1].chain == Chain.of(tokens("dd"), (Placement(Chain(tokens("aaa")), 0, 3, -4),))
    behind, alone = prompt(made, "<a/><c><d/></c>").parts[2], prompt(made, "<c><d/></c>").parts[1]
    assert behind == together[1]
    assert alone == Placement(Chain(tokens("dd")), 0, 2, 4)


def chain_of_d(made: Schema, inside: str) -> str:
    """What the module "d" was encoded behind."""
    found = [part for part in prompt(made, inside).parts if letters(part.token_ids) == "dd"]
    assert isinstance(found[0], Placement)
    behind = [letters(part.token_ids) for part in found[0].chain.context.parts if isinstance(part, Placement)]
    return "|".join([*behind, letters(found[0].chain.token_ids[: found[0].start * 4])])


def test_the_largest_scaffold_comes_first_and_none_overlap() -> None:
    made = schema(THREE, scaffolds=[["c.d", "b"], "a c.d c", ["a", "b"]])
    assert chain_of_d(made, "<a/><c><d/></c><b/>") == "aaac"
    assert prompt(made, "<a/><c><d/></c><b/>").parts[-1] == Placement(Chain(tokens("bb")), 0, 2, 6)
    assert chain_of_d(made, "<c><d/></c><b/>") == ""
    assert prompt(made, "<c><d/></c><b/>").parts[-1] == Placement(Chain(tokens("ddbb")), 2, 4, 6)


def test_a_scaffold_is_used_only_where_its_modules_stand_as_they_were_encoded() -> None:
    made = schema(THREE, scaffolds=[["a", "c.d"]])
    assert chain_of_d(made, "before<a/><c><d/></c>") == "aaa|"  # all moved by the same
    assert chain_of_d(made, "<a/>between<c><d/></c>") == ""
    packed = schema(B + THREE.replace(B, ""), layout="packed", scaffolds=[["b", "c.d"]])
    assert shown(packed.encodings()[-1]) == "0+bb|3+dd"  # "c" is there whenever "d" is
    assert chain_of_d(packed, "<b/><c><d/></c>") == "bb|"
    assert chain_of_d(packed, "<b/><a/><c><d/></c>") == ""
    paper = schema(B + THREE.replace(B, ""), scaffolds=[["b", "c.d"]])
    assert chain_of_d(paper, "<b/><a/><c><d/></c>") == chain_of_d(paper, "<b/><c><d/></c>") == "bb|"


def test_the_member_that_stands_for_a_union_is_in_the_scaffold_with_its_module() -> None:
    inside = f'<module name="u">1<union scaffold="b">{A}{B}</union></module><module name="d">dd</module>'
    made = schema(inside, scaffolds=[["u", "d"]])
    assert shown(made.encodings()[-1]) == "0+1|1+bb|4+dd"
    assert chain_of_d(made, "<u><b/></u><d/>") == "1bb|"
    assert chain_of_d(made, "<u><a/></u><d/>") == chain_of_d(made, "<u/><d/>") == ""
    assert shown(schema(inside.replace(' scaffold="b"', ""), scaffolds=[["u", "d"]]).encodings()[-1]) == "0+1|4+dd"


def test_room_in_a_scaffold_is_filled_and_an_argument_leaves_it_usable() -> None:
    made = schema(ROOM + '<module name="d">dd</module>', scaffolds=[["m", "d"]])
    assert chain_of_d(made, '<m p="PQ"/><d/>') == "x    y"
    packed = schema(ROOM + '<module name="d">dd</module>', scaffolds=[["m", "d"]], layout="packed")
    assert (chain_of_d(packed, '<m p="PQ"/><d/>'), chain_of_d(packed, '<m p="PQRS"/><d/>')) == ("", "x    y")


def test_encodings_are_texts_alone() -> None:
    for each in schema(f"one{THREE}two", scaffolds=[["a", "b"]], context=token_bytes([9])).encodings():
        assert isinstance(each, Composition)
        assert all(isinstance(part, Text) for part in each.parts)
