"""What a client has is what it may have: it writes nothing that others read, and sees nothing of other tenants."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blocks import NS, SMALL, found, ids, load_all, namespace, save
from daemons import PATIENCE, Daemon, daemon
from mutations import framed
from peers import Peer

import kvstore
from kvstore.daemon.client import Client
from kvstore.daemon.operator import Operator
from kvstore.daemon.packed import pack_namespace, packed_layout

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mmap.restype = ctypes.c_void_p
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
MADV_REMOVE, F_ADD_SEALS, SEAL_WRITE = 9, 1033, 8
TOKENS = ids(1, 320)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with two tenants beside the one that everybody is who has no token."""
    folder = tmp_path_factory.mktemp("tenants")
    lines = []
    for name in "ab":
        (folder / name).write_text(f"this is the token of {name}")
        (folder / name).chmod(0o600)
        lines.append(f'[tenants.{name}]\ntoken_file = "{folder / name}"\nhost = "16MiB"\n')
    (folder / "kvstore.toml").write_text("".join(lines))
    flags = "--config", folder / "kvstore.toml", "--dir", folder / "cache", "--host", "64MiB", "--disk", "256MiB"
    with daemon(folder, *flags) as started:
        yield started


def connect(shared: Daemon, name: str = "") -> Client:
    """A client of this tenant; the caller closes it."""
    return kvstore.connect(shared.url, timeout=PATIENCE, token=f"this is the token of {name}" if name else None)


def lent(shared: Daemon, name: str = "") -> tuple[Peer, int, int]:
    """A peer that has loaded what is stored: its descriptors of the arena of blocks, and of its own staging area."""
    peer = Peer(shared.socket, f"this is the token of {name}" if name else None)
    tokens = struct.pack(f"<{len(TOKENS)}I", *TOKENS)
    packed, _ = peer.ask("match", pack_namespace(NS), packed_layout(SMALL), tokens, None, 0, True, number=2)
    (_, sources), arenas = peer.ask("load", packed[0], number=3)
    assert len(sources) == 20 and [staging for staging, _, _ in arenas] == [False]
    _, areas = peer.ask("drafts", packed_layout(SMALL), 1, number=4)
    assert [staging for staging, _, _ in areas] == [True]
    return peer, peer.fds[0], peer.fds[1]


def failed(result: int) -> None:
    """Raises what a call of C said."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _write(fd: int) -> None:
    os.pwrite(fd, b"\xff" * 4096, 0)


def _map(fd: int) -> None:
    mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE).close()


def _protect(fd: int) -> None:
    base = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        failed(libc.mprotect(base, 4096, mmap.PROT_READ | mmap.PROT_WRITE))
    finally:
        libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(4096))


def _remove(fd: int) -> None:
    base = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        failed(libc.madvise(base, 4096, MADV_REMOVE))
    finally:
        libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(4096))


def _anew(then: Callable[[int], None]) -> Callable[[int], None]:
    def opened(fd: int) -> None:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            then(again)
        finally:
            os.close(again)

    return opened


def _seal(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, F_ADD_SEALS, SEAL_WRITE)


SIZES: dict[str, Callable[[int], None]] = {
    "shrink": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, os.fstat(fd).st_size + 4096),
    "seal": _seal,
}
WRITES: dict[str, Callable[[int], None]] = {
    "write": _write,
    "map": _map,
    "protect": _protect,
    "remove": _remove,
    "punch a hole": lambda fd: failed(libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096)),
    "zero": lambda fd: failed(libc.fallocate(fd, ZERO_RANGE, 0, 4096)),
    "open anew and write": _anew(_write),
    "open anew and map": _anew(_map),
}


def test_a_client_can_change_nothing_that_others_read(shared: Daemon) -> None:
    with connect(shared) as client:
        save(client, TOKENS).wait()
        peer, arena, _ = lent(shared)
        with peer:
            for name, attempt in {**WRITES, **SIZES}.items():
                with pytest.raises(OSError) as raised:
                    attempt(arena)
                assert not isinstance(raised.value, FileNotFoundError), name
        assert load_all(client, [*TOKENS, 0]) == 320


def test_the_attempts_would_work_where_they_may(shared: Daemon) -> None:
    """The negative control: on the client's own staging area they do, but for its size."""
    with connect(shared) as client:
        save(client, TOKENS).wait()
    peer, _, area = lent(shared)
    with peer:
        for name, attempt in WRITES.items():
            if name not in ("protect", "remove", "zero"):
                attempt(area)
        with memoryview(mmap.mmap(area, 4096)) as view:
            assert bytes(view[:4]) == b"\xff" * 4 or bytes(view[:4]) == bytes(4)
        for attempt in SIZES.values():
            with pytest.raises(OSError):
                attempt(area)


def test_the_page_that_says_whether_a_session_lives_is_the_daemons(shared: Daemon) -> None:
    with Peer(shared.socket, greet=False) as peer:
        peer.send(framed(["hello", 1, None]))
        peer.read()
        events, page = peer.fds
        assert os.fstat(page).st_size == mmap.PAGESIZE and events != page
        for attempt in {**WRITES, **SIZES}.values():
            with pytest.raises(OSError):
                attempt(page)


