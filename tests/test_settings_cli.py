"""``kvstore config``, and the files under examples/ that people start from."""

import configparser
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstore import cli
from kvstore.settings import Settings, explain, load

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `kvstore config …` in this process."""

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["kvstore", "config", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def test_what_it_prints_loads_as_the_same(config: Callable[..., Said], tmp_path: Path) -> None:
    said = config("--config", EXAMPLES / "kvstore.toml")
    assert (said.code, said.err) == (0, "")
    (tmp_path / "again.toml").write_text(said.out)
    assert load(tmp_path / "again.toml", {}, {}) == load(EXAMPLES / "kvstore.toml", {}, {})
    assert config("--config", tmp_path / "again.toml").out == said.out


def test_the_environment_counts(config: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_HOST", "5GiB")
    said = config()
    assert tomllib.loads(said.out)["host"] == "5GiB"
    assert said.code == 0 and "neither dir nor socket is set" in said.err


def test_it_explains_every_setting(config: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_REDIS__URL", "redis://:a-password@redis/0")
    path = EXAMPLES / "kvstore.yaml"
    said = config("--config", path, "--explain")
    assert said.code == 0 and "a-password" not in said.out + said.err
    lines = said.out.splitlines()
    for row in explain(load(path)):
        cells = next([cell.strip() for cell in line.split("│")] for line in lines if line.startswith(f"│ {row.name}  "))
        assert cells[1].startswith(f"{row.name}  {row.type}") and cells[2] == (row.value or "not set")
        assert cells[3] and row.origin.startswith(cells[3])  # a long place goes on in the next line
        assert row.description[:40] in said.out
    assert "(secret)" in said.out and "KVSTORE_REDIS__URL" in said.out and "line 4" in said.out


def test_it_prints_the_schema_whatever_is_set(config: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_HOST", "nonsense")
    schema = json.loads(config("--schema").out)
    assert list(schema["properties"]) == list(Settings.model_fields)


def test_it_ends_with_2_and_says_all_that_is_wrong(config: Callable[..., Said], tmp_path: Path) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_text("hots = 1\nhttp = '0.0.0.0:1'\n")
    for words in ((), ("--explain",)):
        said = config("--config", path, *words)
        assert (said.code, said.out) == (2, "")
        first, *sentences = said.err.splitlines()
        assert first == "kvstore: 2 things are wrong with the settings:"
        assert [sentence.split(": ")[0] for sentence in sentences] == [f"  {path}, line 1", f"  {path}, line 2"]


def test_it_wants_its_libraries(config: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("kvstore.settings")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("kvstore.settings")
    monkeypatch.setitem(sys.modules, "pydantic_settings", None)
    said = config("--schema")
    assert said.code == 2 and "pip install 'kvstore-llm[serve]'" in said.err


PROBE = """
import sys
import kvstore
kvstore.open(host="1MiB").close()
print(sorted({"pydantic", "pydantic_settings", "yaml"} & sys.modules.keys()))
import kvstore.settings
kvstore.settings.load(None, {"dir": "x"}, {})
print(sorted({"torch", "numpy", "numba", "yaml", "typer"} & sys.modules.keys()))
"""


def test_who_needs_no_settings_pays_for_none() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n[]\n"


def test_both_examples_say_the_same() -> None:
    found = load(EXAMPLES / "kvstore.toml", {}, {})
    assert found == load(EXAMPLES / "kvstore.yaml", {}, {})
    assert set(found.tenants) == {"research", "production"} and found.budgets[""].host == 4 << 30


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # as configparser's manual has it
    parser.read(EXAMPLES / name)
    return parser


def test_systemd_units() -> None:
    service, socket = unit("kvstore.service"), unit("kvstore.socket")
    found = load(EXAMPLES / "kvstore.toml", {}, {})
    assert socket["Socket"]["ListenStream"] == str(found.socket)
    assert int(socket["Socket"]["SocketMode"], 8) == found.socket_mode
    assert socket["Socket"]["SocketGroup"] == found.socket_group == service["Service"]["Group"]
    assert service["Service"]["Type"] == "notify" and service["Unit"]["Requires"] == "kvstore.socket"
    assert int(service["Service"]["TimeoutStopSec"]) > found.drain
    assert str(found.dir) == "/var/cache/" + service["Service"]["CacheDirectory"]
    assert "PrivateUsers" not in service["Service"]  # tenants are told apart by uid
    assert "RuntimeDirectory" not in service["Service"]  # it would take the socket with it


def complaints(folder: Path) -> str:
    units = sorted(map(str, folder.glob("kvstore.*")))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_knows_all_that_the_units_say(tmp_path: Path) -> None:
    for name in ("kvstore.service", "kvstore.socket"):
        text = (EXAMPLES / name).read_text().replace("/usr/local/bin/kvstore", shutil.which("true") or "/bin/true")
        (tmp_path / name).write_text(text)
    assert complaints(tmp_path) == ""
    (tmp_path / "kvstore.socket").write_text(text.replace("SocketMode", "SocketMood"))
    assert "SocketMood" in complaints(tmp_path)


def walk(value: Any) -> Iterator[dict[str, Any]]:
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(one)
    if isinstance(value, dict):
        yield value


def gib(text: str) -> int:
    return int(text.removesuffix("Gi")) << 30


def test_the_daemon_set(tmp_path: Path) -> None:
    told, daemons = yaml.safe_load_all((EXAMPLES / "daemonset.yaml").read_text())
    (name,) = told["data"]
    (tmp_path / name).write_text(told["data"][name])
    found = load(tmp_path / name, {}, {})
    pod = daemons["spec"]["template"]["spec"]
    (main,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert daemons["kind"] == "DaemonSet" and set(mounts) == set(volumes)
    assert main["args"] == ["kvstore", "serve", "--config", f"{mounts['settings']}/{name}"]
    assert volumes["settings"]["configMap"]["name"] == told["metadata"]["name"]
    assert str(found.dir) == mounts["cache"] and found.socket and str(found.socket.parent) == mounts["socket"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 10000
    assert main["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    ports = {port["name"]: port["containerPort"] for port in main["ports"]}
    assert found.health and (found.health.host, found.health.port) == ("0.0.0.0", ports["health"])
    probes = {kind: main[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {"health"}
    assert [probe["path"] for probe in probes.values()] == ["/livez", "/livez", "/readyz"]
    assert pod["terminationGracePeriodSeconds"] > found.drain
    assert gib(main["resources"]["limits"]["memory"]) >= found.host + (1 << 30)
    assert pod["enableServiceLinks"] is False and not [one for one in walk(pod) if one.get("privileged")]
