"""``kvstore serve`` for other machines: only when it is told to, and only with TLS and a tenant's token."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from blocks import WIDE, found, ids, load_all, save
from commands import Command, command
from daemons import daemon
from hosted import TIMEOUT
from outside import Papers, papers

import kvstore
from kvstore import Unreachable

__all__ = ["command"]  # a fixture

TOKEN = "the token of tenant a"
CHAIN = ids(3, 10 * 32 + 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return papers(tmp_path_factory.mktemp("papers"))


def settings(folder: Path, made: Papers, port: int, **left_out: bool) -> list[object]:
    """Flags of a daemon that listens for other machines, or lacks something for that."""
    token = folder / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    lines = {
        "listen": f'listen = "127.0.0.1:{port}"',
        "certificate": f'certificate = "{made.certificate}"',
        "private_key": f'private_key = "{made.key}"',
        "token": f'[tenants.a]\ntoken_file = "{token}"',
    }
    text = "\n".join(line for name, line in lines.items() if name not in left_out)
    (folder / "kvstore.toml").write_text(f"[tcp]\n{text}\n")
    return ["--config", folder / "kvstore.toml", "--host", "64MiB"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def test_serve_listens_for_other_machines_when_it_is_told_to(made: Papers, tmp_path: Path) -> None:
    port = free_port()
    with daemon(tmp_path, *settings(tmp_path, made, port)) as started:
        with kvstore.connect(f"tls://127.0.0.1:{port}", token=TOKEN, ca=made.certificate, timeout=TIMEOUT) as store:
            assert save(store, CHAIN, layout=WIDE).tokens == len(CHAIN)
            assert load_all(store, CHAIN, layout=WIDE) == len(CHAIN) - 1
        with started.connect() as local:  # this user is no named tenant
            assert found(local, CHAIN, layout=WIDE).tokens == 0
    with daemon(tmp_path, *settings(tmp_path, made, port, listen=True)), pytest.raises(Unreachable):
        kvstore.connect(f"tls://127.0.0.1:{port}", token=TOKEN, ca=made.certificate, timeout=TIMEOUT)


@pytest.mark.parametrize("missing", ["certificate", "private_key", "token"])
def test_serve_does_not_listen_without_tls_and_a_token(
    command: Command, made: Papers, tmp_path: Path, missing: str
) -> None:
    said = command("serve", *settings(tmp_path, made, 1, **{missing: True}))
    assert said.code == 2 and missing in said.err


def test_serve_says_what_is_wrong_with_its_papers(command: Command, made: Papers, tmp_path: Path) -> None:
    other = papers(tmp_path / "other")
    said = command(
        "serve", *settings(tmp_path, Papers(made.certificate, other.key), free_port()), "--dir", tmp_path / "cache"
    )
    assert said.code == 2 and "tcp.certificate" in said.err
