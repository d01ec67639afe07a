"""The folder of keys: one for each namespace, made before the namespace's first block is written to disk.

Who deletes a key deletes what was written with it. A file is looked at whenever a block is written or read, so that is
noticed at once; what is in memory already is served until it goes. A key folder belongs to one cache directory. Any
thread; methods that do no I/O say so.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvstore.block import Header
from kvstore.errors import BadInput, StoreBusy, TierError
from kvstore.files import TEMPORARY, Files, Held
from kvstore.sealed import SALT_BYTES, SealedTokens

if TYPE_CHECKING:
    from kvstore.cipher import Key, Opened

log = logging.getLogger("kvstore")

LOCK = "lock"
_NAME = re.compile("[0-9a-f]{64}")


class NoKey(TierError):
    """A block was sealed with a key that is not there."""


class Vault:
    """A key folder, held by this process until ``close``."""

    def __init__(self, files: Files, path: str | os.PathLike[str]) -> None:
        """Takes the folder, which is made where there is none. Raises ``BadInput`` when it cannot be used or others
        could read it, ``StoreBusy`` when another store holds it."""
        try:
            from kvstore import cipher
        except ImportError as error:
            raise BadInput("encryption= needs cryptography; install kvstore-llm[encryption]") from error
        self._files, self._make, self._secret_bytes = files, cipher.Key, cipher.SECRET_BYTES
        self.path = os.path.abspath(path)
        self._lock = threading.Lock()  # guards the two below
        self._keys: dict[bytes, Key] = {}  # by namespace
        self._by_id: dict[bytes, Key] = {}
        self._making = threading.Lock()  # held by who makes or removes keys
        self._complained = set[bytes]()
        try:
            self._prepare()
            self._held = files.lock(os.path.join(self.path, LOCK))
        except Held as held:
            raise StoreBusy(
                f"the key folder {self.path!r} is in use by {held.holder}; give each store a key folder of its own"
            ) from None
        except OSError as error:
            raise BadInput(f"{self.path!r} cannot be used as a key folder: {error.strerror}; give another") from error
        try:
            self._sweep()
        except OSError as error:
            files.close(self._held)
            raise TierError(f"the key folder {self.path!r}: {error}") from error

    def _prepare(self) -> None:
        files = self._files
        if not files.exists(self.path):
            self._found(self.path)
        elif not files.is_folder(self.path):
            raise BadInput(f"{self.path!r} is a file; give a folder for keys")
        if (mode := files.mode(self.path)) & 0o077:
            raise BadInput(f"others than its owner have access to {self.path!r} (mode {mode:04o}); chmod 700 it")

    def _found(self, path: str) -> None:
        """Makes a folder and those above it, each durably."""
        above = os.path.dirname(path)
        if not self._files.exists(above):
            self._found(above)
        self._files.make_folder(path)
        self._files.sync_folder(above)

    def _sweep(self) -> None:
        """Removes keys that a crash left half written: nothing was sealed with them."""
        for name in self._files.names(self.path):
            if name.startswith(TEMPORARY):
                self._destroy(name)

    def _path(self, namespace: bytes) -> str:
        return os.path.join(self.path, namespace.hex())

    # --- keys

    def known(self, namespace: bytes) -> Key | None:
        """The key of a namespace; None where there is none, or it cannot be read."""
        with self._lock:
            key = self._keys.get(namespace)
        if key is None:
            try:
                key = self._read(namespace)
            except TierError as error:
                self._complain(namespace, error)
        return key

    def _complain(self, namespace: bytes, error: TierError) -> None:
        with self._lock:
            new = namespace not in self._complained
            self._complained.add(namespace)
        if new:
            log.warning("%s", error)

    def _read(self, namespace: bytes) -> Key | None:
        """The key as it is in the folder now; None where it is not."""
        try:
            secret = self._files.read_small(self._path(namespace), self._secret_bytes + 1)
        except FileNotFoundError:
            self._drop(namespace)
            return None
        except OSError as error:
            raise TierError(f"the key of namespace {namespace.hex()[:16]} cannot be read: {error.strerror}") from error
        if secret == bytes(self._secret_bytes):  # the power went while it was destroyed
            self._drop(namespace)
            return None
        if len(secret) != self._secret_bytes:
            raise TierError(f"the key of namespace {namespace.hex()[:16]} is not whole; restore it, or delete it")
        with self._lock:
            key = self._keys.get(namespace)
        if key is None or key.secret != secret:
            self._drop(namespace)
            key = self._make(secret)
            with self._lock:
                self._keys[namespace] = self._by_id[key.id] = key
        return key

    def _drop(self, namespace: bytes) -> None:
        with self._lock:
            key = self._keys.pop(namespace, None)
            if key is not None:
                self._by_id.pop(key.id, None)

    def _making_of(self, namespace: bytes) -> Key:
        """The key to write with; made, durably, where there is none."""
        with self._making, _translated():
            key = self._read(namespace)
            if key is None:
                self._files.write_small(self._path(namespace), self._files.random(self._secret_bytes))
                key = self._read(namespace)
        if key is None:
            raise TierError(f"the key of namespace {namespace.hex()[:16]} was removed while it was made")
        return key

    # --- blocks

    def seal(self, header: Header, payload: memoryview, target: memoryview) -> Header:
        """Encrypts a block for the disk; see ``Key.seal``. Raises ``TierError`` where no key can be had."""
        key = self._making_of(header.namespace)
        return key.seal(header, payload, target, self._files.random(SALT_BYTES))

    def open(self, header: Header) -> Opened:
        """Opens a sealed header. Raises ``NoKey``, ``Corrupt`` or ``TierError``."""
        assert header.seal is not None
        key = self._read(header.namespace)
        if key is None or key.id != header.seal.key:
            raise NoKey("the key that it was sealed with is not there")
        return key.open(header)

    def tokens(self, sequence: int, sealed: SealedTokens) -> bytes | None:
        """Token ids that an index kept; None without their key, or where they are not what was sealed. No I/O."""
        with self._lock:
            key = self._by_id.get(sealed.key)
        return None if key is None else key.tokens(sequence, sealed)

    # --- the end

    def retire(self, alive: Callable[[], Set[bytes]]) -> int:
        """Destroys the keys of all namespaces but those that ``alive`` names, durably; how many. No key is made from
        when it is called until then. Raises ``TierError``."""
        with self._making, _translated():
            living = {namespace.hex() for namespace in alive()}
            gone = [name for name in self._files.names(self.path) if _NAME.fullmatch(name) and name not in living]
            for name in gone:
                self._drop(bytes.fromhex(name))
                self._destroy(name)
            if gone:
                self._files.sync_folder(self.path)
        return len(gone)

    def _destroy(self, name: str) -> None:
        path = os.path.join(self.path, name)
        handle = self._files.open(path)
        try:
            self._files.write(handle, memoryview(bytes(self._secret_bytes)), 0)
            self._files.sync(handle)
        finally:
            self._files.close(handle)
        self._files.remove(path)

    def close(self) -> None:
        """Lets go of the folder, and forgets the keys."""
        with self._lock:
            self._keys.clear()
            self._by_id.clear()
        self._files.close(self._held)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TierError(f"the key folder: {error}") from error
