"""Secrets come from files that nobody else can read, and go nowhere."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from sentences import PASSWORD, file, refused

from kvstore.settings import as_toml, explain, load, read_secret
from kvstore.settings.secret import too_open


@pytest.fixture
def secrets(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="secret", mode=0o600, text=PASSWORD: file(tmp_path, text, name, mode)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o601, 0o644])
@pytest.mark.parametrize("name", ["redis.key_file", "tenants.a.token_file", "tcp.private_key"])
def test_secret_files_that_others_can_read(name: str, mode: int, secrets: Callable[..., Path]) -> None:
    path = secrets(mode=mode)
    (sentence,) = refused(None, {name: str(path)})
    assert f"have access to {path} (mode {mode:04o}); chmod 600 {path}" in sentence
    path.chmod(0o400)
    load(None, {name: str(path)}, {}, serve=False)


def test_secrets_that_are_none(secrets: Callable[..., Path]) -> None:
    assert "must hold 16 bytes or more" in refused(None, {"redis.key_file": secrets(text="short\n")})[0]
    assert read_secret(secrets(text=PASSWORD + "\n"), "key") == PASSWORD.encode()


@pytest.mark.parametrize("token", [b"\xff" * 16, b"sixteen bytes and \x00"])
def test_tokens_that_no_client_could_send(token: bytes, secrets: Callable[..., Path]) -> None:
    path = secrets()
    path.write_bytes(token)
    (sentence,) = refused(None, {"tenants.a.token_file": str(path)})
    assert f"{path} holds no text" in sentence
    load(None, {"redis.key_file": str(path)}, {}, serve=False)


def test_tenants_with_one_token(secrets: Callable[..., Path]) -> None:
    a, b = str(secrets("a")), str(secrets("b"))
    (sentence,) = refused(None, {"tenants.a.token_file": a, "tenants.b.token_file": b})
    assert "tenants.b.token_file holds the same token as tenants.a.token_file" in sentence


def test_a_folder_of_keys_that_others_can_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    (sentence,) = refused(None, {"encryption.key_dir": str(tmp_path)})
    assert sentence.endswith(f"have access to {tmp_path} (mode 0750); chmod 700 {tmp_path}")
    tmp_path.chmod(0o700)
    load(None, {"encryption.key_dir": str(tmp_path)}, {}, serve=False)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{PASSWORD}@h/0",
        f"redis://user:{PASSWORD}@h",
        f"rediss://h?password={PASSWORD}",
        f"redis://:{PASSWORD}/x@h",
    ],
)
def test_passwords_are_never_shown(url: str, tmp_path: Path) -> None:
    path = file(tmp_path, f'redis = "{url}"\n')
    for found in (load(path, {}, {}, serve=False), load(None, {}, {"KVSTORE_REDIS__URL": url}, serve=False)):
        assert found.redis.url and found.redis.url.get_secret_value() == url
        assert "# url: (secret)\n" in as_toml(found)
        shown = [
            as_toml(found),
            repr(found),
            str(found),
            repr(explain(found)),
            repr(found.model_dump()),
            found.model_dump_json(),
        ]
        assert not [text for text in shown if PASSWORD in text]
        assert next(row.value for row in explain(found) if row.name == "redis.url") == "(secret)"
    path.chmod(0o644)
    (sentence,) = refused(path)
    assert sentence.startswith(f"{path}, line 1: redis.url is secret") and f"chmod 600 {path}" in sentence
    load(path, {}, {"KVSTORE_REDIS": "redis://elsewhere"}, serve=False)  # the file's does not count


def test_a_url_that_was_given_as_something_else() -> None:
    for name in (
        "http",
        "host",
        "socket_mode",
        "redis.prefix",
        "tenants.a.uids",
        "log_level",
        "unknown",
        "redis.password",
    ):
        refused(None, {name: f"redis://user:{PASSWORD}@h/0"})


@pytest.mark.parametrize(
    ("owner", "reader", "mode", "refused"),
    [
        (1000, 1000, 0o600, False),
        (1000, 1000, 0o640, True),
        (0, 1000, 0o440, False),  # as systemd's credentials and Kubernetes' secrets are
        (0, 1000, 0o640, False),
        (0, 1000, 0o660, True),
        (0, 1000, 0o444, True),
        (0, 0, 0o640, True),
        (1000, 0, 0o600, False),
        (1000, 0, 0o640, True),
    ],
)
def test_whose_secrets_a_group_may_read(
    owner: int, reader: int, mode: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: reader)
    found = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, 5, 20, 0, 0, 0))
    assert bool(too_open(Path("key"), "key_file", found)) is refused
