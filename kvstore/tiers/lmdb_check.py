"""Whether an LMDB file may be opened. LMDB trusts its pages: a damaged one can crash the process or answer wrongly.

After a clean close a digest of the whole file lies beside it and must match. Without one (the process was killed) every
page that is reachable is walked: bounds, kinds, counts, no page twice. What stands in the values has checksums there.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_128

from kvstore.files import PAGE, Files
from kvstore.tiers.catalog import Doubt

DATA = "data.mdb"
DIGEST = "digest"
TABLES = 4
UNFINISHED = "unfinished"  # is there while the index is made from the slots' headers
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_META = struct.Struct("<IIQQ")  # magic, version, address, size of the map; behind the page's header
_TREE = struct.Struct("<IHHQQQQQ")  # page size, flags, depth, branch, leaf and overflow pages, entries, root
_TAIL = struct.Struct("<QQ")  # last page, transaction
_PAGE = struct.Struct("<QHHHH")  # number, nothing, flags, lower, upper
_NODE = struct.Struct("<HHHH")  # low and high half of the size (or of a page number), flags, size of the key
_BRANCH, _LEAF, _OVERFLOW, _METAPAGE = 1, 2, 4, 8
_BIG, _SUBTREE, _INTEGER_KEYS = 1, 2, 8
_NOWHERE = (1 << 64) - 1
_MAX_DEPTH = 24
_STEP = 4 << 20


def check(files: Files, folder: str) -> bool:
    """``sound`` for who opens it: takes the digest away, because from now on the file changes."""
    clean = sound(files, folder)
    try:
        if clean:
            files.remove(f"{folder}/{DIGEST}")
            files.sync_folder(folder)
    except OSError as error:
        raise Doubt(f"it cannot be read: {error}") from error
    return clean


def sound(files: Files, folder: str) -> bool:
    """Raises ``Doubt`` unless the file may be opened. True: it is bit for bit what was closed; False: only its
    structure is sound."""
    path, beside = f"{folder}/{DATA}", f"{folder}/{DIGEST}"
    try:
        if not files.exists(path):
            raise Doubt("it is missing")
        if files.exists(f"{folder}/{UNFINISHED}"):
            raise Doubt("it was not finished")
        size = files.size(path)
        if files.exists(beside):
            if files.read_small(beside) != _digest(files, path):
                raise Doubt("its bytes are not what was closed")
            clean = True
        else:
            clean = False
        if size < 2 * PAGE:
            raise Doubt("it is too short")
        handle = files.open(path)
        try:
            with files.map(handle) as image, memoryview(image) as view:
                Walk(view).run(deep=not clean)
        finally:
            files.close(handle)
        return clean
    except (OSError, ValueError, struct.error) as error:
        raise Doubt(f"it cannot be read: {error}") from error


def leave_digest(files: Files, folder: str) -> None:
    """Writes the digest of a file that was just closed."""
    files.write_small(f"{folder}/{DIGEST}", _digest(files, f"{folder}/{DATA}"))


def destroy(files: Files, folder: str) -> None:
    """Zeroes and removes the files of an environment, and its folder; nothing when there is none."""
    if not files.exists(folder):
        return
    for name in files.names(folder):
        path = f"{folder}/{name}"
        if files.is_folder(path):
            destroy(files, path)
            continue
        handle = files.open(path)
        try:
            if size := files.size(path):
                files.zero(handle, 0, -(-size // PAGE) * PAGE)
                files.sync(handle)
        finally:
            files.close(handle)
        files.remove(path)
    files.remove(folder)


def _digest(files: Files, path: str) -> bytes:
    handle = files.open(path)
    digest, offset, buffer = xxh3_128(), 0, memoryview(bytearray(_STEP))
    try:
        while got := files.read(handle, buffer, offset):
            digest.update(buffer[:got])
            offset += got
    finally:
        files.close(handle)
    return f"kvstore index 1 {offset} {digest.hexdigest()}\n".encode()


class Walk:
    """Walks the two trees of an environment and all trees in them; ``Doubt`` at the first thing that is off."""

    def __init__(self, image: memoryview) -> None:
        self._image = image
        self._page = PAGE
        self._seen = bytearray()

    def run(self, deep: bool) -> None:
        """Checks the meta pages; ``deep``: also everything that the newest one leads to."""
        free, main, last = self._newest()
        if not deep:
            return
        if last * self._page > len(self._image) + 16 * self._page:  # a few may be taken and not yet written
            raise Doubt("a meta page is damaged")
        self._seen = bytearray(last + 1)
        self._seen[:2] = b"\x01\x01"
        self._tree(main, "main")
        if main[6] != TABLES:  # entries
            raise Doubt("it has not our tables")
        self._tree(free, "free")

    def _newest(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        self._page = _TREE.unpack_from(self._image, 16 + _META.size)[0]
        if self._page not in (4096, 8192, 16384, 32768, 65536) or len(self._image) < 2 * self._page:
            raise Doubt("it is no LMDB file")
        found = []
        for number in (0, 1):
            start = number * self._page
            page, _, flags, _, _ = _PAGE.unpack_from(self._image, start)
            magic, version, address, _ = _META.unpack_from(self._image, start + 16)
            if page != number or flags != _METAPAGE or magic != _MAGIC or version != _VERSION or address:
                raise Doubt("a meta page is damaged")
            free = _TREE.unpack_from(self._image, start + 16 + _META.size)
            main = _TREE.unpack_from(self._image, start + 16 + _META.size + _TREE.size)
            last, transaction = _TAIL.unpack_from(self._image, start + 16 + _META.size + 2 * _TREE.size)
            if free[0] != self._page:
                raise Doubt("a meta page is damaged")
            found.append((transaction, free, main, last))
        _, free, main, last = max(found, key=lambda meta: meta[0])
        return free, main, last

    def _tree(self, tree: tuple[int, ...], kind: str) -> None:
        """``kind``: main (its values may be trees), free (its values are lists of pages), or table."""
        _, flags, depth, *counts, root = tree
        if flags != (_INTEGER_KEYS if kind == "free" else 0) or depth > _MAX_DEPTH:
            raise Doubt("a table is of an unknown kind")
        counted, last = [0, 0, 0, 0], b""
        stack = [(root, 1)] if root != _NOWHERE else []
        while stack:
            number, level = stack.pop()
            start, nodes = self._nodes(number, _LEAF if level == depth else _BRANCH)
            if level != depth:
                counted[0] += 1
                children = [low | high << 16 | top << 32 for _, low, high, top, _ in nodes]
                stack += [(child, level + 1) for child in reversed(children)]
                continue
            counted[1] += 1
            counted[3] += len(nodes)
            for at, low, high, flags, key_size in nodes:
                data, size = at + 8 + key_size, low | high << 16
                key = bytes(self._image[start + at + 8 : start + data])
                if kind != "free" and (key <= last or not key):
                    raise Doubt("keys are out of order")
                last = key
                counted[2] += self._value(start, data, size, flags, kind)
        if counted != counts or (root == _NOWHERE) != (depth == 0):
            raise Doubt("a table's counts are off")

    def _nodes(self, number: int, kind: int) -> tuple[int, list[tuple[int, int, int, int, int]]]:
        """Where a page starts and its nodes: place in the page and the four fields."""
        self._visit(number, 1)
        self._written(number, 1)
        start = number * self._page
        page, _, flags, lower, upper = _PAGE.unpack_from(self._image, start)
        if page != number or flags != kind or not 16 < lower <= upper <= self._page or lower % 2:
            raise Doubt("a page is damaged")
        places = struct.unpack_from(f"<{(lower - 16) // 2}H", self._image, start + 16)
        if min(places) < upper or max(places) > self._page - 8 or (kind == _BRANCH and len(places) < 2):
            raise Doubt("a page is damaged")
        unpack = _NODE.unpack_from
        nodes = [(place, *unpack(self._image, start + place)) for place in places]
        if any(node[0] + 8 + node[4] > self._page for node in nodes):
            raise Doubt("a key runs out of its page")
        return start, nodes

    def _visit(self, first: int, count: int) -> None:
        if not 2 <= first <= first + count <= len(self._seen) or any(self._seen[first : first + count]):
            raise Doubt("a page is used twice")
        self._seen[first : first + count] = b"\x01" * count

    def _written(self, first: int, count: int) -> None:
        """The file may end before its last page, taken and let go in one transaction, but not before these."""
        if (first + count) * self._page > len(self._image):
            raise Doubt("it was cut")

    def _value(self, start: int, data: int, size: int, flags: int, kind: str) -> int:
        """Checks the value of a leaf's node; returns how many overflow pages it has."""
        pages = 0
        if flags & _BIG:
            (number,) = struct.unpack_from("<Q", self._image, start + data) if data + 8 <= self._page else (0,)
            pages = -(-(16 + size) // self._page)
            self._visit(number, pages)
            self._written(number, pages)
            start, data = number * self._page, 16
            page, _, found, _, _ = _PAGE.unpack_from(self._image, start)
            if page != number or found != _OVERFLOW or struct.unpack_from("<I", self._image, start + 12)[0] != pages:
                raise Doubt("a long value is damaged")
        elif data + size > self._page:
            raise Doubt("a value runs out of its page")
        if kind == "free":
            count, *rest = struct.unpack_from(f"<{size // 8}Q", self._image, start + data)
            if count != len(rest) or size % 8:
                raise Doubt("a list of free pages is damaged")
            for number in rest:
                self._visit(number, 1)
        elif kind == "main" or flags & ~_BIG:
            if kind != "main" or flags != _SUBTREE or size != _TREE.size:
                raise Doubt("a value is of an unknown kind")
            self._tree(_TREE.unpack_from(self._image, start + data), "table")
        return pages
