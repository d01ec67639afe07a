"""The rules of the house, held by a test: who may import whom, lengths, banned calls, the package list.

Each detector is a function from a parsed file to complaints, and each is shown a planted fault that it must find.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from house import (
    BANNED_CALLS,
    BANNED_MODULES,
    BROAD_EXCEPT,
    FILE_LINES,
    FLOOR,
    FUNCTION_LINES,
    GROUND,
    HOSTILE,
    ONLY_PORTS,
    PORTS,
    PUBLIC,
    THIRD_PARTY,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Source:
    """One parsed file. `unit` is its dotted name below kvstore, "kvstore" itself, or "tests.…"."""

    unit: str
    text: str

    @property
    def top(self) -> str:
        return self.unit.split(".")[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_core(self) -> bool:
        return self.top not in {"adapters", "bench", "tensors", "tests"}


def sources() -> Iterator[Source]:
    for folder in ("kvstore", "adapters", "bench", "policies", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if len(parts) > 2 and parts[0] == "kvstore" and parts[1] in ("adapters", "bench", "policies"):
                continue  # a link: the file is read in its own folder
            names = [part for part in parts if part not in ("kvstore", "__init__")]
            yield Source(".".join(names) or "kvstore", path.read_text("utf-8"))


def imported(source: Source) -> Iterator[str]:
    """Every module that the file names in an import, at the top or inside a function, absolute."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if is_module(name)]
            yield from modules
            if len(modules) < len(names):
                yield node.module


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def units(source: Source) -> set[str]:
    """What it imports of ours, as dotted names below kvstore; `import kvstore` itself is "kvstore"."""
    ours = {name for name in imported(source) if name == "kvstore" or name.startswith("kvstore.")}
    return {name.removeprefix("kvstore.") for name in ours}


def import_faults(source: Source) -> Iterator[str]:
    """Imports that go up, or past a port, or out of the house where they may not."""
    if source.top == "tests":
        return
    if source.top not in FLOOR:
        yield f"{source.unit} has no floor: give it one in tests/test_tidy.py"
        return
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(source.tree)):
        yield f"{source.unit} imports relatively"
    for name in sorted(units(source)):
        top = name.split(".")[0]
        if FLOOR.get(name, FLOOR.get(top, 0)) > FLOOR.get(source.unit, FLOOR[source.top]):
            yield f"{source.unit} imports {name}, which is above it"
        if source.top in ONLY_PORTS and top in ("tiers", "policies") and name not in PORTS:
            yield f"{source.unit} imports {name}: a concrete class, which only config names"
        if source.top == "policies" and top not in ("policy", "policies"):
            yield f"{source.unit} imports {name}: policies see the policy port only"
        if source.top == "adapters" and top not in PUBLIC:
            yield f"{source.unit} imports {name}: adapters see public names only"
    outside = {name.split(".")[0] for name in imported(source)} - sys.stdlib_module_names - {"kvstore"}
    usual = set() if source.top in GROUND else {"lmdb", "msgpack", "xxhash"}
    allowed = THIRD_PARTY.get(source.unit) or THIRD_PARTY.get(source.top, usual)
    if source.top != "bench":
        yield from (f"{source.unit} imports {name}" for name in sorted(outside - allowed))


def length_faults(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > FILE_LINES:
        yield f"{source.unit} has {lines} lines"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{source.unit}:{node.name} has {lines} lines"


def banned_faults(source: Source) -> Iterator[str]:
    """Ways to run code from bytes, and builtin hash() in the core."""
    for name in imported(source):
        if name.split(".")[0] in BANNED_MODULES and source.unit not in HOSTILE:
            yield f"{source.unit} imports {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in BANNED_CALLS or (called == "hash" and source.is_core):
                yield f"{source.unit}:{node.lineno} calls {called}"
            if called in ("time.sleep", "sleep") and source.is_core and source.top != "files":
                yield f"{source.unit}:{node.lineno} sleeps"


def except_faults(source: Source) -> Iterator[str]:
    """Handlers that catch everything and do not raise again, outside the listed top loops."""
    for function in [source.tree, *ast.walk(source.tree)]:
        if not isinstance(function, ast.FunctionDef | ast.Module):
            continue
        name = getattr(function, "name", "module")
        for node in ast.walk(function) if name != "module" else ast.iter_child_nodes(function):
            for handler in getattr(node, "handlers", []):
                caught = ast.unparse(handler.type) if handler.type else "BaseException"
                raises_again = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(handler))
                listed = f"{source.unit}:{name}" in BROAD_EXCEPT or source.top == "tests"
                if re.search(r"\b(Base)?Exception\b", caught) and not raises_again and not listed:
                    yield f"{source.unit}:{name} line {handler.lineno} catches {caught}"


