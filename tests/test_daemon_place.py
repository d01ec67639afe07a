"""Where a daemon is put: as a user that is nobody's, with no home, a read-only root, little /dev/shm and no locked
memory; started by a service manager that holds the socket and is told when it is ready; on a taken directory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from blocks import NS, WIDE, ids, load_all, save
from daemons import PATIENCE, TIMEOUT, Daemon, daemon, until

import kvstore
from kvstore.daemon.client import Client
from kvstore.store import Store

NOBODY = "31337"
TOKENS = ids(5, 200 * 32)  # 200 blocks of 768 KiB: more than /dev/shm has there
BARE = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount --bind "$1" "$1"
mount --bind / /mnt
mount -o remount,bind,ro /
cd "$1"
shift
touch /root/x 2>/dev/null && exit 3
exec prlimit --memlock=65536 setpriv --reuid=31337 --regid=31337 --clear-groups \
    --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search env -i PATH=/usr/bin:/bin "$@"
"""


def can_be_bare() -> bool:
    """Whether this machine lets a test make a room with a read-only root."""
    tools = ("unshare", "setpriv", "prlimit", "mount")
    if os.getuid() or not all(map(shutil.which, tools)):
        return False
    tried = subprocess.run(["unshare", "-m", "sh", "-c", "mount --make-rprivate / && mount --bind / /mnt"], check=False)
    return tried.returncode == 0


@pytest.mark.skipif(not can_be_bare(), reason="takes root, and a kernel that lets it make mount namespaces")
def test_it_serves_as_nobody_without_a_home_on_a_read_only_root(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    os.chown(room, int(NOBODY), int(NOBODY))
    socket_path = room / "cache" / "kvstore.sock"
    serve = [sys.executable, "-m", "kvstore.cli", "serve", "--dir", "cache", "--host", "400MiB", "--disk", "400MiB"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        command = ["unshare", "-m", "sh", "-c", BARE, "sh", str(room), *serve]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    bare = Daemon(process, socket_path, log)
    try:
        until(lambda: process.poll() is not None or answers(bare), "it does not serve")
        assert process.poll() is None, log.read_text()
        assert Path(f"/proc/{process.pid}/status").read_text().count(f"Uid:\t{NOBODY}\t") == 1
        with bare.connect() as store:
            assert save(store, TOKENS, layout=WIDE).wait(PATIENCE).tokens == len(TOKENS)
            assert load_all(store, TOKENS, layout=WIDE) == len(TOKENS) - 1
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, log.read_text()
    assert not socket_path.exists()


def answers(bare: Daemon) -> bool:
    try:
        bare.connect().close()
    except (kvstore.Unreachable, kvstore.BadInput):
        return False
    return True


def test_a_service_manager_passes_the_socket_and_is_told_when_it_is_ready(tmp_path: Path) -> None:
    place, ready = tmp_path / "passed.sock", tmp_path / "notify.sock"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        listener.bind(str(place))
        listener.listen()
        notified.bind(str(ready))
        notified.settimeout(PATIENCE)
        # As a manager does it: the number of the process is only known in it.
        script = "import os; os.environ['LISTEN_PID'] = str(os.getpid()); os.dup2(int(os.environ['PASSED']), 3); "
        script += "os.set_inheritable(3, True); os.execv(os.sys.executable, [os.sys.executable, '-m', 'kvstore.cli', "
        script += "'serve', '--host', '64MiB'])"
        environ = {**os.environ, "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(ready), "PASSED": str(listener.fileno())}
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=environ, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL
        )
        try:
            assert notified.recv(100) == b"READY=1"
            with kvstore.connect(place, timeout=TIMEOUT) as store:
                save(store, TOKENS[:64], layout=WIDE)
                assert load_all(store, TOKENS[:65], layout=WIDE) == 64
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
        assert notified.recv(100) == b"STOPPING=1"
        assert place.exists()  # it is the manager's


def test_who_opens_a_directory_that_is_served_gets_the_daemons_store(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dir", tmp_path / "cache") as served:
        with served.connect() as store:
            save(store, TOKENS[:64], layout=WIDE).wait(PATIENCE)
        with pytest.raises(kvstore.StoreBusy, match="in use by"):
            kvstore.open(tmp_path / "cache")
        with kvstore.open(tmp_path / "cache", on_busy="connect") as store:
            assert isinstance(store, Client)
            assert load_all(store, TOKENS[:65], layout=WIDE) == 64
    # And as soon as it is free, the same call opens it; the same tokens are there.
    with kvstore.open(tmp_path / "cache", on_busy="connect") as store:
        assert not isinstance(store, Client)
        assert load_all(store, TOKENS[:65], layout=WIDE) == 64


def test_a_directory_that_another_process_has_open_without_serving_it_says_so(tmp_path: Path) -> None:
    script = "import sys, kvstore; s = kvstore.open(sys.argv[1]); print('.', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b".\n"
        with pytest.raises(kvstore.Unreachable, match="kvstore serve"):
            kvstore.open(tmp_path / "cache", on_busy="connect")
        other.communicate()


def test_a_path_that_is_longer_than_an_address_can_be(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    place = tmp_path / "short.sock"
    with daemon(tmp_path, "--socket", place):
        os.symlink(place, deep / "kvstore.sock")
        with kvstore.connect(deep, timeout=TIMEOUT) as store:
            assert store.match(NS, WIDE, TOKENS[:64]).tokens == 0


def test_what_was_saved_just_before_the_client_closed_is_saved(tmp_path: Path) -> None:
    with daemon(tmp_path) as served:
        for n in range(8):
            chain = ids(100 + n, 20 * 32)
            with served.connect() as store:
                save(store, chain, layout=WIDE)
            with served.connect() as store:
                until(partial(is_saved, store, chain), "it was not saved")
                until(partial(nothing_held, store), "something is held")


def is_saved(store: Store, chain: list[int]) -> bool:
    return load_all(store, [*chain, 0], layout=WIDE) == len(chain)


def nothing_held(store: Store) -> bool:
    stats = store.stats()
    return not (stats["leases"] or stats["drafts"])
