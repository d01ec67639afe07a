"""XXH3 (64 bits, no seed) of many pieces in one call, compiled: it runs without Python's lock, beside a copy if wanted.

Imports numba: only a build may import this module. The functions work on memory addresses; nobody checks them. Inputs
must be longer than 240 bytes, for shorter ones XXH3 has other rules. The state is eight 64-bit lanes, which one vector
register holds (or a few smaller ones, where the machine has no such): that is what the intrinsics are for, loops and
choices are plain Python that numba compiles.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model
from xxhash import xxh3_64_intdigest

from kvstore.compiled import nogil

SHORT = 240  # bytes; XXH3 treats inputs up to this length in another way
STRIPE, BLOCK = 64, 1024  # bytes that the lanes take in at once; bytes after which they are scrambled

P32_1, P32_2, P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
P64_1, P64_2, P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P64_4, P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
MIX = 0x165667919E3779F9
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
LAST_SECRET = len(SECRET) - STRIPE - 7  # where the secret of the last stripe starts

I8, I32, I64, I128 = (ir.IntType(bits) for bits in (8, 32, 64, 128))
VECTOR = ir.VectorType(I64, 8)


class Lanes(types.Type):
    """The state of one digest: eight unsigned 64-bit numbers in a vector register."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """Tells numba what a value of type ``Lanes`` is to the compiler below."""

    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, VECTOR)


LANES = Lanes()


def _vector(words: tuple[int, ...]) -> Any:
    return ir.Constant(VECTOR, list(words))


def _all(word: int) -> Any:
    return _vector((word,) * 8)


def _secret(start: int) -> tuple[int, ...]:
    return struct.unpack_from("<8Q", SECRET, start)


def _pointer(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def _load(b: Any, address: Any) -> Any:
    """A stripe, wherever it lies."""
    stripe = b.load(_pointer(b, address, VECTOR))
    stripe.align = 1
    return stripe


def _store(b: Any, stripe: Any, address: Any, past: bool) -> None:
    """``past`` the caches, to an aligned place, so that memory is not read first; or to any place."""
    stored = b.store(stripe, _pointer(b, address, VECTOR))
    stored.align = STRIPE if past else 1
    if past:
        stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


def _accumulate(b: Any, lanes: Any, stripe: Any, secret: Any) -> Any:
    """Every lane takes in its neighbour's word as it is, and the product of the halves of its own word and secret."""
    swapped = b.shuffle_vector(stripe, stripe, ir.Constant(ir.VectorType(I32, 8), [1, 0, 3, 2, 5, 4, 7, 6]))
    mixed = b.xor(stripe, secret)
    product = b.mul(b.and_(mixed, _all(0xFFFFFFFF)), b.lshr(mixed, _all(32)))
    return b.add(b.add(lanes, swapped), product)


def _scramble(b: Any, lanes: Any) -> Any:
    lanes = b.xor(lanes, b.lshr(lanes, _all(47)))
    return b.mul(b.xor(lanes, _vector(_secret(len(SECRET) - STRIPE))), _all(P32_1))


@intrinsic
def fresh(typing: Any) -> Any:
    """Lanes that have taken in nothing."""

    def code(context: Any, b: Any, signature: Any, values: Any) -> Any:
        return _vector((P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1))

    return LANES(), code


