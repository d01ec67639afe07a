"""Settings that are wrong: each in one sentence that says where, what, and what was meant; secrets in none."""

import re
from pathlib import Path

import pytest
from sentences import PASSWORD, file, refused

from kvstore.errors import BadInput
from kvstore.settings import load


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("host", ["4GiX", "", True, -1, "0", [], 1.5], ""),
        ("host", ["1000KiB", 4096], "at least 1MiB"),
        ("disk", ["1MiB"], "at least 4MiB"),
        ("staging", ["25", "0%", "101%", "-1%", "quarter", True, 0.25], ""),
        ("socket", ["", "a\0b", 5, "\udcff"], "is no path"),
        ("socket_mode", ["0644", "600x", 600, 400, True, "0777", [384], 1.5], '"0600" (for its user)'),
        ("socket_group", ["", " ", "a b", True, -1, 2**33, ["a"]], "is no group"),
        ("allow_uids", ["root", [-1], [2**32], [True], ["1.5"], [None], {"a": 1}, 1.5], "id -u NAME"),
        ("lease_ttl", ["0s", 0, "0"], "more than nothing"),
        (
            "drain",
            ["20 parsecs", -1, "-1s", True, float("nan"), float("inf"), "1e3", "9" * 400, 10**400],
            "2m",
        ),
        ("http", ["0.0.0.0:9410", "[::]:9410", "10.0.0.1:80", "example.org:80"], "loopback address"),
        (
            "http",
            ["9410", 9410, ":9410", "127.0.0.1", "127.0.0.1:65536", "[1.2.3]:5", "a b:1", "::1:80", True],
            '"off"',
        ),
        ("health", ["0.0.0.0", "-x:1", "0.0.0.0:-1", ["0.0.0.0:1"]], "no address"),
        ("max_sessions", [0, -1, 65537, "many", 1.5, True, "1_0", "٣"], "from 1 to 65536"),
        ("max_frame", ["1KiB"], "at least 64KiB"),
        ("max_frame", ["2GiB"], "at most 1GiB"),
        ("log_level", ["warnign"], "did you mean warning?"),
        ("log_level", ["verbose", 3, True, []], "choose debug, info, warning or error"),
        ("log_format", ["jsno"], "did you mean json?"),
        (
            "redis.url",
            ["", "localhost:6379", "redis://", 6379, True, [], f"redis:/{PASSWORD}"],
            '"redis://HOST:6379/0"',
        ),
        ("redis.url", [f"redi://:{PASSWORD}@h"], "did you mean redis://?"),
        ("redis.url", [f"http://u:{PASSWORD}@h"], "no scheme that is known"),
        ("redis.prefix", ["", "a*", "a b", "{a}", 5, "x" * 65], "is no prefix"),
        ("redis.ttl", ["soon"], "is not a duration"),
        ("redis.ttl", ["3651d"], "at most 3650d"),
        ("redis.timeout", [61, "2m"], "at most 1m"),
        ("drain", ["25h"], "at most 1d"),
        ("redis.budget", ["none", "1KiB"], ""),
        ("tenants.a.host", ["off", "1KiB"], ""),
        ("tenants.a.uids", ["all"], "is no list of uids"),
    ],
)
def test_bad_values(name: str, values: list[object], words: str) -> None:
    for value in values:
        (sentence,) = refused(None, {name: value})
        assert sentence.startswith(f"--{name.replace('_', '-')}: {name}") and words in sentence, (value, sentence)
        if isinstance(value, str) and "\0" not in value and value.isprintable():
            (sentence,) = refused(None, {}, {"KVSTORE_" + name.upper().replace(".", "__"): value})
            assert sentence.startswith("KVSTORE_") and words in sentence


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('# one\nhots = "1GiB"\n', ["line 2: hots is no setting; did you mean host?"]),
        ("[redis]\n\nurl = 'off'\ntl = 5\n", ["line 4: redis.tl is no setting; did you mean redis.ttl?"]),
        ("redis = {ttl = 5, prefx = 'a'}\n", ["line 1: redis.prefx is no setting; did you mean redis.prefix?"]),
        ("redis_url = 'a'\n", ["line 1: redis_url is no setting; did you mean redis.url?"]),
        ("ttl = 5\n", ["line 1: ttl is no setting; did you mean redis.ttl?"]),
        ("lease-ttl = 5\n", ["line 1: lease-ttl is no setting; did you mean lease_ttl?"]),
        ("[tenant.a]\nhost = 5\n", ["line 1: tenant is no setting; did you mean tenants?"]),
        ("[tenants.a]\nuid = 5\n", ["line 2: tenants.a.uid is no setting; did you mean tenants.a.uids?"]),
        (
            "[tenants.'a.b']\nuids = 5\nuidz = 5",
            ['line 3: tenants."a.b".uidz is no setting; did you mean tenants."a.b".uids?'],
        ),
        ("[tcp]\nqqqqqqq = 5\n", ["line 2: tcp.qqqqqqq is no setting; there are listen, certificate, private_key"]),
        ('"\\u001b[31m" = 5\n', ['line 1: "\\u001b[31m" is no setting; there are dir, host, ']),
        ("tcp = 5\n", ["line 1: tcp is a table of settings, and no setting itself"]),
        ("tenants = [1]\n", ["line 1: tenants is a table of settings, and no setting itself"]),
        ("[tenants]\na = 5\n", ["line 2: tenants.a is a table of settings, and no setting itself"]),
        ("[[redis]]\nurl = 5\n", ["line 2: redis.url is no URL"]),
        ("allow_uids = [\n1,\n'x',\n]\nhost = 0\n", ["line 1: allow_uids=[1, 'x']", "line 5: host=0"]),
        ('dir = """\na\n\n"""\ndrain = -1\n', ["line 5: drain=-1"]),
        ("_env_file = 'x'\n", ["line 1: _env_file is no setting"]),
        ("a = 1\na = 2\n", ["line 2: Cannot overwrite a value"]),
        ("host = \n", ["line 1: Invalid value"]),
        ("host = 'x", ["line 1: Expected"]),
        ("x = " + "[" * 5000, [" is nested too deeply"]),
    ],
)
def test_lines_of_toml(text: str, sentences: list[str], tmp_path: Path) -> None:
    path = file(tmp_path, text)
    found = refused(path)
    assert len(found) == len(sentences)
    for sentence, expected in zip(found, sentences, strict=True):
        assert sentence.removeprefix(f"{path}").removeprefix(", ").startswith(expected), sentence


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("host: 1GiB\nredis:\n  ttl: 1h\n  tll: 2h\n", ["line 4: redis.tll is no setting; did you mean redis.ttl?"]),
        ("host: 0\ntenants:\n  a: {uids: x}\n", ["line 1: host=0", "line 3: tenants.a.uids='x'"]),
        ("host: 1GiB\nhost: 2GiB\n", ["line 2: host is on line 1 already"]),
        ("a: &x 1\nb: *x\n", ["line 2: aliases have no place"]),
        ("host: !!python/object:os.system ls\n", ["line 1: tags have no place"]),
        ("tenants:\n  5: {uids: 1}\n", ["line 2: a key must be text; put it in quotes"]),
        ("- host\n", ["line 1: settings are written as `key: value`"]),
        ("host: [1\n", ["line 2: expected"]),
        ("drain: 2024-02-31\n", [" holds a value that is none: day is out of range"]),
        ("drain: 2024-02-28\n", ["line 1: drain=datetime.date(2024, 2, 28) is not a duration"]),
        ("host: 1GiB\n---\ndisk: 1GiB\n", ["line 2: but found another document"]),
        ("host: \x07\n", [" unacceptable character #x0007"]),
        ("x: " + "[" * 1000 + "]" * 1000, [" is nested too deeply"]),
    ],
)
def test_lines_of_yaml(text: str, sentences: list[str], tmp_path: Path) -> None:
    path = file(tmp_path, text, "kvstore.yaml")
    found = refused(path)
    assert len(found) == len(sentences)
    for sentence, expected in zip(found, sentences, strict=True):
        assert sentence.removeprefix(f"{path}").removeprefix(", ").startswith(expected), sentence


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("kvstore.json", b"{}", "ends in .toml, .yaml or .yml"),
        ("kvstore.toml", None, "cannot be read: No such file"),
        ("kvstore.toml", b"dir = '\xff'", "is not in UTF-8, see byte 7"),
        ("kvstore.toml", b"#" * ((256 << 10) + 1), "is too long"),
    ],
)
def test_files_that_are_none(name: str, data: bytes | None, words: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    (sentence,) = refused(tmp_path / name)
    assert sentence.startswith(str(tmp_path / name)) and words in sentence


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("KVSTORE_HOTS", "KVSTORE_HOST"),
        ("KVSTORE_REDIS_URL", "KVSTORE_REDIS__URL"),
        ("KVSTORE_REDDIS__URL", "KVSTORE_REDIS__URL"),
        ("KVSTORE_TENANT__A__UIDS", "KVSTORE_TENANTS__A__UIDS"),
        ("KVSTORE_TENANTS__A__UID", "KVSTORE_TENANTS__A__UIDS"),
        ("KVSTORE_HOST__X", "KVSTORE_HOST"),
    ],
)
def test_variables_that_nobody_reads(name: str, meant: str) -> None:
    assert refused(None, {}, {name: PASSWORD}) == [f"{name} is no setting; did you mean {meant}?"]