DETECTORS: dict[Callable[[Source], Iterator[str]], tuple[Source, ...]] = {
    import_faults: (
        Source("keys", "import kvstore.store"),
        Source("keys", "def f():\n    import numpy"),
        Source("store", "from kvstore.tiers.disk import DiskTier"),
        Source("store", "import torch"),
        Source("hot", "from kvstore.tiers.device import DeviceTier"),
        Source("tiers.host", "import torch"),
        Source("block", "def f():\n    import numba"),
        Source("mover", "from kvstore.policies.eviction import Lru"),
        Source("policies.eviction", "from kvstore.files import Files"),
        Source("adapters.transformers", "from kvstore.tiers.base import Tier"),
        Source("adapters.transformers", "from kvstore.bench.logs import read"),
        Source("config", "from kvstore.bench.logs import read"),
        Source("block", "from . import keys"),
        Source("nobody_gave_me_a_floor", ""),
    ),
    length_faults: (Source("keys", "\n" * 301), Source("keys", "def f():\n" + "    pass\n" * 60)),
    banned_faults: (
        Source("bench.x", "import pickle"),
        Source("tests.x", "from marshal import loads"),
        Source("adapters.x", "torch.load('x')"),
        Source("bench.x", "eval('1')"),
        Source("index", "hash('x')"),
        Source("mover", "import time\ntime.sleep(1)"),
    ),
    except_faults: (
        Source("store", "def f():\n    try:\n        pass\n    except Exception:\n        pass"),
        Source("store", "def f():\n    try:\n        pass\n    except:\n        pass"),
        Source("store", "try:\n    pass\nexcept (OSError, Exception):\n    pass"),
    ),
}


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.__name__)
def test_the_rules_hold(detector: Callable[[Source], Iterator[str]]) -> None:
    assert [fault for source in sources() for fault in detector(source)] == []


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.__name__)
def test_each_detector_finds_what_is_planted(detector: Callable[[Source], Iterator[str]]) -> None:
    assert [planted for planted in DETECTORS[detector] if not list(detector(planted))] == []


def test_clean_code_is_let_through() -> None:
    clean = Source(
        "store", "def f():\n    try:\n        model.eval()\n    except BaseException:\n        undo()\n        raise"
    )
    assert [fault for detector in DETECTORS for fault in detector(clean)] == []


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Names that stand on a circle of imports, or behind one."""
    left = dict(edges)
    while free := [name for name, above in left.items() if not above & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_imports_in_a_circle() -> None:
    assert circle({source.unit: units(source) - {source.unit} for source in sources()}) == []
    assert circle({"a": {"b"}, "b": {"a"}, "c": set()}) == ["a", "b"]


def test_no_drawer_for_odds_and_ends() -> None:
    assert [source.unit for source in sources() if re.search(r"\b(utils?|helpers?|misc|common)\b", source.unit)] == []


def test_the_package_list_equals_the_folders() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = set()
    for folder in ("kvstore", "adapters", "bench", "policies"):
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            if not (len(parts) > 1 and parts[1] in ("adapters", "bench", "policies")):
                folders.add(".".join(parts if parts[0] == "kvstore" else ("kvstore", *parts)))
    assert set(setuptools["packages"]) == folders
    for name, folder in setuptools["package-dir"].items():
        assert (ROOT / "kvstore" / name.split(".")[-1]).resolve() == ROOT / folder


@pytest.mark.parametrize(
    "name", ["Makefile", "pyproject.toml", "constraints.txt", ".ci/run", ".pre-commit-config.yaml"]
)
def test_the_set_up_names_no_registry(name: str) -> None:
    """Where packages come from is the business of whoever installs them."""
    assert not re.search(r"https?://|index-url|find-links|trusted-host", (ROOT / name).read_text())


PROBE = """
import sys, threading
import {what}
heavy = sorted({{"torch", "numba", "numpy", "transformers", "typer", "rich"}} & sys.modules.keys())
print(heavy, threading.active_count())
"""


@pytest.mark.parametrize(("what", "clean"), [("kvstore", True), ("kvstore, numpy", False)])
def test_import_is_light(what: str, clean: bool) -> None:
    probe = PROBE.format(what=what)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip() == "[] 1") is clean
