"""Settings: which source has the last word, what values mean, and that what is printed says the same."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.settings import Address, Settings, as_toml, explain, json_schema, load

GIB = 1 << 30
FILES = ("", "", "")  # secret files are made for these
# Of each setting, values as one writes them in a file, in the environment, and as a flag.
WRITTEN: dict[str, tuple[object, ...]] = {
    "dir": ("a", "b", "c"),
    "host": ("1GiB", "2GiB", 3 * GIB),
    "disk": ("1GiB", "2GiB", 3 * GIB),
    "staging": ("10%", "20%", "64MiB"),
    "socket": ("a", "b", "c"),
    "socket_mode": ("0600", "0660", "666"),
    "socket_group": ("users", "staff", 100),
    "allow_uids": ([1], "2,3", [4]),
    "lease_ttl": ("1s", "2s", 3),
    "drain": ("1m", "500ms", 0),
    "http": ("127.0.0.1:1", "[::1]:2", "off"),
    "health": ("0.0.0.0:1", "[::]:2", "off"),
    "max_sessions": (1, "2", 3),
    "max_frame": ("1MiB", "2MiB", "3MiB"),
    "log_level": ("debug", "WARNING", "error"),
    "log_format": ("json", "text", "json"),
    "redis.url": ("redis://a", "rediss://b/1", "off"),
    "redis.prefix": ("a", "b", "c"),
    "redis.ttl": ("1h", "2h", "3d"),
    "redis.budget": ("1GiB", "2GiB", "off"),
    "redis.lookup": ("1ms", "2ms", 0.003),
    "redis.timeout": ("1s", "2s", "3s"),
    "redis.key_file": FILES,
    "encryption.key_dir": ("a", "b", "c"),
    "tcp.listen": ("127.0.0.1:1", "127.0.0.1:2", "off"),
    "tcp.certificate": FILES,
    "tcp.private_key": FILES,
    "tenants.t.uids": ([1], "2", [3]),
    "tenants.t.token_file": FILES,
    "tenants.t.host": ("1MiB", "2MiB", "3MiB"),
    "tenants.t.disk": ("4MiB", "5MiB", "6MiB"),
}


def variable(name: str) -> str:
    return "KVSTORE_" + name.upper().replace(".", "__")


def read(found: Settings, name: str) -> Any:
    value: Any = found
    for key in name.split("."):
        value = value[key] if isinstance(value, Mapping) else getattr(value, key)
    return value


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def in_yaml(folder: Path, **values: object) -> Path:
    """A file with a tenant and a certificate, so that nothing is missing beside what is tested."""
    pem = str(secret(folder / "pem", "x" * 20))
    told: dict[str, Any] = {"tcp": {"certificate": pem, "private_key": pem}, "tenants": {"t": {"token_file": pem}}}
    for name, value in values.items():
        table = told
        for key in name.split(".")[:-1]:
            table = table.setdefault(key, {})
        table[name.split(".")[-1]] = value
    return secret(folder / "kvstore.yaml", yaml.safe_dump(told))


def test_every_setting_is_in_the_tests() -> None:
    assert [row.name for row in explain(Settings())] == [name.replace(".t.", ".NAME.") for name in WRITTEN]


@pytest.mark.parametrize("name", WRITTEN)
def test_flags_go_over_the_environment_and_that_over_the_file(name: str, tmp_path: Path) -> None:
    written = WRITTEN[name]
    if written is FILES:
        written = tuple(str(secret(tmp_path / f"{number}", f"a secret of one's own {number}")) for number in range(3))
    meant = [read(load(in_yaml(tmp_path, **{name: value}), {}, {}, serve=False), name) for value in written]
    assert meant[0] != meant[1] != meant[2]
    environ, flags = {variable(name): str(written[1]), "HOME": "/"}, {name: written[2], "unasked": None}
    file = in_yaml(tmp_path, **{name: written[0]})
    for place, said, variables, value in (
        (f"{file}, line ", {}, {}, meant[0]),
        (variable(name), {}, environ, meant[1]),
        ("--" + name.replace("_", "-"), flags, environ, meant[2]),
    ):
        found = load(file, said, variables, serve=False)
        assert read(found, name) == value
        assert next(row.origin for row in explain(found) if row.name == name).startswith(place)


def test_what_nobody_sets_has_its_default() -> None:
    found = load(None, {}, {}, serve=False)
    assert found == Settings() and {row.origin for row in explain(found)} == {"default"}
    assert (found.host, found.disk, found.staging_bytes) == (4 * GIB, 64 * GIB, GIB)
    assert (found.lease_ttl, found.drain, found.socket_mode) == (10.0, 20.0, 0o600)
    assert {found.http, found.health, found.redis.url, found.tcp.listen, found.socket_path} == {None}


def test_tables_are_merged_and_lists_are_not(tmp_path: Path) -> None:
    file = in_yaml(tmp_path, **{"redis.url": "redis://a", "redis.ttl": "1h", "tenants.a.uids": [1, 2]})
    found = load(
        file, {"redis": "redis://b"}, {"KVSTORE_TENANTS__A__UIDS": "7", "KVSTORE_REDIS__PREFIX": "p"}, serve=False
    )
    assert found.redis.url and found.redis.url.get_secret_value() == "redis://b"
    assert (found.redis.ttl, found.redis.prefix, found.tenants["a"].uids) == (3600.0, "p", (7,))
    assert set(found.tenants) == {"a", "t"}


@pytest.mark.parametrize("given", [{"redis": "redis://h"}, {"redis.url": "redis://h"}, {"redis": {"url": "redis://h"}}])
def test_a_redis_is_its_url(given: dict[str, object], tmp_path: Path) -> None:
    for found in (
        load(None, given, {}, serve=False),
        load(None, {}, {"KVSTORE_REDIS": "redis://h"}, serve=False),
        load(in_yaml(tmp_path, redis="redis://h"), {}, {}, serve=False),
    ):
        assert found.redis.url and found.redis.url.get_secret_value() == "redis://h"


@pytest.mark.parametrize(
    ("text", "value"),
    [("20s", 20.0), ("500ms", 0.5), ("2m", 120.0), ("2 min", 120.0), ("1.5h", 5400.0), ("7d", 604800.0), ("3", 3.0)],
)
def test_durations(text: str, value: float) -> None:
    assert load(None, {}, {"KVSTORE_REDIS__TTL": text}, serve=False).redis.ttl == value


def test_yaml_words_mean_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.yml"
    path.write_text("http: off\nredis: off\nsocket_mode: 0660\nallow_uids: 5\ndir:\nsocket_group: 100\n")
    found = load(path, {}, {}, serve=False)
    assert {found.http, found.redis.url, found.dir} == {None}
    assert (found.socket_mode, found.allow_uids, found.socket_group) == (0o660, (5,), 100)


def test_toml_modes_in_octal(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_text('socket_mode = 0o666\nhealth = "localhost:0"\n')
    found = load(path, {}, {}, serve=False)
    assert (found.socket_mode, found.health) == (0o666, Address("localhost", 0))


def test_what_tenants_do_not_want_is_shared_by_the_rest() -> None:
    told: dict[str, object] = {"host": "8GiB", "disk": "10GiB", "tenants.a.host": "4GiB", "tenants.b.uids": [2]}
    found = load(None, told | {"tenants.a.uids": [1], "tenants.b.disk": "4GiB"}, {}, serve=False)
    assert {name: (one.host // GIB, one.disk // GIB) for name, one in found.budgets.items()} == {
        "": (2, 3),
        "a": (4, 3),
        "b": (2, 4),
    }


def test_variables_of_other_makes_are_not_ours() -> None:
    """Kubernetes tells every pod of a Service that is called kvstore."""
    links = "SERVICE_HOST SERVICE_PORT SERVICE_PORT_HTTP PORT PORT_9410_TCP PORT_9410_TCP_ADDR METRICS_SERVICE_HOST"
    environ = {f"KVSTORE_{name}": "tcp://10.0.0.1:9410" for name in links.split()}
    assert load(None, {}, environ | {"KVSTOREHOST": "1", "kvstore_host": "1"}, serve=False) == Settings()


def test_settings_do_not_change() -> None:
    found = load(None, {"tenants.a.uids": [1]}, {}, serve=False)
    for table, name in ((found, "host"), (found.redis, "ttl"), (found.tenants["a"], "host")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(table, name, 1)
    with pytest.raises(TypeError):
        found.tenants["b"] = found.tenants["a"]  # type: ignore[index]


words = st.text("aé~'\"\\\n\t\x7f\x9b #[]/.=", min_size=1, max_size=8).map("./{}".format)
sizes = st.one_of(st.integers(1 << 20, 1 << 45), st.integers(1, 1 << 20).map(lambda count: count << 20))
lengths = st.one_of(st.floats(1e-6, 86400), st.integers(1, 86400), st.sampled_from(["1ms", "90m", "23h", "1d"]))
ports = st.integers(1, 9999).map(str)


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "dir": words,
            "socket": words,
            "disk": sizes.map(lambda size: size + (64 << 20)),
            "staging": st.one_of(
                st.integers(1, 100).map("{}%".format), st.decimals("0.01", 100, places=4).map("{}%".format)
            ),
            "socket_mode": st.sampled_from(["0600", "660", 0o666]),
            "socket_group": st.sampled_from(["users", "a.b-c", 100]),
            "allow_uids": st.lists(st.integers(0, 2**32 - 2)),
            "lease_ttl": lengths,
            "drain": st.one_of(lengths, st.just(0)),
            "http": st.one_of(st.just("off"), ports.map("[::1]:{}".format)),
            "health": st.one_of(st.just("off"), ports.map("host.name:1{}".format)),
            "max_sessions": st.integers(1, 65536),
            "max_frame": st.integers(64 << 10, 1 << 30),
            "log_level": st.sampled_from(["debug", "info", "warning", "error"]),
            "redis.url": st.sampled_from(
                ["off", "redis://h:1/0", "rediss://h?ssl_ca_certs=/x%20y", "unix:///run/r.sock"]
            ),
            "redis.ttl": lengths,
            "redis.budget": st.one_of(st.just("off"), sizes),
            "encryption.key_dir": words.map("/nowhere/{}".format),
            "tenants": st.dictionaries(
                st.from_regex(r"[a-z0-9_.-]{0,6}[a-z]", fullmatch=True),
                st.fixed_dictionaries({}, optional={"host": st.integers(1 << 20, 1 << 22), "disk": st.just("4MiB")}),
                max_size=3,
            ).map(lambda named: {name: {**told, "uids": [uid]} for uid, (name, told) in enumerate(named.items())}),
        },
    )
)
def test_what_is_printed_loads_as_the_same(tmp_path_factory: pytest.TempPathFactory, told: dict[str, object]) -> None:
    found = load(None, told, {}, serve=False)
    text = as_toml(found)
    assert not [letter for letter in text if letter != "\n" and not letter.isprintable()]
    path = tmp_path_factory.getbasetemp() / "printed.toml"
    path.write_text(text)
    assert load(path, {}, {}, serve=False) == found
    assert as_toml(load(path, {}, {}, serve=False)) == text


def test_settings_that_differ_are_not_equal() -> None:
    assert load(None, {"tenants.a.uids": [1]}, {}, serve=False) != load(None, {"tenants.a.uids": [2]}, {}, serve=False)


def test_the_schema_knows_what_can_be_written() -> None:
    schema = json_schema()
    for table in (schema, *schema["$defs"].values()):
        assert table["additionalProperties"] is False
    assert [name for name, field in schema["properties"].items() if "$ref" in field or "anyOf" in field] == [
        "redis",
        "encryption",
        "tcp",
    ]
    assert schema["properties"]["host"]["default"] == "4GiB" and "integer" in schema["properties"]["host"]["type"]
    assert all(row.description for row in explain(Settings()))
    assert json.loads(json.dumps(schema)) == schema


def test_printed_settings_are_toml() -> None:
    assert tomllib.loads(as_toml(Settings()))["redis"]["ttl"] == "7d"
