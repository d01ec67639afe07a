"""PML: where everything stands, what is placed and what is computed, and which chains modules become."""

from __future__ import annotations

from pathlib import Path

import pytest
from pml_words import Bytes, Pairs, letters, prompt, schema, shown, tokens

import kvstore.pml
from kvstore.composition import Chain, Placement
from kvstore.keys import Fingerprint, Namespace
from kvstore.pml import Schema

SPACE = Namespace(Fingerprint({"checkpoint": "abc"}))
A, B = '<module name="a">aaa</module>', '<module name="b">bb</module>'
UNION = f"<union>{A}{B}</union>"
ROOM = '<module name="m">x<parameter name="p" length="4"/>y</module>'
NESTED = '<module name="o">12<module name="i">345</module>67</module>'
LAID = {
    # what is in the schema, what is in the prompt, paper's layout, packed
    "modules one behind the other": (A + B, "<a/><b/>", "0=aaa|3=bb", "0=aaa|3=bb"),
    "one left out is a gap": (A + B + ROOM, "<a/><m/>", "0=aaa|5=x|10=y", "0=aaa|3=x|4=y"),
    "text of the schema is always there": (f"one{A}two{B}", "<b/>", "0=one|6=two|9=bb", "0=one|3=two|6=bb"),
    "text before the first module of the schema": (f"one{A}", "hi", "0=one|6+hi", "0=one|3+hi"),
    "text within a module is there with it": (NESTED, "<o/>", "0=12|5=67", "0=12|2=67"),
    "a module in a module": (NESTED, "<o><i/></o>", "0=12|2=345|5=67", "0=12|2=345|5=67"),
    "a union is as long as its longest member": (UNION + "z", "<b/>", "0=bb|3=z", "0=bb|2=z"),
    "each member of a union begins at its offset": (f"q{UNION}z", "<a/>", "0=q|1=aaa|4=z", "0=q|1=aaa|4=z"),
    "a union that nobody wants": (UNION + "z", "", "3=z", "0=z"),
    "a union in a module": (f'<module name="u">1{UNION}2</module>', "<u><b/></u>", "0=1|1=bb|4=2", "0=1|1=bb|3=2"),
    "an argument takes the first of its room": (ROOM, '<m p="PQ"/>', "0=x|1+PQ|5=y", "0=x|1+PQ|3=y"),
    "an argument that fills its room": (ROOM, '<m p="PQRS"/>', "0=x|1+PQRS|5=y", "0=x|1+PQRS|5=y"),
    "no argument": (ROOM, "<m/>", "0=x|5=y", "0=x|1=y"),
    "an empty argument": (ROOM, '<m p=""/>', "0=x|5=y", "0=x|1=y"),
    "len is length": ('<module name="m"><parameter name="p" len="3"/>y</module>', "<m/>", "3=y", "0=y"),
    "text at the end is behind everything": (A + B + ROOM, "<a/> hi", "0=aaa|11+ hi", "0=aaa|3+ hi"),
    "text at the end is behind a union": (UNION, "<b/>hi", "0=bb|3+hi", "0=bb|2+hi"),
    "text between modules pushes": (A + B, "<a/>mid<b/>end", "0=aaa|3+mid|6=bb|8+end", "0=aaa|3+mid|6=bb|8+end"),
    "text behind a union is behind its room": (
        f"{UNION}z{ROOM}",
        "<b/>!<m/>",
        "0=bb|3+!|4=z|5=x|10=y",
        "0=bb|2+!|3=z|4=x|5=y",
    ),
    "text before the first module": (f"one{A}two{B}", "hi<b/>", "0=one|6=two|9+hi|11=bb", "0=one|3=two|6+hi|8=bb"),
    "text behind a module is before the schema's": (
        f"{A}two{B}",
        "<a/>!<b/>",
        "0=aaa|3+!|4=two|7=bb",
        "0=aaa|3+!|4=two|7=bb",
    ),
    "a prompt in another order": (A + B, "1<b/>2<a/>3", "0+1|1=aaa|4=bb|6+2|7+3", "0+1|1=aaa|4=bb|6+2|7+3"),
    "text alone": (A, "hi", "3+hi", "0+hi"),
    "not cached": ('<module name="a" cache="false">aaa</module>' + B, "<a/><b/>", "0+aaa|3=bb", "0+aaa|3=bb"),
    "modules in one that is not cached": (
        NESTED.replace('"o"', '"o" cache="false"'),
        "<o><i/></o>",
        "0+12|2+345|5+67",
        "0+12|2+345|5+67",
    ),
    "cached in one that is not": (
        NESTED.replace('"o"', '"o" cache="false"').replace('"i"', '"i" cache="true"'),
        "<o><i/></o>",
        "0+12|2=345|5+67",
        "0+12|2=345|5+67",
    ),
    "a tag that is no markup is text": (
        '<module name="a">x <b id="1">y<br/>&amp;</b> z</module>',
        "<a/>",
        '0=x <b id="1">y<br/>&amp;</b> z',
        '0=x <b id="1">y<br/>&amp;</b> z',
    ),
    "a name with a dot": ('<module name="unit.py">x</module>', "<unit.py/>", "0=x", "0=x"),
    "an empty module": (f'<module name="e"/>{A}', "<e/>!<a/>", "0+!|1=aaa", "0+!|1=aaa"),
}


