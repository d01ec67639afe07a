"""Namespaces, chains and the keys of blocks.

A chain starts from a root key ``H(namespace, context)``; a block's key is ``H(parent key, token ids, typed digests)``,
so a key stands for everything that its keys and values were computed from. ``H`` is BLAKE2b-256 keyed by the
namespace's digest. What is hashed is encoded canonically: each item is a type tag, a length and the bytes, so no two
different inputs share an encoding. Golden vectors in the tests pin it; it can never change within one format version.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b

from kvstore.errors import BadInput

KEY_BYTES = 32
TOKEN_BYTES = 4
MAX_NAME = 255  # bytes of an owner, a tenant or a writer
FORMAT = "kvstore/1"

# Typed items of the canonical encoding. New kinds get new tags; a tag is never reused.
TAG_FORMAT = b"F"
TAG_FINGERPRINT = b"f"
TAG_TENANT = b"t"
TAG_CONTEXT = b"c"
TAG_ROOT = b"r"
TAG_PARENT = b"p"
TAG_TOKENS = b"i"
TAG_EXTRA = b"x"
TAG_NAME = b"n"
TAG_VALUE = b"v"
TAG_CHAIN = b"h"
TAG_START = b"s"
TAG_OFFSET = b"o"
TAG_MARK = b"m"
TAG_SHELF = b"a"

# In place of a chain's root: no block goes on from the one before it, and each hangs on a *shelf*, a root that its
# first token names. There are enough of them that none has many children, and so few that they need not be let go.
APART = bytes(KEY_BYTES)
SHELVES = 1 << 14

_LENGTH = struct.Struct("<Q")
_NUMBER = struct.Struct("<q")
_PARENT = TAG_PARENT + _LENGTH.pack(KEY_BYTES)
_TOKENS = TAG_TOKENS


@dataclass(frozen=True, slots=True)
class Extra:
    """A typed digest of another input that a block's KV depends on (an image, an embedding, a tenant from here on).

    ``kind`` names what it is, ``digest`` its content: the kind is part of the key, so an image can never equal a salt.
    """

    kind: str
    digest: bytes


@dataclass(frozen=True)
class Fingerprint:
    """Everything that changes KV bytes, by name: checkpoint, dtype, RoPE, LoRA, layer plan. Compared by digest."""

    components: Mapping[str, str] = field(hash=False)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes over the sorted components."""
        items: list[tuple[bytes, bytes]] = [(TAG_FORMAT, FORMAT.encode())]
        for name in sorted(self.components):
            items += [(TAG_NAME, name.encode()), (TAG_VALUE, self.components[name].encode())]
        return blake2b(encode(items), digest_size=KEY_BYTES).digest()

    def differs(self, other: Fingerprint) -> list[str]:
        """Names of the components that are not equal in both, sorted."""
        names = set(self.components) | set(other.components)
        return sorted(name for name in names if self.components.get(name) != other.components.get(name))


@dataclass(frozen=True)
class Namespace:
    """Fingerprint and tenant. Nothing is ever shared across namespaces."""

    fingerprint: Fingerprint
    tenant: str = ""

    def __post_init__(self) -> None:
        name_bytes(self.tenant, "tenant")

    @cached_property
    def digest(self) -> bytes:
        """32 bytes; the key of every hash in this namespace."""
        items = [
            (TAG_FORMAT, FORMAT.encode()),
            (TAG_FINGERPRINT, self.fingerprint.digest),
            (TAG_TENANT, self.tenant.encode()),
        ]
        return blake2b(encode(items), digest_size=KEY_BYTES).digest()

    @cached_property
    def root(self) -> bytes:
        """Root key of chains with an empty context."""
        return root_key(self)

    def __hash__(self) -> int:
        return int.from_bytes(self.digest[:8], "little")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Namespace) and self.digest == other.digest


def name_bytes(name: str, what: str) -> bytes:
    """A name as UTF-8. Raises ``BadInput`` when it cannot be written so; ``what`` says whose name it is."""
    try:
        return name.encode()
    except (UnicodeEncodeError, AttributeError):
        raise BadInput(f"{what}={name!r} is no text that can be stored; use a plain string") from None


def check_names(owner: str, tenant: str, writer: str) -> None:
    """Raises ``BadInput`` where one of them cannot be kept with a block."""
    names = name_bytes(owner, "owner"), name_bytes(tenant, "tenant"), name_bytes(writer, "writer")
    if max(map(len, names)) > MAX_NAME:
        raise BadInput(f"owner, tenant and writer may take {MAX_NAME} bytes each; use a shorter name or a digest")