def test_memory_of_another_tenant_is_never_handed_out(shared: Daemon) -> None:
    """Whatever numbers are guessed: of matches, loads, drafts, arenas."""
    with connect(shared, "a") as one:
        save(one, TOKENS).wait()
        a, arena, area = lent(shared, "a")
        theirs = {os.fstat(fd).st_ino for fd in (arena, area)}
        with a, Peer(shared.socket, "this is the token of b") as b:
            number = 0
            for guess in range(1, 300):
                for verb, *arguments in (("load", guess), ("sums", guess), ("retain", guess, 9.0), ("unpin", guess)):
                    number += 1
                    b.ask(verb, *arguments, number=number)
                assert b.events is not None
                b.events.sendall(framed([[[guess, 0]], [guess], [guess], 0.0], 0, kvstore.daemon.wire.Kind.EVENT))
            b.ask("drafts", packed_layout(SMALL), 3, number=number + 1)
            assert not theirs & {os.fstat(fd).st_ino for fd in b.fds}
            assert a.ask("sums", 1, number=9)[0], "what the other one holds was let go"
        assert load_all(one, [*TOKENS, 0]) == 320


def test_another_tenants_blocks_are_neither_found_nor_forgotten_nor_told_of(shared: Daemon) -> None:
    with connect(shared, "a") as a, connect(shared, "b") as b:
        save(a, TOKENS).wait()
        before, seen = a.stats(), b.stats()
        match = found(b, TOKENS)
        assert (match.tokens, match.miss.kind) == (0, "empty"), "it learns that others have something"
        assert b.forget(older_than=0).blocks == 0 and b.segments() == [] and b.recall("note") is None
        a.remember("note", "a's")
        assert b.recall("note") is None
        assert a.stats()["counters"] == before["counters"]
        assert b.stats()["tiers"] == seen["tiers"] and b.stats()["leases"] == 0
        assert load_all(a, [*TOKENS, 0]) == 320


def test_only_the_operator_sees_all_tenants(shared: Daemon) -> None:
    with (
        Operator(shared.socket, PATIENCE) as operator,
        Operator(shared.socket, PATIENCE, "this is the token of b") as b,
    ):
        assert sorted(row["tenant"] for row in operator.quotas()) == ["", "a", "b"]
        assert [row["tenant"] for row in b.quotas()] == ["b"]
        about = b.about()
        assert (about.tenant, about.operator, about.settings) == ("b", False, {})
        assert [session["own"] for session in about.sessions] == [True]
        with pytest.raises(kvstore.BadInput):
            b.resize("a", 1 << 20, 1.0)


@pytest.mark.parametrize(
    "token", ["this is the token of c", "", "this is the token of ", "this is the token of a\0", "a" * 4000]
)
def test_a_token_that_is_nobodys_is_refused(shared: Daemon, token: str) -> None:
    with Peer(shared.socket, greet=False) as peer:
        peer.send(framed(["hello", 1, token]))
        _, _, said = peer.read()
        assert said[0] == "BadInput" and peer.fds == []
        assert not peer.answered()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_tenant_is_whom_the_system_says(tmp_path: Path) -> None:
    """By uid: somebody else's process is that tenant, says what it will, and not the operator."""
    (tmp_path / "kvstore.toml").write_text('socket_mode = "666"\n[tenants.guest]\nuids = [65534]\n')
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    flags = "--config", tmp_path / "kvstore.toml", "--host", "64MiB"
    with daemon(tmp_path, *flags) as started, started.connect() as client:
        save(client, TOKENS).wait()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.setresuid(65534, 65534, 65534)
                with Operator(started.socket, PATIENCE) as guest:
                    about = guest.about()
                    seen = (about.tenant, about.operator, found(guest, TOKENS).tokens)
                    code = 0 if seen == ("guest", False, 0) else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def hits(stats: dict[str, Any]) -> dict[str, Any]:
    """Counters that a hit changes."""
    return {name: value for name, value in stats["counters"].items() if "matched" in name or "hit" in name}


def test_a_thousand_salts_find_their_own_and_nobody_elses(place: Path) -> None:
    """In memory, then, by another daemon, on disk."""
    tokens = ids(5, 16)
    spaces = [namespace(f"salt {number}") for number in range(1000)]
    flags = "--dir", place / "cache", "--host", "64MiB", "--disk", "256MiB"
    for tier in ("host", "disk"):
        with daemon(place, *flags) as started, started.connect() as client:
            if tier == "host":
                for space in spaces[::2]:
                    assert save(client, tokens, space).tokens == 16
                client.flush()
            match = found(client, tokens, spaces[0])
            assert match.tiers == [tier]
            match.release()
            before = hits(client.stats())
            assert before
            for space in spaces[1::2]:
                other = found(client, tokens, space)
                assert (other.tokens, other.blocks) == (0, [])
            assert hits(client.stats()) == before, "a foreign probe counts as a hit"
            for space in spaces[::2]:
                assert load_all(client, [*tokens, 0], space) == 16
            assert hits(client.stats()) != before