@pytest.mark.parametrize("case", LAID)
def test_where_everything_stands(case: str) -> None:
    inside, wanted, paper, packed = LAID[case]
    assert shown(prompt(schema(inside), wanted)) == paper
    assert shown(prompt(schema(inside, layout="packed"), wanted)) == packed


def test_a_module_is_computed_alone() -> None:
    made = schema(f"one{A}two{NESTED}")
    assert [shown(each) for each in made.encodings()] == ["0+one|6+two", "0+aaa", "0+12|5+67", "0+345"]
    one, three, first = Chain(tokens("one")), Chain(tokens("345")), Chain(tokens("12"))
    placed = prompt(made, "<o><i/></o>").parts
    assert placed == (
        Placement(one, 0, 3, 0),
        Placement(Chain.of(tokens("two"), (Placement(one, 0, 3, -6),)), 0, 3, 6),
        Placement(first, 0, 2, 9),
        Placement(three, 0, 3, 11),
        Placement(Chain.of(tokens("67"), (Placement(first, 0, 2, -5),)), 0, 2, 14),
    )


def test_every_chain_begins_with_the_context() -> None:
    made = schema(NESTED, context=[1, 2])
    first = Chain(b"\1\0\0\0\2\0\0\0" + tokens("12"))
    assert prompt(made, "<o/>").parts == (
        Placement(first, 2, 4, 0),
        Placement(Chain.of(tokens("67"), (Placement(first, 0, 4, -7),)), 0, 2, 5),
    )
    assert [each.position_ids for each in made.encodings()] == [[0, 1, 2, 3, 7, 8], [0, 1, 2, 3, 4]]


def test_text_behind_an_argument_was_encoded_behind_what_stands_in_for_it() -> None:
    inside = (
        '<module name="m">x<parameter name="p" length="3" scaffold="in"/>y<parameter name="q" length="2"/></module>'
    )
    (alone,) = schema(inside).encodings()
    assert letters(b"".join(part.token_ids for part in alone.parts)) == "xin y"  # nothing sees the second one
    assert prompt(schema(inside), "<m/>").parts[1] == Placement(Chain(tokens("xin y")), 4, 5, 4)


def test_what_stands_in_for_an_argument_is_the_tokenizers() -> None:
    class Unknown(Bytes):
        unk_token_id = 5

    for tokenizer, token in ((Unknown(), 5), (Pairs(), 7), (Bytes(), 32)):
        assert schema(ROOM, tokenizer=tokenizer).encodings()[0].token_ids == [120, *[token] * 4, 121]


def test_modules_that_are_not_cached_are_not_encoded() -> None:
    made = schema(NESTED.replace('"o"', '"o" cache="false"').replace('"i"', '"i" cache="true"') + "z")
    assert [shown(each) for each in made.encodings()] == ["0+z", "0+345"]


def test_text_of_a_file_is_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "code.py").write_text("\n if a < b:\n  <c>&d\n")
    (tmp_path / "s.pml").write_text('<schema name="s"><module name="m" src="docs/code.py">!</module></schema>')
    assert shown(prompt(Schema.load(tmp_path / "s.pml", tokenizer=Bytes()), "<m/>")) == "0=\n if a < b:\n  <c>&d\n!"


# What implementers get wrong.