def encode(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Canonical encoding of typed items: tag (1 byte), length (8 bytes, little endian), bytes; one after the other."""
    out = bytearray()
    for tag, data in items:
        out += tag
        out += _LENGTH.pack(len(data))
        out += data
    return bytes(out)


def root_key(namespace: Namespace, context: Sequence[bytes] = ()) -> bytes:
    """Key that a chain starts from; ``context`` is what its tokens see before it (empty: nothing)."""
    data = encode([(TAG_ROOT, b""), *((TAG_CONTEXT, item) for item in context)])
    return blake2b(data, digest_size=KEY_BYTES, key=namespace.digest).digest()


def chain_digest(context: bytes, tokens: bytes) -> bytes:
    """Digest of a chain up to some token, in no namespace: of its context's digest (empty: no context) and tokens."""
    return blake2b(encode([(TAG_CONTEXT, context), (TAG_TOKENS, tokens)]), digest_size=KEY_BYTES).digest()


def placement_item(chain: bytes, start: int, offset: int) -> bytes:
    """Context item for a part of another chain.

    ``chain``: digest of it up to the end of the part; ``start``: its first token; ``offset``: the position of that,
    counted from the first token of the chain whose context it is.
    """
    return encode([(TAG_CHAIN, chain), (TAG_START, _NUMBER.pack(start)), (TAG_OFFSET, _NUMBER.pack(offset))])


def mark_item(mark: str) -> bytes:
    """Context item for a word that says what else a chain's bytes depend on."""
    return encode([(TAG_MARK, name_bytes(mark, "mark"))])


def block_key(namespace: Namespace, parent: bytes, tokens: bytes, extras: Sequence[Extra] = ()) -> bytes:
    """Key of the block that holds ``tokens`` (little-endian uint32) behind ``parent``."""
    data = b"".join((_PARENT, parent, _TOKENS, _LENGTH.pack(len(tokens)), tokens))
    for extra in extras:
        data += encode([(TAG_EXTRA, b""), (TAG_NAME, extra.kind.encode()), (TAG_VALUE, extra.digest)])
    return blake2b(data, digest_size=KEY_BYTES, key=namespace.digest).digest()


def links(namespace: Namespace, root: bytes, tokens: bytes, size: int) -> Iterator[tuple[bytes, bytes, bytes]]:
    """The blocks of a chain, ``size`` bytes of tokens each: the key that one hangs on, its own, and its tokens."""
    key = root
    for start in range(0, len(tokens), size):
        piece = tokens[start : start + size]
        above = key if root != APART else _shelf(namespace, int.from_bytes(piece[:TOKEN_BYTES], "little") % SHELVES)
        key = block_key(namespace, above, piece)
        yield above, key, piece


@lru_cache(maxsize=4 * SHELVES)
def _shelf(namespace: Namespace, number: int) -> bytes:
    return root_key(namespace, [encode([(TAG_SHELF, _LENGTH.pack(number))])])


def token_bytes(token_ids: object) -> bytes:
    """Token ids as little-endian uint32 bytes.

    Takes a sequence of ints, or any contiguous buffer of 4- or 8-byte integers (``array``, numpy). ``bytes`` pass as
    they are. Raises ``BadInput`` for ids below 0 or above 2**32-1.
    """
    if isinstance(token_ids, bytes):
        if len(token_ids) % TOKEN_BYTES:
            raise BadInput(f"token bytes must be whole uint32 values, but {len(token_ids)} bytes were given")
        return token_ids
    try:
        ids = array("I", token_ids)  # type: ignore[call-overload]
    except (OverflowError, TypeError, ValueError):
        raise BadInput("token ids must be integers from 0 to 4294967295; give a flat list, array or tensor") from None
    if sys.byteorder == "big":
        ids.byteswap()
    result: bytes = ids.tobytes()
    return result


def common_tokens(a: bytes, b: bytes) -> int:
    """How many leading tokens ``a`` and ``b`` share."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // TOKEN_BYTES
    low, high = 0, size // TOKEN_BYTES  # a[:low] equal, a[:high] not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low * TOKEN_BYTES : middle * TOKEN_BYTES] == b[low * TOKEN_BYTES : middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle
    return low
