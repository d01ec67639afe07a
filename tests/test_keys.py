"""Keys: pinned by golden vectors, and no two inputs share an encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.composition import Chain, Placement
from kvstore.errors import BadInput
from kvstore.keys import (
    Extra,
    Fingerprint,
    Namespace,
    block_key,
    chain_digest,
    common_tokens,
    encode,
    mark_item,
    placement_item,
    root_key,
    token_bytes,
)

PRINT = Fingerprint({"checkpoint": "abc", "dtype": "bfloat16", "rope": "default 10000"})
SPACE = Namespace(PRINT, "tenant")
PLAIN = Namespace(PRINT)


def vectors() -> list[str]:
    """One of each kind, and a chain of three."""
    first = block_key(SPACE, SPACE.root, token_bytes(range(256)))
    second = block_key(SPACE, first, token_bytes([0, 4294967295]))
    return [
        key.hex()
        for key in (
            PRINT.digest,
            SPACE.digest,
            PLAIN.digest,
            SPACE.root,
            PLAIN.root,
            root_key(SPACE, [b"one", b"two"]),
            first,
            second,
            block_key(SPACE, second, b"", [Extra("image", b"\1" * 32), Extra("tenant", b"x")]),
            Fingerprint({}).digest,
            chain_digest(b"", token_bytes(range(9))),
            placement_item(chain_digest(b"", token_bytes(range(9))), 2, -7),
            mark_item("blend 0.15"),
            CHAIN.context.root(SPACE),
        )
    ]


CHAIN = Chain.of([5], [Placement(Chain.of(range(9)), 2, 9, -7), "blend 0.15"])
GOLDEN = [
    "eea67fc0cdf14735b0d2c4c6f6a03d5ea6deadbf0c225a7126e11ab27c15f174",
    "077c8ee29539d391dbf1a0703e8b16fba6977ace187d2effb72fd6acfd45ecf5",
    "5ccd4f815fa7fc3183223b417a1cbe95f535d547a2c354f5ef1a9bd77e8cf8e9",
    "237f798601c8783fdd623e7bdc12e3a17f4f71a6263cfec5d77108709d75ecdb",
    "025147f7b8708094403b0554930a8e15639b403cce75e414e72c06cff614a3f7",
    "63cbb508a2e15dc749380d04cce2e39e0d28e6216811056db2a9535a4aec323c",
    "49349a39bcaf1f3ea9fd3faa373ddd711b32d049bef4ca24df21b7af33cc34b3",
    "3d98a008eb9f98581784b711ec7aa051f84e5405c38ce6a73d4d4dcc3f528827",
    "2d11604892c10a2b2f3e23d95862891f2ec7a34285d96dae56381e989005f4bd",
    "273dd0b0bdd817f55041f8c2cee98febc5e755a8c5d9fd70c35f812fcd8d64bb",
    "b9f347da87f6acf9790c03c2bd228e13fd6135b50fb3951a3ba9fddfde365db0",
    "682000000000000000b9f347da87f6acf9790c03c2bd228e13fd6135b50fb3951a3ba9fddfde365db073080000000000000002000000000000006f0800000000000000f9ffffffffffffff",
    "6d0a00000000000000626c656e6420302e3135",
    "6d3d7f4ab3588b9ffc2db94a62581cf78a9db539ef3542a3bea26bf74140e6e2",
]


def test_golden_vectors() -> None:
    """Within one format version these never change: every key on every disk depends on them."""
    assert vectors() == GOLDEN


def test_keys_do_not_depend_on_the_process() -> None:
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_keys; print(*test_keys.vectors())"
    )
    for seed in ("0", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert done.stdout.split() == GOLDEN, done.stderr


items = st.lists(st.tuples(st.sampled_from([b"a", b"b", b"x"]), st.binary(max_size=12)), max_size=5)


@given(items, items)
@settings(max_examples=2000)
def test_encoding_is_injective(one: list[tuple[bytes, bytes]], two: list[tuple[bytes, bytes]]) -> None:
    assert (encode(one) == encode(two)) is (one == two)


def joined(items: list[tuple[bytes, bytes]]) -> bytes:
    """A careless encoding: no lengths."""
    return b"".join(tag + data for tag, data in items)


def test_a_careless_encoding_is_not_injective() -> None:
    one, two = [(b"a", b"b"), (b"x", b"")], [(b"a", b"bx")]
    assert joined(one) == joined(two)
    assert encode(one) != encode(two)


parts = st.tuples(
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
    st.text(max_size=3),
    st.lists(st.binary(max_size=3), max_size=2),
    st.binary(max_size=3).map(lambda data: data * 4),
    st.lists(st.builds(Extra, st.text(max_size=2), st.binary(max_size=2)), max_size=2),
)


@given(parts, parts)
@settings(max_examples=1500)
def test_different_inputs_have_different_keys(one: tuple, two: tuple) -> None:  # type: ignore[type-arg]
    keys = []
    for components, tenant, context, tokens, extras in (one, two):
        space = Namespace(Fingerprint(components), tenant)
        keys.append(block_key(space, root_key(space, context), tokens, extras))
    assert (keys[0] == keys[1]) is (one == two)


def test_every_field_changes_the_fingerprint() -> None:
    fields = {f"field {n}": "value" for n in range(20)}
    prints = [Fingerprint(fields)] + [Fingerprint(fields | {name: "other"}) for name in fields]
    prints += [Fingerprint({other: v for other, v in fields.items() if other != name}) for name in fields]
    assert len({p.digest for p in prints}) == 41
    assert Fingerprint(dict(reversed(fields.items()))).digest == prints[0].digest
    assert prints[0].differs(prints[3]) == ["field 2"]
    assert prints[0].differs(prints[0]) == []


def test_names_and_tenants_cannot_be_swapped() -> None:
    assert Fingerprint({"a": "b"}).digest != Fingerprint({"b": "a"}).digest
    assert Namespace(PRINT, "a") != Namespace(PRINT, "b") != Namespace(PRINT)
    assert hash(Namespace(PRINT, "a")) == hash(Namespace(Fingerprint(dict(PRINT.components)), "a"))
    assert block_key(SPACE, SPACE.root, b"", [Extra("a", b"b")]) != block_key(
        SPACE, SPACE.root, b"", [Extra("b", b"a")]
    )


def test_token_bytes() -> None:
    expected = b"\1\0\0\0\xff\xff\xff\xff"
    for given_ids in (
        [1, 4294967295],
        (1, 4294967295),
        array("I", [1, 4294967295]),
        array("q", [1, 4294967295]),
        expected,
    ):
        assert token_bytes(given_ids) == expected
    assert token_bytes([]) == b""
    for bad in ([-1], [1 << 32], [1.5], ["1"], b"123", 7, None, [[1]]):
        with pytest.raises(BadInput):
            token_bytes(bad)


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40))
def test_common_tokens(one: list[int], two: list[int], same: int) -> None:
    two = one[:same] + two
    expected = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    assert common_tokens(token_bytes(one), token_bytes(two)) == expected
