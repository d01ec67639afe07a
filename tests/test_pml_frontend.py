"""Schemas written as Python functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pml_words import Bytes, prompt, schema

from kvstore.errors import BadInput
from kvstore.pml import Schema, escaped
from kvstore.pml.frontend import pml

user: Any = None


def param(name: str, **options: object) -> str:
    raise AssertionError("these functions are read, and never run")


@pml
def trip(plan: Any, place: Any, days: Any, sights: Any) -> None:
    "You plan <trips> & more."
    if plan:
        f" Plan {days:4} days"
        param("pace", length=6, scaffold='"slow"')
        ".\n"
    match place:
        case "miami":
            "Miami"
            if sights:
                "See ]]> it."
        case "oslo":
            pass
    with user:
        "Go."


TRIP = (
    '<schema name="trip">You plan &lt;trips&gt; &amp; more.<module name="plan"> Plan '
    '<parameter name="days" length="4"/> days'
    """<parameter name="pace" length="6" scaffold='"slow"'/>.<![CDATA[\n]]></module>"""
    '<union><module name="miami">Miami<module name="sights">See ]]&gt; it.</module></module>'
    '<module name="oslo"></module></union><user>Go.</user></schema>'
)


def test_a_function_is_a_schema() -> None:
    assert trip == TRIP
    made = Schema.parse(trip, tokenizer=Bytes(), roles={"user": ("[", "]")})
    found = made.prompt('<prompt schema="trip"><miami><sights/></miami><plan days="3" pace="fast"/></prompt>')
    assert bytes(found.token_ids) == b"You plan <trips> & more. Plan 3 daysfast.\nMiamiSee ]]> it.[Go.]"
    assert made.encodings()[1].token_ids == list(b' Plan      days"slow".\n')


def test_a_function_within_another_is_read_too() -> None:
    @pml
    def inner(one: Any) -> None:
        """
        Text of two
        lines.
        """
        if one:
            "1"

    assert inner.startswith('<schema name="inner"><![CDATA[\n        ]]>Text of two\n        lines.<![CDATA[')
    assert inner.endswith('<module name="one">1</module></schema>')


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"], include_characters=" \t\n<&>]")))
def test_a_string_is_read_as_it_was_written(words: str) -> None:
    made = schema(f'<module name="m">{escaped(words)}</module>')
    assert bytes(prompt(made, "<m/>!").token_ids).decode() == words + "!"


def test_what_has_no_meaning_is_refused_with_its_line() -> None:
    def test(one: Any) -> None:
        if one > 1:
            "1"

    def other(one: Any) -> None:
        if one:
            "1"
        else:
            "2"

    def case(one: Any) -> None:
        match one:
            case 1:
                "1"

    def length(one: Any) -> None:
        f"{one}"  # noqa: B021

    def options() -> None:
        param("one", size=4)

    def value() -> None:
        1 + 1  # noqa: B018

    def loop(one: Any) -> None:
        while one:
            "1"

    refused: list[tuple[Callable[..., Any], int, str]] = [
        (test, 1, "only strings"),
        (other, 4, "the cases of a match"),
        (case, 2, 'case "name":'),
        (length, 1, "give the parameter its length in tokens: {one:8}"),
        (options, 1, 'a parameter is param("name", length=8)'),
        (value, 1, "text is a string"),
        (loop, 1, "only strings"),
    ]
    for function, line, why in refused:
        with pytest.raises(BadInput) as error:
            pml(function)
        assert why in str(error.value)
        place = f"{function.__name__}(), line {function.__code__.co_firstlineno + line}: "
        assert str(error.value).startswith(place)


def test_what_has_no_source_is_refused() -> None:
    for function in (len, lambda: "text"):
        with pytest.raises(BadInput, match="write"):
            pml(function)
