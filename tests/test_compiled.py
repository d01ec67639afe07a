"""Compiling off the request path: asked for once, built by one thread that ends, never in anybody's way."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore import compiled
from kvstore.compiled import Compiled

PATIENCE = 60


def one() -> Callable[[], int]:
    return lambda: 1


def failing(error: Exception) -> Callable[[], int]:
    raise error


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_it_is_built_once_and_stays() -> None:
    built: list[str] = []

    def build() -> Callable[[], int]:
        built.append(threading.current_thread().name)
        return lambda: 5

    kernel = Compiled("five", build)
    assert (kernel.get(ask=False), built) == (None, [])
    function = kernel.wait(PATIENCE)
    assert function is not None and function() == 5
    assert kernel.get() is function and kernel.wait() is function
    assert built == ["kvstore-compile"]
    assert compiled.idle(PATIENCE)
    assert "kvstore-compile" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (ImportError("No module named 'numba'"), logging.INFO),
        (RuntimeError("what is compiled differs from plain code\nand much more"), logging.WARNING),
        (KeyError("a bug"), logging.WARNING),
    ],
)
def test_a_build_that_fails_is_told_once(error: Exception, level: int, caplog: pytest.LogCaptureFixture) -> None:
    kernel: Compiled[Callable[[], int]] = Compiled("broken", lambda: failing(error))
    with caplog.at_level(logging.INFO, "kvstore"):
        assert kernel.wait(PATIENCE) is None
        assert kernel.wait(PATIENCE) is None and kernel.get() is None
    told = [record for record in caplog.records if "broken" in record.getMessage()]
    assert [record.levelno for record in told] == [level]
    assert "\n" not in told[0].getMessage() and str(error).split("\n")[0] in told[0].getMessage()
    assert Compiled("next", one).wait(PATIENCE)  # the thread, or the next one, goes on


def test_nobody_waits_for_a_build_and_it_happens_once() -> None:
    gate, started, count = threading.Event(), threading.Event(), []

    def build() -> Callable[[], int]:
        count.append(1)
        started.set()
        assert gate.wait(PATIENCE)
        return lambda: 5

    kernel, behind = Compiled("slow", build), Compiled("behind", one)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(kernel.get())) for _ in range(16)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert started.wait(PATIENCE)
        assert (found, behind.get(), kernel.wait(0), compiled.idle(0)) == ([None] * 16, None, None, False)
    finally:
        gate.set()
    assert behind.wait(PATIENCE) and kernel.get()  # one after the other
    assert count == [1]


FORK = """
import os, threading
from kvstore.compiled import Compiled, idle
forking, started = threading.Event(), threading.Event()
def slow():
    started.set()
    assert forking.wait(60)
    return os.getpid
first = Compiled("first", slow)
second = Compiled("second", lambda: (lambda pid: lambda: pid)(os.getpid()))
failed = Compiled("failed", lambda: 1 / 0)
failed.wait(60)
os.register_at_fork(before=forking.set)  # the last hook runs first: the build ends while the fork waits for it
first.get(), second.get()
assert started.wait(60)
pid = os.fork()
if pid == 0:
    good = first.get() is not None and first.get()() == os.getpid()
    good = good and second.wait(60)() in (os.getpid(), os.getppid()) and failed.wait(60) is None and idle(60)
    os._exit(0 if good else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print(second.wait(60)() == os.getpid(), idle(60))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_waits_for_the_build_and_the_child_may_ask() -> None:
    assert run("import logging; logging.disable()\n" + FORK) == "True True"


def test_asking_at_the_end_of_the_interpreter() -> None:
    """What is being built is finished; nothing is begun any more, not even what was asked for before."""
    code = """
import atexit, threading
from kvstore.compiled import Compiled
gate, begun = threading.Event(), threading.Event()
def build(): begun.set(); gate.wait(60); print("built"); return print
early, behind, late = (Compiled(name, build) for name in ("early", "behind", "late"))
atexit.register(lambda: print(early.get() is print, behind.get(), late.get(), threading.active_count()))
early.get(), behind.get(), begun.wait(60)
threading.Thread(target=lambda: (threading.main_thread().join(), gate.set())).start()
"""
    assert run(code).split("\n") == ["built", "True None None 1"]


def test_without_numba_the_plain_form_serves() -> None:
    code = """
import sys; sys.modules["numba"] = None
from kvstore import Layout
from kvstore.block import checksums
from kvstore.checksum import KERNELS
from xxhash import xxh3_64_intdigest
print(KERNELS.wait(60))
payload = memoryview(bytearray(b"x" * 4096 * 2))
print(list(checksums(Layout.uniform(1, 1, 16, "uint8"), 256, payload)) == [xxh3_64_intdigest(b"x" * 4096)] * 2)
"""
    assert run(code).split("\n") == ["None", "True"]


WARM = """
import logging; logging.basicConfig(level=logging.INFO, stream=__import__("sys").stdout, format="%(message)s")
from kvstore.checksum import KERNELS
print("hits", sum(KERNELS.wait(120).digests.stats.cache_hits.values()))
"""


def warmed(place: object) -> str:
    locator = "UserProvidedCacheLocator"  # not the place beside the source, which may be writable
    return run(WARM, NUMBA_CACHE_DIR=str(place), NUMBA_CACHE_LOCATOR_CLASSES=locator)


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    assert (warmed(tmp_path), warmed(tmp_path)) == ("hits 0", "hits 1")
    for index in tmp_path.rglob("*.nbi"):  # what a power cut may leave
        index.write_bytes(b"")
    assert "compiled anew" in warmed(tmp_path)


def test_without_a_place_on_disk_each_process_compiles() -> None:
    pytest.importorskip("numba")
    told = warmed("/dev/null/nowhere")
    assert "compiled anew" in told and told.endswith("hits 0")