def test_variables_that_are_one_setting() -> None:
    (sentence,) = refused(None, {}, {"KVSTORE_REDIS": "redis://a", "KVSTORE_REDIS__URL": "redis://b"})
    assert sentence == "KVSTORE_REDIS and KVSTORE_REDIS__URL are the same setting; leave one of them out"


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    path = file(tmp_path, "hots = 1\ndrain = 'x'\n[tenants.a]\nuids = [1]\n[tenants.b]\nuids = [1]\n")
    found = refused(path, {"http": "0.0.0.0:1", "hostt": 1}, {"KVSTORE_ZZZ": "1", "KVSTORE_DISK": "?"})
    places = [
        f"{path}, line 1",
        f"{path}, line 2",
        f"{path}, line 6",
        "--http",
        "--hostt",
        "KVSTORE_ZZZ",
        "KVSTORE_DISK",
    ]
    assert sorted(re.split(r": | is no", sentence)[0] for sentence in found) == sorted(places)


def test_what_failed_is_not_missed_beside_something_else() -> None:
    """A certificate whose path is wrong is not one that was not given."""
    assert (
        len(refused(None, {"tcp.listen": "0.0.0.0:1", "tcp.certificate": "", "tcp.private_key": 5, "tenants": 1})) == 3
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"tcp.listen": "0.0.0.0:1"}, ["set tcp.certificate", "set tcp.private_key", "a tenant with a token_file"]),
        ({"tenants.a.uids": [1, 2], "tenants.b.uids": [2]}, ["uid 2 is tenant a and tenant b"]),
        ({"tenants.a.host": "1GiB"}, ["nobody can be tenant a"]),
        ({"tenants": {"A": {"uids": 1}}}, ["'A' is no name for a tenant"]),
        (
            {"tenants": {"": {"uids": 1}, "..": {"uids": 2}, "a/b": {"uids": 3}, "x" * 65: {"uids": 4}}},
            ["is no name"] * 4,
        ),
        ({"host": "2GiB", "tenants.a.uids": 1, "tenants.a.host": "2GiB"}, ["host is what all tenants have together"]),
        ({"disk": "4MiB", "tenants.a.uids": 1}, ["disk is what all tenants have together"]),
        ({"host": "1MiB", "staging": "2MiB"}, ["cannot be more than host"]),
        ({"http": "127.0.0.1:1", "health": "127.0.0.1:1"}, ["health and http are both 127.0.0.1:1"]),
        ({"socket": "/" + "x" * 98}, ["has 99 bytes, and the path of a socket at most 98"]),
        ({"dir": "/" + "é" * 42 + "x"}, ["has 99 bytes, and the path of a socket at most 98"]),
        ({"encryption.key_dir": "/dev/null"}, ["/dev/null is no folder"]),
        ({"redis.key_file": "/dev/null"}, ["/dev/null is no plain file"]),
        ({"redis.key_file": "/nowhere/key"}, ["cannot read /nowhere/key: No such file"]),
    ],
)
def test_what_does_not_go_together(flags: dict[str, object], words: list[str]) -> None:
    found = refused(None, flags)
    assert len(found) == len(words), found
    for sentence, expected in zip(found, words, strict=True):
        assert expected in sentence and sentence.startswith("--")


@pytest.mark.parametrize(
    "flags",
    [
        {"socket": "/" + "x" * 97},
        {"host": "2MiB", "tenants.a.uids": 1, "staging": "2MiB"},
        {"http": "127.0.0.1:0", "health": "127.0.0.1:0"},
        {"tenants": {"a-b_c.1": {"uids": 1}}},
    ],
)
def test_what_does_just_go_together(flags: dict[str, object]) -> None:
    load(None, flags, {}, serve=False)


def test_a_daemon_must_be_found() -> None:
    for flags, environ in (({"dir": "x"}, {}), ({"socket": "x"}, {}), ({}, {"LISTEN_FDS": "1"})):
        load(None, flags, environ)
    with pytest.raises(BadInput, match="give --dir DIR or --socket PATH"):
        load(None, {}, {})