def _block(copied: bool, past: bool) -> Any:
    """An intrinsic that takes in a whole block from an address, copying it to another if so wanted, and scrambles."""

    def code(context: Any, b: Any, signature: Any, values: Any) -> Any:
        lanes, to, of = values
        for n in range(BLOCK // STRIPE):
            step = ir.Constant(I64, n * STRIPE)
            stripe = _load(b, b.add(of, step))
            if copied:
                _store(b, stripe, b.add(to, step), past)
            lanes = _accumulate(b, lanes, stripe, _vector(_secret(n * 8)))
        return _scramble(b, lanes)

    def take_block(typing: Any, lanes: Any, to: Any, of: Any) -> Any:
        return LANES(LANES, types.int64, types.int64), code

    return intrinsic(take_block)


read_block = _block(copied=False, past=False)
copy_block = _block(copied=True, past=False)
copy_block_past = _block(copied=True, past=True)


@intrinsic
def read_stripe(typing: Any, lanes: Any, of: Any, start: Any) -> Any:
    """Takes in one stripe, with the secret from byte ``start`` on."""

    def code(context: Any, b: Any, signature: Any, values: Any) -> Any:
        lanes, of, start = values
        kept = ir.Constant(ir.ArrayType(I8, len(SECRET)), bytearray(SECRET))
        secret = b.ptrtoint(cgutils.global_constant(b, "xxh3.secret", kept), I64)
        return _accumulate(b, lanes, _load(b, of), _load(b, b.add(secret, start)))

    return LANES(LANES, types.int64, types.int64), code


@intrinsic
def merged(typing: Any, lanes: Any, length: Any) -> Any:
    """The digest of an input of ``length`` bytes, all of which the lanes have taken in."""

    def code(context: Any, b: Any, signature: Any, values: Any) -> Any:
        mixed = b.xor(values[0], _vector(_secret(11)))
        digest = b.mul(values[1], ir.Constant(I64, P64_1))
        for n in range(0, 8, 2):
            one, two = (b.zext(b.extract_element(mixed, ir.Constant(I32, n + k)), I128) for k in (0, 1))
            product = b.mul(one, two)
            folded = b.xor(b.trunc(product, I64), b.trunc(b.lshr(product, ir.Constant(I128, 64)), I64))
            digest = b.add(digest, folded)
        digest = b.mul(b.xor(digest, b.lshr(digest, ir.Constant(I64, 37))), ir.Constant(I64, MIX))
        return b.xor(digest, b.lshr(digest, ir.Constant(I64, 32)))

    return types.int64(LANES, types.int64), code


@intrinsic
def word(typing: Any, address: Any) -> Any:
    """The 64-bit number at an address."""

    def code(context: Any, b: Any, signature: Any, values: Any) -> Any:
        return b.load(_pointer(b, values[0], I64))

    return types.int64(types.int64), code


@intrinsic
def put(typing: Any, address: Any, number: Any) -> Any:
    """Writes a 64-bit number to an address."""

    def code(context: Any, b: Any, signature: Any, values: Any) -> None:
        b.store(values[1], _pointer(b, values[0], I64))

    return types.void(types.int64, types.int64), code


@intrinsic
def copy(typing: Any, to: Any, of: Any, length: Any) -> Any:
    """memcpy."""

    def code(context: Any, b: Any, signature: Any, values: Any) -> None:
        to, of, length = values
        cgutils.raw_memcpy(b, _pointer(b, to, I8), _pointer(b, of, I8), length, 1)

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def settle(typing: Any) -> Any:
    """What was written past the caches is there for others before anything that follows."""

    def code(context: Any, b: Any, signature: Any, values: Any) -> None:
        b.fence("seq_cst")

    return types.void(), code


@njit
def _ended(lanes: Any, of: int, length: int) -> Any:
    """Takes in what the last, perhaps partial block at ``of`` holds of ``length`` bytes in all, and ends the digest."""
    left = ((length - 1) & (BLOCK - 1)) + 1
    for n in range((left - 1) // STRIPE):
        lanes = read_stripe(lanes, of + n * STRIPE, n * 8)
    return merged(read_stripe(lanes, of + left - STRIPE, LAST_SECRET), length)


@njit
def _digest(of: int, length: int) -> Any:
    lanes = fresh()
    for _ in range((length - 1) // BLOCK):
        lanes = read_block(lanes, 0, of)
        of += BLOCK
    return _ended(lanes, of, length)


@njit
def _copy_digest(to: int, of: int, length: int) -> Any:
    """Copies and digests the bytes in one go: what the lanes take in is what was written."""
    lanes = fresh()
    if to & (STRIPE - 1):
        for _ in range((length - 1) // BLOCK):
            lanes = copy_block(lanes, to, of)
            of, to = of + BLOCK, to + BLOCK
    else:
        for _ in range((length - 1) // BLOCK):
            lanes = copy_block_past(lanes, to, of)
            of, to = of + BLOCK, to + BLOCK
    copy(to, of, ((length - 1) & (BLOCK - 1)) + 1)
    return _ended(lanes, to, length)


@nogil("void(int64, int64, int64, int64)")
def digests(of: int, table: int, pieces: int, out: int) -> None:
    """Digests of ``pieces`` inputs. ``table``: offset from ``of`` and length of each, int64; ``out``: uint64 each."""
    for n in range(pieces):
        put(out + n * 8, _digest(of + word(table + n * 16), word(table + n * 16 + 8)))


@nogil("void(int64, int64, int64, int64, int64)")
def copy_digests(to: int, of: int, table: int, pieces: int, out: int) -> None:
    """``digests`` of what it copies: everything from the start to the end of the last piece, gaps included.

    Pieces must come in order of offset and not overlap.
    """
    end = 0
    for n in range(pieces):
        offset, length = word(table + n * 16), word(table + n * 16 + 8)
        copy(to + end, of + end, offset - end)
        put(out + n * 8, _copy_digest(to + offset, of + offset, length))
        end = offset + length
    settle()


class Kernels(NamedTuple):
    """The two functions; arguments as above."""

    digests: Callable[[int, int, int, int], None]
    copy_digests: Callable[[int, int, int, int, int], None]


def kernels() -> Kernels:
    """Both functions, after a comparison with python-xxhash. Raises ``RuntimeError`` when they differ."""
    lengths = (SHORT + 1, STRIPE * 5, BLOCK, BLOCK + 1, BLOCK * 2, BLOCK * 5 + 777)
    source = array("B", (n * n % 251 for n in range(sum(lengths) + BLOCK)))
    expected, table, end = array("Q"), array("q"), 0
    for length in lengths:
        expected.append(xxh3_64_intdigest(memoryview(source)[end + 3 : end + 3 + length]))
        table.extend((end + 3, length))
        end += 3 + length
    of, pieces = source.buffer_info()[0], len(lengths)
    for shift in range(STRIPE):  # some piece lies aligned in the target, most do not
        sums = array("Q", bytes(8 * pieces))
        copied_sums = array("Q", sums)
        target = array("B", bytes(STRIPE + end))
        digests(of, table.buffer_info()[0], pieces, sums.buffer_info()[0])
        to = target.buffer_info()[0] + shift
        copy_digests(to, of, table.buffer_info()[0], pieces, copied_sums.buffer_info()[0])
        if not sums == copied_sums == expected or target[shift : shift + end] != source[:end]:
            raise RuntimeError("compiled checksums differ from those of python-xxhash")
    return Kernels(digests, copy_digests)
