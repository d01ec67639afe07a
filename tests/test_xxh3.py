"""Compiled checksums are those of python-xxhash, at any length and place; a copy is a copy; flips are found."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import pytest
from slots import Book
from xxhash import xxh3_64_intdigest

from kvstore import checksum
from kvstore.block import address_of, bad_pieces, checksums, copy_checked
from kvstore.compiled import Compiled
from kvstore.layout import LayerShape, Layout

pytest.importorskip("numba")
from kvstore.xxh3 import Kernels

LAYOUTS = {
    "equal layers": Layout.uniform(4, 2, 64, "bfloat16"),
    "many heads": Layout.uniform(2, 16, 128, "bfloat16"),
    "wide pieces": Layout((LayerShape(1, 64, 512),) * 2, "float32"),
    "gaps and odd lengths": Layout(tuple(LayerShape(n + 1, 33 + n, 7 * n + 35) for n in range(5)), "uint8", 64),
    "no values in a layer": Layout((LayerShape(2, 64, 0), LayerShape(2, 64, 64)), "float16"),
    "short pieces": Layout((LayerShape(2, 3, 5),) * 3, "uint8", 40),
}
COMPILED = [name for name in LAYOUTS if name not in ("no values in a layer", "short pieces")]


class Plain(Compiled[Kernels]):
    """Nothing compiled, ever."""

    def __init__(self) -> None:
        super().__init__("plain", lambda: None)  # type: ignore[arg-type, return-value]
        self.asked = True


class Counted(Compiled[Kernels]):
    """The compiled functions, counting how often they are fetched."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__("counted", lambda: kernels)
        self.asked, self.used = True, 0
        self.kernels = Kernels(self._digests, self._copy_digests)
        self.function, self._real = self.kernels, kernels

    def _digests(self, *numbers: int) -> None:
        self.used += 1
        self._real.digests(*numbers)

    def _copy_digests(self, *numbers: int) -> None:
        self.used += 1
        self._real.copy_digests(*numbers)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = checksum.KERNELS.wait(120)
    assert found is not None, "the kernels could not be compiled here"
    return found


