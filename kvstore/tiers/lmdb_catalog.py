"""The disk tier's index in LMDB.

Four tables: fixed-size records by sequence, token bytes by sequence, names (namespace, tenant, owner, layout) by a
small number, memos by the digest of their name. Keys are big-endian, so sequences append. LMDB has no checksums of its
own: each value ends with one, and a clean close leaves a digest of the whole file beside it. FORMAT.md is the prose.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice

import lmdb

from kvstore.errors import Corrupt, TierError
from kvstore.files import PAGE, Files
from kvstore.sealed import SealedTokens
from kvstore.tiers import records
from kvstore.tiers.catalog import Change, Doubt
from kvstore.tiers.lmdb_check import UNFINISHED, check, destroy, leave_digest
from kvstore.tiers.records import (
    RECORD,
    Name,
    RecordSnapshot,
    names_of,
    numbers_in,
    opened,
    pack_name,
    sealed,
    tokens_in,
    tokens_value,
    unpack_name,
)

_KEY = struct.Struct(">Q")
_NAME_KEY = struct.Struct(">I")
_FULL = 0.85  # of the map for blocks; the rest is for the pages that a change copies
_BATCH = 4096


class Full(TierError):
    """The map has no room for a change."""


class LmdbCatalog:
    """``Catalog`` in an LMDB environment of at most ``limit`` bytes. One process, never across a fork."""

    def __init__(self, files: Files, folder: str, limit: int, *, create: bool = False) -> None:
        """Opens what is at ``folder``; raises ``Doubt`` when it cannot be trusted. ``create`` starts afresh, and
        what it makes is trusted from ``finish`` on."""
        self._files = files
        self._folder = folder
        self._map = max(limit // PAGE, 32) * PAGE
        self._reading = threading.Lock()
        self._writing = threading.RLock()
        self._pid = os.getpid()
        with _translated():
            for leftover in (".new", ".old"):  # of a rewrite that was cut short
                destroy(files, folder + leftover)
            if create:
                destroy(files, folder)
                files.make_folder(folder)
                files.write_small(f"{folder}/{UNFINISHED}", b"")
            clean = create or check(files, folder)
            env = self._open(folder)
            try:
                self._start(env)
                self._numbers, self._names = self._read_names()
                if not clean:
                    self.snapshot().check()
            except BaseException:
                env.close()
                raise

    def _open(self, folder: str, sync: bool = True) -> lmdb.Environment:
        # Without LMDB's own locks: the directory is locked as a whole, and `_writing` and `_reading` keep the rules.
        return lmdb.open(folder, map_size=self._map, max_dbs=4, mode=0o600, lock=False, sync=sync, max_spare_txns=2)

    def _start(self, env: lmdb.Environment) -> None:
        self._env = env
        self._tables = {name: env.open_db(name) for name in (b"records", b"tokens", b"names", b"memos")}
        self._records, self._tokens, self._named, self._memos = self._tables.values()
        self._files.sync_folder(self._folder)  # a new file's name
        with env.begin() as txn, txn.cursor(self._records) as cursor:
            self._last = _KEY.unpack(cursor.key())[0] if cursor.last() else -1
        self._view = env.begin()
        self._weigh()

    def _weigh(self) -> None:
        """Pages in use, for ``room``."""
        stats = [self._view.stat(db) for db in self._tables.values()]
        self._count = stats[0]["entries"]
        pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
        page = stats[0]["psize"]
        self._each = max(64.0, pages * page / self._count) if self._count >= 64 else 2048.0
        self._size = (self._env.info()["last_pgno"] + 1) * page

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return int(self._size)

    def room(self, blocks: int) -> bool:
        """See ``Catalog``. Goes by what a block takes on the average."""
        return blocks * self._each <= _FULL * self._map

    def snapshot(self) -> RecordSnapshot:
        """See ``Catalog``."""
        with self._writing, _translated(), self._env.begin(db=self._records) as txn, txn.cursor() as cursor:
            image, values = bytearray(), cursor.iternext(keys=False, values=True)
            while batch := b"".join(islice(values, _BATCH)):  # in steps, which keeps a million objects from being
                image += batch
        return RecordSnapshot(image, self._names)

    def tokens(self, sequence: int) -> bytes | SealedTokens | None:
        """See ``Catalog``. Two microseconds."""
        try:
            with self._reading:
                value = self._view.get(_KEY.pack(sequence), None, self._tokens)
        except lmdb.Error:  # the environment was lost in a failed rewrite
            return None
        return tokens_in(value, sequence)

    def recall(self, name: str) -> str | None:
        """See ``Catalog``."""
        with _translated(), self._reading:
            value = self._view.get(_memo_key(name), None, self._memos)
        data = opened(value)
        return None if data is None else data.decode(errors="replace")

    def apply(self, change: Change) -> None:
        """See ``Catalog``. When the map is full, nothing is changed."""
        if not change:
            return
        with self._writing:
            try:
                self._write(change)
            except Full:
                # LMDB needs fresh pages even to delete. A fresh file without what is forgotten has them.
                if not change.forgotten:
                    raise
                self._move(frozenset(change.forgotten))
                self._write(change)
            with self._reading:
                self._view.abort()
                self._view = self._env.begin()
                self._weigh()

    def _write(self, change: Change) -> None:
        fresh: dict[Name, int] = {}
        try:
            with _translated(), self._env.begin(write=True) as txn:
                self._remove(txn, change)
                self._add(txn, change, fresh)
                for name, value in change.memos.items():
                    txn.put(_memo_key(name), sealed(value.encode()), db=self._memos)
        except Full:
            if change.added:  # one block less must be in before another fits
                self._each = max(self._each, _FULL * self._map / (self._count + 0.5))
            raise
        self._numbers.update(fresh)
        self._names.update({number: name for name, number in fresh.items()})

    def _remove(self, txn: lmdb.Transaction, change: Change) -> None:
        for sequence in change.forgotten:
            key = _KEY.pack(sequence)
            txn.delete(key, db=self._records)
            txn.delete(key, db=self._tokens)
        for sequence, when in change.used.items():
            key = _KEY.pack(sequence)
            record = txn.get(key, db=self._records)
            if record is not None and len(record) == RECORD.size:
                txn.put(key, records.used(bytes(record), when), db=self._records)

    def _add(self, txn: lmdb.Transaction, change: Change, fresh: dict[Name, int]) -> None:
        last = self._last
        for address, header in sorted(change.added, key=lambda pair: pair[1].sequence):
            numbers = [self._number(txn, name, fresh) for name in names_of(header)]
            record = records.record(address, header, numbers)
            key, append = _KEY.pack(header.sequence), header.sequence > last
            txn.put(key, record, append=append, db=self._records)
            txn.put(key, tokens_value(header), append=append, db=self._tokens)
            last = max(last, header.sequence)
        self._last = last  # too high after a failure, which costs nothing but half-filled pages

    def _number(self, txn: lmdb.Transaction, name: Name, fresh: dict[Name, int]) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = fresh.get(name)
        if number is None:
            number = fresh[name] = max(self._names, default=0) + 1 + len(fresh)
            txn.put(_NAME_KEY.pack(number), sealed(pack_name(name)), db=self._named)
        return number

    def _read_names(self) -> tuple[dict[Name, int], dict[int, Name]]:
        names: dict[int, Name] = {}
        with _translated(), self._env.begin(db=self._named) as txn, txn.cursor() as cursor:
            for key, value in cursor:
                data = opened(value)
                if data is None or len(key) != _NAME_KEY.size:
                    raise Doubt("a name is damaged")
                try:
                    names[_NAME_KEY.unpack(key)[0]] = unpack_name(data)
                except (Corrupt, UnicodeDecodeError) as error:
                    raise Doubt("a name cannot be read") from error
        return {name: number for number, name in names.items()}, names

    def rewrite(self) -> None:
        """See ``Catalog``."""
        self._move(frozenset())

    def _move(self, without: Set[int]) -> None:
        """Copies record by record, so that no page comes along that holds what was forgotten."""
        new, old = self._folder + ".new", self._folder + ".old"
        with self._writing, _translated():
            for leftover in (new, old):
                destroy(self._files, leftover)
            self._files.make_folder(new)
            self._copy(new, without)
            with self._reading:
                self._view.abort()
                self._env.close()
                try:
                    self._files.rename(self._folder, old)
                    self._files.rename(new, self._folder)
                finally:
                    if not self._files.exists(self._folder):
                        self._files.rename(old, self._folder)
                    self._start(self._open(self._folder))
            self._files.sync_folder(os.path.dirname(self._folder))
            destroy(self._files, old)
            self._numbers, self._names = self._read_names()

    def _copy(self, folder: str, without: Set[int]) -> None:
        """Copies to a fresh environment, without some sequences and without names that no record uses."""
        target, used = self._open(folder, sync=False), set[int]()
        try:
            for table, db in self._tables.items():
                into = target.open_db(table)
                with self._env.begin(db=db) as source, source.cursor() as cursor:
                    pairs = iter(cursor)
                    while batch := list(islice(pairs, _BATCH)):
                        if without and table in (b"records", b"tokens"):
                            batch = [pair for pair in batch if _KEY.unpack(pair[0])[0] not in without]
                        if table == b"records":
                            for _, record in batch:
                                used.update(numbers_in(record))
                        elif table == b"names":
                            batch = [pair for pair in batch if _NAME_KEY.unpack(pair[0])[0] in used]
                        with target.begin(write=True, db=into) as txn:
                            for key, value in batch:
                                txn.put(key, value, append=True)
            target.sync(True)
        finally:
            target.close()

    def finish(self) -> None:
        """All blocks that there are have been put in."""
        with _translated():
            self._files.remove(f"{self._folder}/{UNFINISHED}")
            self._files.sync_folder(self._folder)

    def close(self) -> None:
        """Leaves the digest of what it closes; from another process than that which opened it, does nothing."""
        with self._writing, self._reading:
            if self._pid != os.getpid():
                return
            self._view.abort()
            self._env.close()
        with _translated():
            leave_digest(self._files, self._folder)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise Doubt(f"LMDB refuses it: {error}") from error
    except lmdb.MapFullError as error:
        raise Full("the index is full") from error
    except (lmdb.Error, OSError) as error:
        raise TierError(f"the index failed: {error}") from error


def _memo_key(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=16).digest()
