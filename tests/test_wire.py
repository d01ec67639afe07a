"""What goes over the wire comes out as it went in, and nothing else does: frames, and all that is packed in them."""

from __future__ import annotations

import contextlib
import tracemalloc
from array import array
from typing import Any

import msgpack
import pytest
from blocks import ODD, SMALL, WIDE, namespace
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import HUGE, MANY, framed, head
from peers import bombs

from kvstore import BadInput, Fingerprint, LayerShape, Layout, Namespace
from kvstore.composition import Chain, Composition, Context, Part, Placement, Text
from kvstore.daemon import packed
from kvstore.daemon.packed import (
    checked,
    composition_of,
    layout_of,
    match_fields,
    namespace_of,
    pack_composition,
    pack_match,
    pack_namespace,
    pack_prospect,
    packed_layout,
    prospect_of,
)
from kvstore.daemon.wire import (
    HEADER,
    MAX_ANSWER,
    MAX_BODY,
    MAX_NUMBER,
    MAX_VALUES,
    BadFrame,
    Kind,
    head_of,
    pack,
    unpack,
)
from kvstore.kinds import Origin
from kvstore.layout import DTYPE_BYTES
from kvstore.lease import Lease
from kvstore.match import Match, Miss
from kvstore.policies.cost import Line
from kvstore.policies.split import Portion, Prospect

MIB = 1 << 20

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 99), inner),
    max_leaves=30,
)
kinds = st.sampled_from(list(Kind))
numbers = st.integers(0, MAX_NUMBER)


def read(frame: bytes, limit: int = MAX_ANSWER, most: int | None = None) -> tuple[Kind, int, Any]:
    """A frame that is read as the daemon and its clients do."""
    found = head_of(frame, limit)
    body = frame[HEADER.size : HEADER.size + found.length]
    if len(body) < found.length:
        raise BadFrame("they would wait for more")
    return found.kind, found.number, unpack(found, body, most)


@given(kinds, numbers, values)
@settings(max_examples=150, deadline=None)
def test_a_frame_comes_out_as_it_went_in(kind: Kind, number: int, value: Any) -> None:
    assert read(pack(kind, number, value), most=MAX_VALUES) == (kind, number, value)


@given(kinds, numbers, values, st.integers(0), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_byte_that_is_another_is_noticed(kind: Kind, number: int, value: Any, place: int, change: int) -> None:
    """But for the number and the kind, which stand for themselves."""
    frame = bytearray(pack(kind, number, value))
    place %= len(frame)
    frame[place] ^= change
    try:
        found = read(bytes(frame))
    except BadFrame:
        return
    assert found[2] == value and 5 <= place < 12


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=150, deadline=None)
def test_bytes_that_nobody_packed_are_refused_or_read(data: bytes, whole: bool) -> None:
    frame = framed(data) if whole else data.ljust(HEADER.size, b"\0")
    with contextlib.suppress(BadFrame):
        read(frame, MAX_BODY, MAX_VALUES)


@given(values, st.integers(1, 40))
@settings(max_examples=120, deadline=None)
def test_what_is_counted_is_what_there_is(value: Any, times: int) -> None:
    """A message is refused for its values exactly when there are more of them than may be."""

    def count(each: Any) -> int:
        if isinstance(each, dict):
            return sum(2 + count(inner) for inner in each.values())
        return sum(1 + count(inner) for inner in each) if isinstance(each, list) else 0

    sent = [value] * times + [b"x" * 600]  # long enough to be looked at
    inside = count(sent)
    assert read(pack(Kind.REQUEST, 1, sent), most=inside)[2] == sent
    with pytest.raises(BadFrame, match="values"):
        read(pack(Kind.REQUEST, 1, sent), most=inside - 1)


@pytest.mark.parametrize(("name", "body"), bombs())
def test_little_that_would_take_much_is_not_unpacked(name: str, body: bytes) -> None:
    assert name
    tracemalloc.start()
    try:
        with pytest.raises(BadFrame):
            read(framed(body), MAX_BODY, MAX_VALUES)
        for read_it in (namespace_of, layout_of):  # bytes inside of a message are no way round
            with pytest.raises(BadInput):
                read_it(body)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body) + MIB
    finally:
        tracemalloc.stop()


def test_what_would_take_much_does_where_it_may() -> None:
    """The negative control: what the daemon says is not counted."""
    body = dict(bombs())["many empty lists"]
    tracemalloc.start()
    try:
        assert len(read(framed(body))[2]) == 400_000
        assert tracemalloc.get_traced_memory()[1] > 20 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [object(), 1 << 64, -(1 << 64), {1, 2}, "\ud800", [float], 1 + 2j])
def test_what_has_no_form_cannot_be_sent(value: object) -> None:
    with pytest.raises(BadFrame):
        pack(Kind.REQUEST, 1, value)


@pytest.mark.parametrize(("length", "limit"), [(101, 100), (MAX_BODY + 1, MAX_BODY), (2**32 - 1, MAX_ANSWER)])
def test_a_length_beyond_the_limit_is_refused(length: int, limit: int) -> None:
    with pytest.raises(BadFrame, match="more than"):
        head_of(head(length, 0), limit)