@pytest.fixture
def compiled(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counted = Counted(kernels)
    monkeypatch.setattr(checksum, "KERNELS", counted)
    yield counted


def buffer(rng: random.Random, size: int, shift: int = 0) -> memoryview:
    """Random bytes in writable memory, ``shift`` bytes behind a multiple of 64."""
    memory = memoryview(bytearray(rng.randbytes(size + 128)))
    start = -address_of(memory) % 64 + shift
    return memory[start : start + size]


def in_plain_form(layout: Layout, stride: int, payload: memoryview) -> array[int]:
    return array("Q", [xxh3_64_intdigest(payload[p.offset :][: p.length]) for p in layout.pieces(stride)])


def sums_of(kernels: Kernels, data: memoryview, table: list[int], target: memoryview | None = None) -> list[int]:
    spans, sums = array("q", table), array("Q", bytes(4 * len(table)))
    where = spans.buffer_info()[0], len(sums), sums.buffer_info()[0]
    if target is None:
        kernels.digests(address_of(data), *where)
    else:
        kernels.copy_digests(address_of(target), address_of(data), *where)
    return list(sums)


def test_every_length_around_the_edges(kernels: Kernels, seed: int) -> None:
    """One byte more or less than stripes and blocks, and all lengths of the first blocks."""
    rng = random.Random(seed)
    data, target = buffer(rng, 9000, shift=5), buffer(rng, 9000)
    edges = [edge * 1024 + more for edge in (3, 4, 7, 8) for more in (-65, -64, -63, -1, 0, 1, 63, 64, 65)]
    for length in [*range(241, 2200), *edges]:
        expected = [xxh3_64_intdigest(data[:length])]
        assert sums_of(kernels, data, [0, length]) == expected
        target[:length] = bytes(length)
        after = bytes(target[length:])
        assert sums_of(kernels, data, [0, length], target) == expected
        assert target[:length] == data[:length] and target[length:] == after


def test_random_lengths_at_random_places(kernels: Kernels, seed: int) -> None:
    rng = random.Random(seed)
    data = buffer(rng, 330_000, shift=rng.randrange(64))
    for _ in range(150):
        length, place = int(241 * 1245 ** rng.random()), rng.randrange(30_000)
        expected = [xxh3_64_intdigest(data[place : place + length])]
        assert sums_of(kernels, data, [place, length]) == expected
        target = buffer(rng, place + length, shift=rng.choice([0, rng.randrange(64)]))
        assert sums_of(kernels, data, [place, length], target) == expected
        assert target == data[: place + length]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shift", [0, 8, 1])
def test_both_forms_agree(name: str, shift: int, compiled: Counted, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, layout = random.Random(seed), LAYOUTS[name]
    for stride in (layout.block_tokens, layout.block_tokens - 1, 17):
        size, used = layout.payload_bytes(stride), compiled.used
        source = buffer(rng, size, shift)
        expected = in_plain_form(layout, stride, source)
        targets = []
        blank = buffer(rng, size, shift).tobytes()
        for form in (compiled, Plain()):
            monkeypatch.setattr(checksum, "KERNELS", form)
            target = buffer(rng, size, 3 * shift)
            target[:] = blank
            assert checksums(layout, stride, source) == expected
            assert copy_checked(target, source, layout, stride) == expected
            targets.append(target.tobytes())
        assert targets[0] == targets[1]  # gaps between layers are copied, what lies behind the last piece is not
        assert (compiled.used - used == 2) == (name in COMPILED)
        end = layout.pieces(stride)[-1].offset + layout.pieces(stride)[-1].length
        assert targets[0] == source[:end].tobytes() + blank[end:]


def test_flips_are_found(compiled: Counted, seed: int) -> None:
    """Each flipped bit, in its own piece; and nothing is found where nothing was flipped."""
    rng = random.Random(seed)
    layout = LAYOUTS["gaps and odd lengths"]
    header = Book(rng).make(layout=layout, tokens=64).header
    payload = buffer(rng, layout.payload_bytes(64))
    header.checksums = checksums(layout, 64, payload)
    pieces, starts = layout.pieces(64), layout.layer_offsets(64)
    assert list(bad_pieces(header, payload, 0, 5)) == []
    for _ in range(300):
        number = rng.randrange(len(pieces))
        piece = pieces[number]
        place, bit = piece.offset + rng.randrange(piece.length), 1 << rng.randrange(8)
        payload[place] ^= bit
        assert list(bad_pieces(header, payload, 0, 5)) == [(piece.layer, number)]
        part = payload[starts[piece.layer] : starts[piece.layer + 1]]
        found = list(bad_pieces(header, part, piece.layer, piece.layer + 1, starts[piece.layer]))
        assert found == [(piece.layer, number)]
        target = buffer(rng, len(payload))
        assert copy_checked(target, payload, layout, 64) != header.checksums
        payload[place] ^= bit
    assert list(bad_pieces(header, payload, 0, 5)) == []
    assert compiled.used == 4 + 3 * 300


def test_no_byte_beyond_a_buffer_is_read(compiled: Counted, seed: int) -> None:
    """A payload that is cut short, or that nobody may write to, is left to the plain form."""
    rng, layout = random.Random(seed), LAYOUTS["equal layers"]
    header = Book(rng).make(layout=layout, tokens=256).header
    payload = buffer(rng, layout.payload_bytes(256))
    header.checksums = checksums(layout, 256, payload)
    used = compiled.used
    assert checksums(layout, 256, payload.toreadonly()) == header.checksums
    last = len(layout.pieces(256)) - 1
    for cut in (1, 40_000, len(payload)):
        bad = list(bad_pieces(header, payload[: len(payload) - cut], 0, 4))
        assert bad[-1] == (3, last) and (cut == 1) == (len(bad) == 1)
    assert list(bad_pieces(header, payload, 2, 2)) == []
    assert compiled.used == used


def test_a_short_process_never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["equal layers"]
    payload = memoryview(bytearray(layout.payload_bytes(256)))
    asked: list[int] = []
    never: Compiled[Kernels] = Compiled("asked", lambda: asked.append(1))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(checksum, "KERNELS", never)
    monkeypatch.setattr(checksum, "_plain_bytes", 0)
    monkeypatch.setattr(checksum, "ENOUGH_BYTES", 3 * len(payload))
    for _ in range(3):
        checksums(layout, 256, payload)
        assert not never.asked
    checksums(layout, 256, payload)
    assert never.asked and never.wait(60) is None and asked == [1]
