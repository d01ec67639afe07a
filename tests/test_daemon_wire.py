"""Hostile and broken peers: the daemon lives, its memory stays what it was, others notice nothing."""

from __future__ import annotations

import io
import os
import pickle
import random
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from blocks import NS, SMALL, ids, load_all, recount, save
from daemons import PATIENCE, Daemon, daemon, until
from hosted import hosted
from mutations import Frames, framed
from peers import Peer, bombs, poured
from processes import MIB, descriptors, idle, memory

import kvstore
from kvstore.daemon import server
from kvstore.daemon.packed import pack_namespace, packed_layout

GROWTH = 16 * MIB
TOKENS = ids(77, 400)


class Neighbour:
    """A client of another tenant that loads, and checks, all the while."""

    def __init__(self, url: str) -> None:
        self.client = kvstore.connect(url, timeout=PATIENCE)
        save(self.client, TOKENS).wait()
        self._session = self.client._caller._connection
        self.loads, self.faults = 0, list[str]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                good = load_all(self.client, [*TOKENS, 0])
            except (AssertionError, kvstore.KVStoreError) as error:
                self.faults.append(str(error))
                return
            if good != len(TOKENS):
                self.faults.append(f"{good} tokens came")
            self.loads += 1
            self._over.wait(0.01)

    def ended(self) -> list[str]:
        """What went wrong."""
        self._over.set()
        self._thread.join()
        if self.client._caller._connection is not self._session:
            self.faults.append("its session was lost")
        self.client.close()
        return self.faults


@pytest.fixture
def two_tenants(tmp_path: Path) -> Iterator[tuple[Daemon, str]]:
    """A daemon, and the token of a tenant that nobody else is."""
    token, config = "the token of the tenant t", tmp_path / "kvstore.toml"
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o600)
    config.write_text(f'[tenants.t]\ntoken_file = "{tmp_path / "token"}"\nhost = "24MiB"\n')
    with daemon(tmp_path, "--config", config, "--host", "64MiB", "--dir", tmp_path / "cache") as started:
        yield started, token


def flooded(started: Daemon, token: str, seed: int, frames: int, rounds: int) -> int:
    """Pours frames in beside a neighbour; how many loads that one checked meanwhile."""
    idle(started.pid)
    neighbour = Neighbour(started.url)
    poured(started.socket, token, Frames(seed), 2000)  # threads and caches are there now
    before = memory(started.pid)
    for number in range(rounds):
        poured(started.socket, token, Frames(seed + number), frames)
        assert started.process.poll() is None, started.log.read_text()[-2000:]
    assert neighbour.ended() == []
    until(lambda: not descriptors(started.pid)["/memfd:kvstore-session"], "sessions are left")
    grown = memory(started.pid) - before
    assert grown <= GROWTH, f"{grown / MIB:.1f} MiB more than before"
    print(f"{frames * rounds} frames, {grown / MIB:.1f} MiB grown, {neighbour.loads} loads beside them")
    return neighbour.loads


def test_twenty_thousand_frames_that_are_not_quite_right(two_tenants: tuple[Daemon, str], seed: int) -> None:
    assert flooded(*two_tenants, seed, frames=20_000, rounds=1) > 50


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_five_million_frames_that_are_not_quite_right(two_tenants: tuple[Daemon, str], seed: int) -> None:
    assert flooded(*two_tenants, seed, frames=50_000, rounds=100) > 1000


def test_what_cannot_be_served_is_refused_and_no_request_fails(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """``BadInput``, never a traceback; and the store is whole afterwards."""
    with hosted(tmp_path / "cache", host=8 * MIB, staging=4 * MIB) as here:
        poured(here.path, None, Frames(seed), 5000)
        assert [record.getMessage() for record in caplog.records if record.exc_info] == []
        until(lambda: not here.server.sessions)
        assert here.store.flush(PATIENCE) and recount(here.store) == [] and here.store.verify() == []


def test_a_request_that_fails_is_noticed(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: an argument that is not looked at."""
    monkeypatch.setattr(server, "checked", lambda values, kinds: values)
    with hosted(host=8 * MIB, staging=4 * MIB) as here:
        poured(here.path, None, Frames(seed), 500)
    assert any(record.exc_info for record in caplog.records)


def test_little_that_would_take_much(two_tenants: tuple[Daemon, str]) -> None:
    started, _ = two_tenants
    idle(started.pid)
    neighbour, before = Neighbour(started.url), memory(started.pid, "VmHWM")
    for name, body in bombs():
        for greet in (False, True):
            with Peer(started.socket, greet=greet) as peer:
                peer.send(framed(body))
                assert peer.over(), name
    assert neighbour.ended() == []
    assert memory(started.pid, "VmHWM") - before <= GROWTH


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def corpus(canary: Path) -> list[bytes]:
    """What other programs would run, or unpack to much."""
    pickles = [pickle.dumps(Canary(canary), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    shape = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + "\n"
    arrays = [b"\x93NUMPY\x01\x00" + len(shape).to_bytes(2, "little") + shape.encode() + each for each in pickles]
    zipped, packed = io.BytesIO(), zlib.compress(bytes(50 * MIB), 9)
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", pickles[-1] + bytes(10 * MIB))
    return [*pickles, *arrays, zipped.getvalue(), packed, b"!!python/object/apply:os.system [true]"]


def test_nothing_that_is_sent_is_run(two_tenants: tuple[Daemon, str], tmp_path: Path, seed: int) -> None:
    canary, draw = tmp_path / "canary", random.Random(seed)
    os.close(pickle.loads(pickle.dumps(Canary(canary))))
    assert canary.exists(), "the canary does not sing"
    canary.unlink()
    started, token = two_tenants
    space, layout = pack_namespace(NS), packed_layout(SMALL)
    idle(started.pid)
    every, before, peer = corpus(canary), memory(started.pid, "VmHWM"), Peer(started.socket, token)
    for number in range(1000):
        data = draw.choice(every)
        text = data.decode("latin-1")
        request = draw.choice(
            (
                data,
                ["match", data, layout, data, None, 0, False],
                ["match", space, data, data, data, 0, False],
                ["save", space, layout, data + bytes(-len(data) % 4), [[0, 1, False]], None, "", None, "", "pre", None],
                ["save", space, layout, bytes(4), [], None, "", None, "", "pre", [data, number, text]],
                ["remember", "note", text],
                ["schedule", [data, [0, None, data, data, data, None, 0, None, 0, None]]],
                msgpack.ExtType(1, data),
            )
        )
        peer.send(framed(request, number + 1) if number % 5 else data)
        if not number % 5 or not peer.answered():
            peer.close()
            peer = Peer(started.socket, token)
    peer.close()
    assert started.process.poll() is None and not canary.exists()
    assert memory(started.pid, "VmHWM") - before <= 3 * GROWTH
