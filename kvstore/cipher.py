"""The key of a namespace: seals its blocks for the disk, and opens them.

Each write draws a salt, and each slot has a key of its own, made of the namespace's key and that salt. Under it, each
stored layer, the token ids and the checksums are one message of AES-256-GCM each, whose number is its nonce: no two
messages ever share key and nonce, however many blocks are written, unless two salts of 32 bytes are equal. The layers
and the checksums are bound to all of the header's metadata, so nothing in it can be changed or exchanged.

Keys of blocks are hashes of token ids, which would prove a guess of short ones. So each half of them goes through
AES-256 as it is: they are as good as random, and no two are equal.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from hashlib import blake2b

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvstore.block import Header, described
from kvstore.errors import Corrupt
from kvstore.keys import KEY_BYTES
from kvstore.sealed import (
    ID_BYTES,
    SALT_BYTES,
    SUMS,
    TAG_BYTES,
    TOKENS,
    Seal,
    SealedTokens,
    layer_range,
    mark_of,
    stored_sum,
)

SECRET_BYTES = 32
NONCE_BYTES = 12
_ID, _SLOT, _MASK = b"kvstore/1 key", b"kvstore/1 slot", b"kvstore/1 mask"


class Key:
    """One namespace's. Immutable; any thread. What it says of itself, in logs too, is its ``id`` and no more."""

    def __init__(self, secret: bytes) -> None:
        """``secret``: 32 random bytes."""
        assert len(secret) == SECRET_BYTES
        self.secret = secret
        self.id = blake2b(_ID, digest_size=ID_BYTES, key=secret).digest()
        self.mark = mark_of(self.id)
        self._masking = algorithms.AES(self._derived(_MASK))

    def __repr__(self) -> str:
        return f"Key({self.id.hex()})"

    def _derived(self, purpose: bytes) -> bytes:
        return blake2b(purpose, digest_size=32, key=self.secret).digest()

    def _slot(self, salt: bytes) -> bytes:
        return self._derived(_SLOT + salt)

    def mask(self, keys: bytes) -> bytes:
        """Keys of blocks, one behind the other, as they stand on disk."""
        return Cipher(self._masking, modes.ECB()).encryptor().update(keys)

    def unmask(self, keys: bytes) -> bytes:
        """What ``mask`` was given."""
        return Cipher(self._masking, modes.ECB()).decryptor().update(keys)

    def seal(self, header: Header, payload: memoryview, target: memoryview, salt: bytes) -> Header:
        """Encrypts a payload into ``target``, which may be ``payload``, and returns the header for it.

        Padding between layers is left as it is. ``salt``: 32 bytes that were never used before. Holds Python's lock
        for microseconds a layer.
        """
        assert header.checksums is not None and len(salt) == SALT_BYTES
        layout, stride, slot = header.layout, header.stride, self._slot(salt)
        small = AESGCM(slot)
        masked = self.mask(header.key + header.parent)
        tokens = small.encrypt(_nonce(TOKENS), header.tokens, _place(header.sequence))
        sealed = replace(header, key=masked[:KEY_BYTES], parent=masked[KEY_BYTES:], tokens=tokens[:-TAG_BYTES])
        bound, tags, stored = _bound(sealed, self.id, salt), bytearray(), array("Q")
        for layer in range(len(layout.layers)):
            start, end = layer_range(layout, stride, layer)
            encryptor = Cipher(algorithms.AES(slot), modes.GCM(_nonce(layer))).encryptor()
            encryptor.authenticate_additional_data(bound)
            encryptor.update_into(payload[start:end], target[start:end])
            encryptor.finalize()
            tags += encryptor.tag
            stored.append(stored_sum(target, layout, stride, layer))
        sums = small.encrypt(_nonce(SUMS), header.checksums.tobytes(), bound)
        tags += tokens[-TAG_BYTES:] + sums[-TAG_BYTES:]
        return replace(sealed, checksums=stored, seal=Seal(self.id, salt, bytes(tags), sums[:-TAG_BYTES]))

    def open(self, header: Header) -> Opened:
        """What a sealed header says. Raises ``Corrupt`` when anything of it is not what was sealed."""
        seal = header.seal
        assert seal is not None
        slot, bound = self._slot(seal.salt), _bound(header, seal.key, seal.salt)
        small = AESGCM(slot)
        try:
            tokens = small.decrypt(_nonce(TOKENS), header.tokens + seal.tag(TOKENS), _place(header.sequence))
            sums = small.decrypt(_nonce(SUMS), seal.sums + seal.tag(SUMS), bound)
        except InvalidTag:
            raise Corrupt("the header is not what was sealed") from None
        keys = self.unmask(header.key + header.parent)
        plain = replace(
            header,
            key=keys[:KEY_BYTES],
            parent=keys[KEY_BYTES:],
            tokens=tokens,
            checksums=array("Q", sums),
            seal=None,
        )
        return Opened(plain, seal, slot, bound)

    def tokens(self, sequence: int, sealed: SealedTokens) -> bytes | None:
        """Token ids that an index kept; None when they are not what was sealed."""
        try:
            return AESGCM(self._slot(sealed.salt)).decrypt(_nonce(TOKENS), sealed.data + sealed.tag, _place(sequence))
        except InvalidTag:
            return None


@dataclass(frozen=True, slots=True, repr=False)
class Opened:
    """A sealed block whose header was opened. ``header`` is as it was before it was sealed. Any thread."""

    header: Header
    _seal: Seal
    _slot: bytes
    _bound: bytes

    def layers(self, payload: memoryview, first: int, last: int) -> None:
        """Decrypts layers ``first`` to ``last - 1`` where they lie. Raises ``Corrupt``, and then they are nobody's.

        Holds Python's lock for microseconds a layer.
        """
        layout, stride = self.header.layout, self.header.stride
        for layer in range(first, last):
            start, end = layer_range(layout, stride, layer)
            mode = modes.GCM(_nonce(layer), self._seal.tag(layer))
            decryptor = Cipher(algorithms.AES(self._slot), mode).decryptor()
            decryptor.authenticate_additional_data(self._bound)
            decryptor.update_into(payload[start:end], payload[start:end])
            try:
                decryptor.finalize()
            except InvalidTag:
                raise Corrupt(f"layer {layer} is not what was sealed") from None


def _nonce(message: int) -> bytes:
    return (message % (1 << 32)).to_bytes(NONCE_BYTES, "little")


def _place(sequence: int) -> bytes:
    return sequence.to_bytes(8, "little")


def _bound(sealed: Header, key: bytes, salt: bytes) -> bytes:
    """Digest of all that a sealed header says beside its seal's proofs."""
    said: bytes = msgpack.packb([described(sealed), key, salt])
    return blake2b(said, digest_size=32).digest()
