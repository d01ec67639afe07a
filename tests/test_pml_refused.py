"""What PML does not take, and that each refusal says where and what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pml_words import Bytes, prompt, schema

from kvstore.errors import BadInput
from kvstore.pml import Schema

M = '<module name="m">x<parameter name="room" length="2"/></module>'
UNION = '<union><module name="one">x</module><module name="two">y</module></union>'
BOMB = '<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><schema name="s">&b;</schema>'
SCHEMAS = {
    "twice": (M + M, '<module>: the name "m" is taken'.replace('"', "'")),
    "twice with a union": (f'{UNION}<module name="two"/>', "<module>: the name 'two' is taken"),
    "twice in a union": ('<union><module name="x"/><module name="x"/></union>', "the name 'x' is taken"),
    "parameter twice": (f"{M[:-9]}{M[18:]}", "<parameter>: the name 'room' is taken"),
    "no name": ("<module>x</module>", "<module>: the attribute 'name' is missing"),
    "no such name": ('<module name="1x"/>', "'1x' is no name"),
    "a role's name": ('<module name="user"/>', "'user' is a role's tag"),
    "no such attribute": (
        '<module name="m" cahce="false"/>',
        "there is no attribute 'cahce' here; did you mean 'cache'?",
    ),
    "cache": ('<module name="m" cache="no"/>', 'cache is "true" or "false", not \'no\''),
    "a parameter for all": ('<parameter name="p" length="3"/>', "<parameter>: <parameter> cannot stand in 's'"),
    "a parameter in a role for all": ('<user><parameter name="p" length="3"/></user>', "cannot stand in 's'"),
    "no length": ('<module name="m"><parameter name="p"/></module>', 'either length="..." or len="..."'),
    "two lengths": ('<module name="m"><parameter name="p" length="1" len="1"/></module>', "either length"),
    "length 0": ('<module name="m"><parameter name="p" length="0"/></module>', "at least 1; '0' is not"),
    "length -1": ('<module name="m"><parameter name="p" length="-1"/></module>', "at least 1; '-1' is not"),
    "too much room": ('<module name="m"><parameter name="p" length="99999999"/></module>', "more than 16777216 tokens"),
    "long scaffold": (
        '<module name="m"><parameter name="p" length="1" scaffold="xy"/></module>',
        "has 2 tokens, and there is room for 1",
    ),
    "text in a parameter": (
        '<module name="m"><parameter name="p" length="1">x</parameter></module>',
        "a parameter is empty",
    ),
    "text in a union": (f"<union>x{UNION[7:]}", "<union>: a union holds modules only"),
    "another tag in a union": ("<union><b/></union>", "<b>: a union holds modules only"),
    "an empty union": ("<union> </union>", "<union>: a union holds at least one module"),
    "no such default": (UNION.replace("<union>", '<union scaffold="tow">'), "no member 'tow'; did you mean 'two'?"),
    "a module within text": (f"<b>{M}</b>", "<module>: <b> is text, so <module> cannot stand in it"),
    "a scaffold in a module": ('<module name="m"><scaffold modules="m"/></module>', "put it directly under <schema>"),
    "text in a scaffold": ('<scaffold modules="one m">x</scaffold>', "a scaffold is empty"),
    "a scaffold of one": (f'{M}<scaffold modules="m"/>', "<scaffold>: a scaffold names two modules at least"),
    "a scaffold of nobody": (f'{M}<scaffold modules="m mm"/>', "there is no module 'mm'; did you mean 'm'?"),
    "a scaffold of both": (f'{UNION}<scaffold modules="one two"/>', "one and two are of one union"),
    "a scaffold of what is not cached": (
        f'{M}<module name="n" cache="false">x</module><scaffold modules="m n"/>',
        "'n' has cache",
    ),
    "a path of two meanings": (
        '<module name="a"><module name="b"/></module><module name="a.b"/><scaffold modules="a a.b"/>',
        "'a.b' can be read in 2 ways",
    ),
    "a file without a folder": ('<module name="m" src="x.txt"/>', "src needs a folder"),
    "an ampersand": ("a & b", "line 1, column 21, <schema>: not well-formed"),
    "code": (
        '<module name="m">if a < b:</module>',
        "<module>: not well-formed (invalid token); write < and & of the text as",
    ),
    "not closed": ('<module name="m">', "<module>: mismatched tag"),
    "an entity": ("&nbsp;", "<schema>: undefined entity"),
    "deep": ("<b>" * 70 + "</b>" * 70, "<b>: tags are nested more than 64 deep"),
    "many": ("<b/>" * (1 << 18), "more than 262144 tags"),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_a_schema_is_refused(case: str) -> None:
    inside, why = SCHEMAS[case]
    with pytest.raises(BadInput) as refused:
        schema(inside, roles={"user": ("", "")})
    assert why in str(refused.value)
    assert str(refused.value).startswith("schema, line 1, column ")


PROMPTS = {
    "no such module": ("<n/>", "line 1, column 20, <n>: 's' has no module 'n'; known here: m, one, two"),
    "almost": ("<twoo/>", "<twoo>: 's' has no module 'twoo'; did you mean 'two'? Known here: m, one, two"),
    "no such module in one": ("<m><n/></m>", "<n>: 'm' has no module 'n'; known here: nothing"),
    "no such parameter": ('<m rom="x"/>', "<m>: 'm' has no parameter 'rom'; did you mean 'room'? Known here: room"),
    "too long": ('<m room="xyz"/>', "<m>: the argument 'room' has 3 tokens, and there is room for 2"),
    "twice": ("<m/><m/>", "column 24, <m>: the module is there already"),
    "two of a union": ("<two/><one/>", "<one>: 'two' of the same union is there already"),
    "text in a module": ("<m>hi</m>", "<m>: free text stands between modules, not in one"),
    "a role in a module": ("<m><user>hi</user></m>", "<user>: 'm' has no module 'user'"),
    "a tag that is no module": ("say <b>this</b>", "<b>: 's' has no module 'b'"),
    "not closed": ("<m>", "<m>: mismatched tag"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_is_refused(case: str) -> None:
    inside, why = PROMPTS[case]
    with pytest.raises(BadInput) as refused:
        prompt(schema(M + UNION), inside)
    assert why in str(refused.value)
    assert str(refused.value).startswith("prompt, line 1, column ")


def test_a_prompt_for_another_schema_is_refused() -> None:
    made = schema(M)
    for text, why in (
        ('<prompt schema="t"/>', "this is the schema 's', not 't'"),
        ("<prompt/>", "the attribute 'schema' is missing"),
        ('<schema name="s"/>', '<prompt schema="s">'),
        ("hi", "outside of all tags: syntax error"),
        ("", "outside of all tags: no element found"),
    ):
        with pytest.raises(BadInput, match=r"^prompt, line 1, column ") as refused:
            made.prompt(text)
        assert why in str(refused.value)
    with pytest.raises(BadInput, match="the prompt has no tokens"):
        made.prompt('<prompt schema="s"/>')


def test_the_place_counts_lines_and_characters() -> None:
    with pytest.raises(BadInput, match="line 3, column 3, <module>"):
        schema('ä\n\nü <module name=""/>')


@pytest.mark.parametrize("text", [BOMB, '<!DOCTYPE s SYSTEM "file:///etc/passwd"><schema name="s"/>'])
def test_document_types_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"line 1, column \d+, <!DOCTYPE s>: document types and entities are not read"):
        Schema.parse(text, tokenizer=Bytes())


def test_a_schema_of_100_mb_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="schema has 100000000 bytes; at most 67108864 are read"):
        Schema.parse(" " * 100_000_000, tokenizer=Bytes())
    with pytest.raises(BadInput, match="schema has 80000000 bytes"):
        Schema.parse("ä" * 40_000_000, tokenizer=Bytes())
    path = tmp_path / "large.pml"
    path.touch()
    os.truncate(path, 100_000_000)
    with pytest.raises(BadInput, match=r"large\.pml has 100000000 bytes"):
        Schema.load(path, tokenizer=Bytes())


FILES = {
    "../outside.txt": "leads out of the schema's folder",
    "link.txt": "leads out of the schema's folder",
    "/etc/hostname": "leads out of the schema's folder",
    "none.txt": "there is no file",
    ".": "there is no file",
    "latin.txt": "is not UTF-8 at byte 1",
    "large.txt": "the schema with its files has 67108",
}


@pytest.mark.parametrize("src", FILES)
def test_a_file_is_refused(src: str, tmp_path: Path) -> None:
    folder = tmp_path / "schemas"
    folder.mkdir()
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "latin.txt").write_bytes(b"x\xff")
    (folder / "large.txt").touch()
    os.truncate(folder / "large.txt", 64 << 20)
    (folder / "s.pml").write_text(f'<schema name="s">\n<module name="m" src="{src}"/></schema>')
    with pytest.raises(BadInput, match=r"^s\.pml, line 2, column 1, <module>") as refused:
        Schema.load(folder / "s.pml", tokenizer=Bytes())
    assert FILES[src] in str(refused.value)


def test_a_schema_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.pml").write_bytes(b"\xff")
    for name, why in (("none.pml", "cannot be read: No such file"), ("latin.pml", "is not UTF-8 at byte 0")):
        with pytest.raises(BadInput, match=why):
            Schema.load(tmp_path / name, tokenizer=Bytes())


class Words:
    """Not token ids."""

    def encode(self, text: str) -> list[str]:
        return text.split()


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "layout": ({"layout": "loose"}, "give 'paper' or 'packed'"),
    "tokenizer": ({"tokenizer": object()}, "has no encode"),
    "tokens": ({"tokenizer": Words()}, "token ids must be integers"),
    "scaffolds": ({"scaffolds": [["m", "n"]]}, "scaffolds\\[0\\]: there is no module 'n'"),
    "context": ({"context": ["<s>"]}, "token ids must be integers"),
    "roles": ({"roles": {"tool": ("", "")}}, "the roles are system, user, assistant"),
    "texts": ({"roles": {"user": "<user>"}}, "must be the texts before and behind"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_is_refused(case: str) -> None:
    options, why = OPTIONS[case]
    with pytest.raises(BadInput, match=why):
        schema(M + UNION, **options)


@pytest.mark.parametrize("text", [b"<schema/>", "<schema name='s'>\ud800</schema>", "<prompt schema='s'/>"])
def test_what_is_no_schema_is_refused(text: Any) -> None:
    with pytest.raises(BadInput, match=r"^schema"):
        Schema.parse(text, tokenizer=Bytes())
