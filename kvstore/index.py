"""Which blocks are known, how they hang together, and the longest stored prefix of a prompt, to the token.

A block is a small int, its *number*; what is known of it lies in columns, so that a million blocks cost neither a
million Python objects nor the collector's time. The store's lock guards every call.

Invariants:
* a number is *present* while some tier holds its bytes; an absent number stays only as long as it has children or
  leases, so that the children are reachable again when it is saved anew;
* families hold present numbers only;
* token bytes are in memory for blocks that the host tier holds, or that only the remote tier does, and fetched from
  the disk tier's index for others.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

from kvstore.families import NONE, Families
from kvstore.keys import TOKEN_BYTES, Namespace, block_key, common_tokens
from kvstore.kinds import Kind, Origin
from kvstore.layout import Layout
from kvstore.remote.block import RemoteBlock
from kvstore.tiers.base import Entry

Keys = Sequence[bytes]


class Found(NamedTuple):
    """Result of a look-up: whole blocks, then the block that matches in part (its number or NONE, and how far)."""

    blocks: list[int]
    partial: int
    partial_tokens: int
    tokens: int


class Index:
    """Columns of blocks, the map from keys to numbers, and the families of children."""

    def __init__(self, fetch_tokens: Callable[[int], bytes | None]) -> None:
        """``fetch_tokens(sequence)`` reads token bytes that are not in memory; None when they are gone."""
        self._fetch = fetch_tokens
        self.number: dict[bytes, int] = {}
        # Columns by number. A key of b"" marks a number that is not in use.
        self.key: list[bytes] = []
        self.parent = array("q")
        self.kind = array("L")
        self.count = array("L")  # tokens
        self.sequence = array("Q")
        self.created = array("d")
        self.expires = array("d")  # Unix seconds, 0: never
        self.disk = array("q")  # address or NONE
        self.stride = array("L")  # of the disk copy
        self._degree = array("L")  # all children, absent ones too
        # Few numbers have an entry in these.
        self.tokens: dict[int, bytes] = {}
        self.leases: dict[int, int] = {}
        self.remote: dict[int, RemoteBlock] = {}  # blocks that no tier of this host holds, while somebody leases them
        self._was: dict[int, bytes] = {}  # digest of the tokens of absent blocks that have children
        self.families = Families(self.tokens_of)
        self.kinds: list[Kind] = []
        self._kind_ids: dict[Kind, int] = {}
        self._layout: list[int] = []  # by kind: equal layouts have equal small ints
        self._layout_ids: dict[Layout, int] = {}
        self._roots: dict[bytes, int] = {}
        self._root_keys: list[bytes] = []
        self._free: list[int] = []

    # -- interning ---------------------------------------------------------------------------------------------

    def intern(self, kind: Kind) -> int:
        """Small int for ``kind``."""
        found = self._kind_ids.get(kind)
        if found is None:
            found = self._kind_ids[kind] = len(self.kinds)
            self.kinds.append(kind)
            self._layout.append(self._layout_ids.setdefault(kind.layout, len(self._layout_ids)))
        return found

    def kind_of(self, number: int) -> Kind:
        """What ``number`` shares with others."""
        return self.kinds[self.kind[number]]

    def root(self, root_key: bytes) -> int:
        """Pseudo number of a root, the parent of first blocks. Below NONE."""
        found = self._roots.get(root_key)
        if found is None:
            found = self._roots[root_key] = NONE - 1 - len(self._roots)
            self._root_keys.append(root_key)
        return found

    def chains(self, root_key: bytes) -> int:
        """How many present first blocks hang on this root."""
        return self.families.size(self._roots[root_key]) if root_key in self._roots else 0

    def root_key(self, root: int) -> bytes:
        """Key of the root with this pseudo number."""
        return self._root_keys[NONE - 1 - root]

    # -- look-up -----------------------------------------------------------------------------------------------

    def same_layout(self, number: int, layout: Layout) -> bool:
        """Whether a block's bytes mean what ``layout`` says."""
        return self._layout[self.kind[number]] == self._layout_ids.get(layout, NONE)

    def find(
        self, space: Namespace, root: bytes, layout: Layout, tokens: bytes, limit: int, now: float, keys: Keys = ()
    ) -> Found:
        """The longest stored prefix of ``tokens`` behind ``root``, at most ``limit``. ``keys``: its blocks'."""
        size, blocks = layout.block_tokens * TOKEN_BYTES, list[int]()
        key, parent, position = root, self._roots.get(root, NONE), 0
        if parent == NONE:
            return Found(blocks, NONE, 0, 0)
        number, known, wanted = self.number, self.tokens, self._layout_ids.get(layout, NONE)
        while position + size <= limit * TOKEN_BYTES:
            piece = tokens[position : position + size]
            key = keys[len(blocks)] if keys else block_key(space, key, piece)
            found = number.get(key, NONE)
            if found == NONE or self._layout[self.kind[found]] != wanted or not self.serves(found, now):
                break
            if known.get(found, piece) != piece or self.parent[found] != parent:
                break  # cannot be, unless the hash is broken: a miss, never wrong bytes
            blocks.append(found)
            parent = found
            position += size
        done = position // TOKEN_BYTES
        partial, common = self.best_child(parent, tokens[position : position + size], now)
        used = min(common, limit - done)
        if used <= 0 or self._layout[self.kind[partial]] != wanted:
            return Found(blocks, NONE, 0, done)
        return Found(blocks, partial, used, done + used)

    def serves(self, number: int, now: float) -> bool:
        """Whether a known block is there, and has not expired."""
        if self.expires[number] and self.expires[number] <= now:
            return False
        return self.disk[number] != NONE or number in self.tokens or number in self.remote

    def best_child(self, parent: int, tokens: bytes, now: float) -> tuple[int, int]:
        """The child that shares most leading tokens with ``tokens``, and how many; NONE and 0 when none does."""
        best, most = NONE, 0
        if tokens:
            for child in self.families.neighbours(parent, tokens):
                common = common_tokens(self.tokens_of(child), tokens)
                if common > most and self.serves(child, now):
                    best, most = child, common
        return best, most

    def tokens_of(self, number: int) -> bytes:
        """Token bytes of a block; empty when nobody has them any more."""
        tokens = self.tokens.get(number)
        if tokens is None and number in self.remote:
            return self.remote[number].header.tokens
        return tokens if tokens is not None else self._fetch(self.sequence[number]) or b""

    def present(self, number: int) -> bool:
        """Whether some tier holds the block's bytes."""
        return self.disk[number] != NONE or number in self.tokens or number in self.remote

    def same(self, number: int, parent: int, tokens: bytes) -> bool:
        """Whether a key's block is the one behind ``parent`` with these tokens: always, unless the hash is broken."""
        if self.present(number):
            return self.parent[number] == parent and self.tokens_of(number) == tokens
        return self.parent[number] == parent and self._was.get(number) in (None, _sum(tokens))

    def idle(self, number: int) -> bool:
        """Whether nothing needs the number: no bytes, no children, no leases."""
        return not (self.present(number) or self._degree[number] or number in self.leases)

    def chain(self, number: int) -> list[int]:
        """The block and its ancestors, root first."""
        chain = [number]
        while (number := self.parent[number]) >= 0:
            chain.append(number)
        return chain[::-1]

    # -- change ------------------------------------------------------------------------------------------------

    def insert(
        self, key: bytes, parent: int, kind: int, tokens: int, sequence: int, created: float, expires: float
    ) -> int:
        """Number for a new block that hangs on ``parent`` (a number or a root). Absent until it is linked."""
        if not self._free:
            self._free.append(len(self.key))
            self.key.append(b"")
            for column in (self.parent, self.kind, self.count, self.sequence, self.created, self.expires):
                column.append(0)
            self.disk.append(NONE)
            self.stride.append(0)
            self._degree.append(0)
        number = self._free.pop()
        self.families.add_parent(number)
        self.key[number] = key
        self.parent[number], self.kind[number], self.count[number] = parent, kind, tokens
        self.sequence[number], self.created[number], self.expires[number] = sequence, created, expires
        self.disk[number], self._degree[number] = NONE, 0
        self.number[key] = number
        if parent >= 0:
            self._degree[parent] += 1
        return number

    def renew(self, number: int, kind: int, sequence: int, created: float, expires: float) -> None:
        """An absent number stands for its block once more."""
        self.kind[number], self.sequence[number] = kind, sequence
        self.created[number], self.expires[number] = created, expires

    def link(self, number: int, tokens: bytes) -> None:
        """The block is present: its parent's family shows it."""
        self._was.pop(number, None)
        self.families.link(self.parent[number], number, tokens)

    def unlink(self, number: int) -> None:
        """The block is absent from now on; called before its token bytes are let go."""
        if self._degree[number]:
            self._was[number] = _sum(self.tokens_of(number))
        self.families.unlink(self.parent[number], number)

    def sweep(self, number: int) -> None:
        """Takes an idle number out of use, then its ancestors that were kept only for it."""
        while number >= 0 and self.key[number] and self.idle(number):
            parent = self.parent[number]
            del self.number[self.key[number]]
            self.families.drop_parent(number)
            self._was.pop(number, None)
            self.key[number] = b""
            self._free.append(number)
            if parent >= 0:
                self._degree[parent] -= 1
            number = parent

    # -- restart -----------------------------------------------------------------------------------------------

    def restore(self, entries: Iterable[Entry], used: array[float]) -> tuple[list[int], list[Entry]]:
        """Takes in the blocks found on disk, in order of sequence; the index must be empty.

        Returns their numbers in the order in which to evict them: by last use, children before parents. And the
        entries that were kept out: nothing could reach a block whose parent is missing, or a second one of a key.
        """
        assert not self.key
        kinds: dict[tuple[bytes, str, str, int, str], int] = {}
        number, keys, parents = self.number, self.key, self.parent
        add_key, add_parent, add_used = keys.append, parents.append, used.append
        integers = (self.kind, self.count, self.sequence, self.disk, self.stride)
        add_kind, add_count, add_sequence, add_disk, add_stride = (column.append for column in integers)
        add_created, add_expires = self.created.append, self.expires.append
        # fmt: off
        apart: list[Entry] = []
        for entry in chain(entries, _again(apart)):
            (sequence, address, key, above, namespace, tenant, owner, layout,
             tokens, stride, created, expires, when, root, form, _) = entry
            # fmt: on
            parent = self.root(above) if root else number.get(above, NONE)
            if parent == NONE or key in number:
                apart.append(entry)
                continue
            shared = (namespace, tenant, owner, id(layout), form)
            kind = kinds.get(shared, NONE)
            if kind == NONE:
                kind = kinds[shared] = self.intern(Kind(namespace, b"", tenant, owner, layout, Origin(form)))
            number[key] = len(keys)
            add_key(key)
            add_parent(parent)
            add_kind(kind)
            add_count(tokens)
            add_sequence(sequence)
            add_disk(address)
            add_stride(stride)
            add_created(created)
            add_expires(expires)
            add_used(when)
        degree = [0] * len(keys)
        for parent in parents:
            if parent >= 0:
                degree[parent] += 1
        self._degree.extend(degree)
        self.families.restore(parents)
        for child in range(len(keys) - 1, -1, -1):  # a parent is as young as its youngest child
            parent = parents[child]
            if parent >= 0 and used[parent] < used[child]:
                used[parent] = used[child]
        return sorted(range(len(keys) - 1, -1, -1), key=used.__getitem__), apart


def _sum(tokens: bytes) -> bytes:
    return blake2b(tokens, digest_size=16).digest()


def _again(apart: list[Entry]) -> Iterator[Entry]:
    """The entries that were put apart, round after round, as long as a round leaves fewer: a parent that was saved
    anew comes after its children."""
    left = 0
    while apart and len(apart) != left:
        taken, left = list(apart), len(apart)
        apart.clear()
        yield from taken