def test_generation_goes_on_behind_the_largest_position() -> None:
    found = prompt(schema(UNION), "<b/>hi")
    assert found.position_ids[-1] + 1 == max(found.position_ids) + 1 == found.end == 5


def test_the_budget_is_what_is_reserved() -> None:
    made = schema('<union><module name="big">' + "x" * 1000 + '</module><module name="small">y</module></union>')
    found = prompt(made, "<small/>hi")
    assert (len(found), len(made), found.position_ids) == (3, 1000, [0, 1000, 1001])


def test_code_is_kept_as_it_is() -> None:
    code = "\n  if (a < b && c > d) {}\n\t"
    assert shown(prompt(schema(f'<module name="m"><![CDATA[{code}]]></module>'), "<m/>")) == f"0={code}"
    assert shown(prompt(schema('<module name="m"> &lt;&#33;&amp; </module>'), "<m/>")) == "0= <!& "
    assert shown(prompt(schema(A), f"<![CDATA[{code}]]>")) == f"3+{code}"


def test_text_is_tokenized_leaf_by_leaf() -> None:
    made = schema('<module name="m">ba<parameter name="p" length="4"/>ad</module>', tokenizer=Pairs())
    found = prompt(made, '<m p="aac"/>dd')
    pieces = ["ba", "aac", "ad", "dd"]
    assert found.token_ids == [token for piece in pieces for token in Pairs().encode(piece)]
    assert found.token_ids != Pairs().encode("".join(pieces))


SPACES = {
    "both ends": ("\n\t x  y \r\n ", " x  y "),
    "none": ("x", "x"),
    "alone": (" \n ", ""),
    "beside CDATA": ("\n <![CDATA[ \n]]>", "  \n"),
    "CDATA alone": ("<![CDATA[ \n ]]>", " \n "),
    "around a comment": ("\n x <!-- y --> z \n", " x  z "),
    "no-break spaces are text": ("\u00a0x\u00a0", "\u00a0x\u00a0"),
    "between parameters": ('<parameter name="p" length="1"/>\n<parameter name="q" length="1"/>z', " z"),
    "beside one parameter": ('\n<parameter name="p" length="1"/>\n', ""),
    "long runs": (" " * 100_000 + "x", " x"),
}


@pytest.mark.parametrize("case", SPACES)
def test_white_space(case: str) -> None:
    written, kept = SPACES[case]
    made = schema(f'<module name="m">{written}</module>')
    texts = [letters(part.token_ids) for part in prompt(made, "<m/>!").parts[:-1]]
    assert "".join(texts) == kept


def test_white_space_between_what_a_prompt_names_is_nothing() -> None:
    assert shown(prompt(schema(A + NESTED), "\n <a/> <o> <i/>\n </o>\n")) == "0=aaa|3=12|5=345|8=67"


def test_names_resolve_by_path() -> None:
    made = schema('<module name="a">1<module name="x">22</module></module><module name="x">333</module>')
    assert shown(prompt(made, "<a><x/></a><x/>")) == "0=1|1=22|3=333"


def test_a_schema_that_is_parsed_again_has_the_same_keys() -> None:
    inside = f"one{A}two{NESTED}<scaffold modules='a o.i'/>"
    first, again = (prompt(schema(inside), "<a/><o><i/></o> go") for _ in range(2))
    assert first == again
    for one, other in zip(first.parts, again.parts, strict=True):
        if isinstance(one, Placement) and isinstance(other, Placement):
            assert one.chain.context.root(SPACE) == other.chain.context.root(SPACE)


def test_what_the_documentation_shows(tmp_path: Path) -> None:
    lines = [line[4:] for line in (kvstore.pml.__doc__ or "").splitlines() if line.startswith("    ")]
    (tmp_path / "oslo.txt").write_text("Oslo is cold.\n")
    roles = {"user": ("[", "]"), "assistant": ("(", ")")}
    text = "\n".join(line[:52] for line in lines)
    made = Schema.parse(text, tokenizer=Bytes(), roles=roles, folder=tmp_path)
    found = made.prompt("\n".join(line[52:] for line in lines))
    assert shown(found) == (
        "0= You plan trips. |17= Plan |23+three|31= days. |38=Miami is hot. |52=See the beach."
        "|66+[|67+Mind the heat.|81+]|82+("
    )
