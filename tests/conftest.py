"""What every test gets: a seed that is printed, and a check that nothing was left running or open."""

import gc
import os
import random
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvstore
from kvstore import compiled
from kvstore.local import LocalStore

# Before anything imports the libraries that read these; processes that tests start inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests download nothing
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # threads that wait for each other cost more than they bring on small models

BASE_SEED = pytest.StashKey[int]()
KEPT_BY_LIBRARIES = {"tqdm_monitor"}  # a thread that a progress bar of transformers starts once for the whole process
TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=1, help="base of every test's seed; 0 draws a fresh one")


def pytest_configure(config: pytest.Config) -> None:
    base = config.getoption("--seed")
    config.stash[BASE_SEED] = base or random.SystemRandom().randrange(1, 2**31)


def pytest_sessionstart() -> None:
    """What a driver opens once per process, on a machine that has one, is open before any test begins."""
    if os.path.exists("/dev/nvidiactl"):
        import torch

        if torch.cuda.is_available():
            torch.ones(1, device="cuda").cpu()


def pytest_report_header(config: pytest.Config) -> str:
    return f"kvstore: --seed {config.stash[BASE_SEED]}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number of this test's own, the same whichever tests run beside it; a failing test prints it."""
    base = request.config.stash[BASE_SEED]
    drawn = zlib.crc32(f"{base}:{request.node.nodeid}".encode())
    print(f"seed {drawn} (repeat with --seed {base})")
    return drawn


@pytest.fixture
def store() -> Iterator[LocalStore]:
    """A store in memory; what a test took from it must have come back when the test is over."""
    from hf_runs import leases_left  # brings torch

    with kvstore.open(host="64MiB") as store:
        yield store
        assert leases_left(store) == 0
        assert store.stats()["drafts"] == 0


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder where syncing costs nothing, if the system has one; for tests that sync thousands of times."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    folder = Path("/dev/shm") / f"kvstore-test-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: these tests sync thousands of times, and no medium adds to them."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="kvstore-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def traces() -> Path:
    """The folder of public chat logs and traces; a clone elsewhere has none, and skips."""
    if not TRACES.is_dir():
        pytest.skip("the folder of public traces is not here: it is not part of the project")
    return TRACES


def open_descriptors() -> dict[int, str]:
    """Open file descriptors of this process and what they lead to; empty where the system does not say."""
    found = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor of the listing itself
            continue
        # A library's own fonts and tables, and what a driver has open, are kept on purpose.
        if "/site-packages/" not in target and not target.startswith("/dev/nvidia"):
            found[int(name)] = target
    return found


def leaks(threads: set[threading.Thread], descriptors: dict[int, str], patience: float = 2.0) -> list[str]:
    """What is there now and was not before, in words; what is just ending gets a moment to end."""
    deadline = time.monotonic() + patience
    while True:
        started = [thread for thread in threading.enumerate() if thread not in threads and thread.is_alive()]
        left = [f"thread {thread.name}" for thread in started if thread.name not in KEPT_BY_LIBRARIES]
        now = open_descriptors()
        left += [f"descriptor {fd} -> {target}" for fd, target in now.items() if descriptors.get(fd) != target]
        if not left or time.monotonic() > deadline:
            return left
        gc.collect()
        for thread in threading.enumerate():
            if thread not in threads and thread is not threading.current_thread():
                thread.join(timeout=0.05)


@pytest.fixture(autouse=True, scope="module")
def brief_collections() -> None:
    """What earlier modules and their frameworks left is no garbage: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a thread or a file descriptor behind; `@pytest.mark.leaky` lets one through."""
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    yield
    if request.node.get_closest_marker("leaky"):
        return
    compiled.idle(timeout=60)  # its thread ends by itself once what was asked for is built
    left = leaks(threads, descriptors)
    if left:
        pytest.fail("left behind: " + ", ".join(left))