# -- what is packed ----------------------------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.dictionaries(names.filter(bool), names, min_size=1, max_size=6), names)
@settings(max_examples=150, deadline=None)
def test_a_namespace_is_the_same_on_the_other_side(components: dict[str, str], tenant: str) -> None:
    space = Namespace(Fingerprint(components), tenant)
    other = namespace_of(pack_namespace(space))
    assert (other, other.digest, other.root) == (space, space.digest, space.root)


def test_namespaces_are_remembered_as_long_as_that_takes_little() -> None:
    packed._namespace.cache_clear()
    for size in (10, 10, 100_000, 100_000):
        assert namespace_of(pack_namespace(namespace(checkpoint="x" * size))).fingerprint.components["checkpoint"]
    assert packed._namespace.cache_info().currsize == 1


shapes = st.builds(LayerShape, st.integers(1, 64), st.integers(0, 300), st.integers(1, 300))
layouts = st.builds(
    Layout,
    st.lists(shapes, min_size=1, max_size=40).map(tuple),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.integers(1, 1000),
    st.sampled_from([512, 4096, 65536]),
)


@given(layouts | st.sampled_from([SMALL, WIDE, ODD, HUGE, MANY]))
@settings(max_examples=100, deadline=None)
def test_a_layout_is_the_same_on_the_other_side(layout: Layout) -> None:
    assert layout_of(packed_layout(layout)) == layout


@given(st.binary(max_size=100) | values.map(msgpack.packb))
@settings(max_examples=150, deadline=None)
def test_what_is_no_namespace_and_no_layout_is_bad_input(data: bytes) -> None:
    for read_it in (namespace_of, layout_of):
        with contextlib.suppress(BadInput):
            read_it(data)


tiers = st.sampled_from(["device", "host", "disk", "remote"])
misses = st.builds(Miss, names, st.integers(0, 2**40), names, st.none() | names)
origins = st.builds(Origin, st.sampled_from(["pre", "rotated"]), st.sampled_from(["", "one", "two"]))


@given(
    st.lists(st.tuples(st.integers(-(2**62), 2**62), st.integers(0, 2**32 - 1), tiers, origins), max_size=50),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    misses,
    numbers,
    st.lists(st.integers(0, 2**32 - 1), max_size=50),
)
@settings(max_examples=150, deadline=None)
def test_a_match_is_the_same_on_the_other_side(
    blocks: list[tuple[int, int, str, Origin]], tokens: int, skipped: int, miss: Miss, number: int, lacking: list[int]
) -> None:
    lease = Lease((), lambda _: None)
    where, made = [block[2] for block in blocks], [block[3] for block in blocks]
    match = Match(SMALL, [block[:2] for block in blocks], lease, tokens, where, miss, b"", skipped, lacking, made)
    sent = read(pack(Kind.ANSWER, 1, pack_match(match, number)))[2]
    assert match_fields(sent) == (number, tokens, skipped, match.blocks, where, miss, array("I", lacking), made)


lines = st.none() | st.builds(Line, st.floats(0, 10), st.floats(0, 1))
portions = st.builds(Portion, st.integers(0, 2**31), tiers, st.integers(0, 2**40))
prospects = st.builds(
    Prospect,
    st.lists(st.lists(portions, max_size=5), max_size=5),
    lines,
    st.integers(0, 2**40),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=4),
    st.integers(0, 2**20),
    st.integers(0, 999),
    lines,
    st.integers(0, 2**40),
)


@given(prospects)
@settings(max_examples=150, deadline=None)
def test_a_prospect_is_the_same_on_the_other_side(prospect: Prospect) -> None:
    assert prospect_of(read(pack(Kind.ANSWER, 1, pack_prospect(prospect)))[2]) == prospect


token_ids = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20).map(lambda ids: array("I", ids).tobytes())


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    tokens = draw(token_ids)
    stop = draw(st.integers(1, len(tokens) // 4))
    start = draw(st.integers(0, stop - 1))
    context = Context(known=draw(st.just(b"") | st.binary(min_size=32, max_size=32)))
    return Placement(Chain(tokens, context), start, stop, draw(st.integers(0, 2**31)))


parts: st.SearchStrategy[Part] = placements() | st.builds(Text, token_ids, st.integers(0, 2**31))


def made(some: list[Part], mark: str | None) -> Composition | None:
    try:
        return Composition(tuple(some), mark or "")
    except BadInput:  # they overlap
        return None


@given(st.lists(parts, max_size=3), names)
@settings(max_examples=120, deadline=None)
def test_a_composition_is_the_same_on_the_other_side(some: list[Part], mark: str) -> None:
    composition = made(some, mark)
    if composition is not None:
        other = composition_of(read(pack(Kind.ANSWER, 1, pack_composition(composition)))[2])
        assert other == composition


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        ([1], []),
        ([], [int]),
        ([True], [int]),
        ([-1], [int]),
        ([1 << 63], [int]),
        ([1.0], [int]),
        (["1"], [bytes]),
        (None, []),
        (7, [int]),
        ({0: 1}, [int]),
        (b"a", [int]),
    ],
)
def test_arguments_that_are_others_are_refused(arguments: object, kinds: list[type]) -> None:
    with pytest.raises(BadInput):
        checked(arguments, kinds)
