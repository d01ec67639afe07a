"""A store that fails while requests run: every reply is right, and none waits longer than the store may take."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import chats
import models
import pytest
from asking import Said, client, compare, say, say_all
from daemons import Daemon, start
from inside import running
from serving import Engine, serving, transfer

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(900)]
FLAGS = ("--max-model-len", models.CONTEXT, "--dtype", "float32", "--no-enable-prefix-caching")
TIMEOUT, DEADLINE = 1.0, 3.0  # seconds: of an answer, and of a load
RECOMPUTE = 60.0  # seconds in which even this machine computes a prompt, whatever else it does
TURNS = chats.turns(24, 6)


@dataclass
class Broken:
    """An engine whose store is a daemon's, and what vLLM says alone."""

    engine: Engine
    daemons: list[Daemon]  # the last one is there now
    folder: Path
    alone: list[Said]

    @property
    def daemon(self) -> Daemon:
        return self.daemons[-1]

    def again(self) -> None:
        """A new daemon where the old one was."""
        self.daemons.append(start(self.folder, "--host", "512MiB"))

    def hits(self) -> float:
        return self.engine.metrics()["vllm:external_prefix_cache_hits_total"]

    def during(self, number: int) -> float:
        """All turns, four at once, and a signal to the daemon after the first quarter; the longest that one took."""
        took = []

        def timed(turn: chats.Turn) -> Said:
            before = time.monotonic()
            with client(self.engine) as made:
                said = say(made, turn)
            took.append(time.monotonic() - before)
            if len(took) == len(TURNS) // 4:
                self.daemon.process.send_signal(number)
            return said

        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(timed, TURNS))
        found = compare(self.alone, said)
        assert (found.same, found.others) == (len(TURNS), ())
        return max(took)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> list[Said]:
    with serving(llama, tmp_path_factory.mktemp("alone") / "log", *FLAGS) as engine:
        return say_all(engine, TURNS)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, llama: Path, alone: list[Said]) -> Iterator[Broken]:
    folder = tmp_path_factory.mktemp("broken")
    daemons = [start(folder, "--host", "512MiB")]
    config = transfer(socket=daemons[0].url, timeout=TIMEOUT, deadline=DEADLINE)
    try:
        with serving(llama, folder / "log", *FLAGS, config=config) as engine:
            yield Broken(engine, daemons, folder, alone)
    finally:
        for daemon in daemons:
            if daemon.process.poll() is None:
                daemon.kill()


def test_a_daemon_that_freezes_while_requests_run(broken: Broken) -> None:
    assert compare(broken.alone, say_all(broken.engine, TURNS)).same == len(TURNS)
    before = broken.hits()
    try:
        longest = broken.during(signal.SIGSTOP)
        print(f"the longest took {longest:.1f} s")
        assert longest < DEADLINE + RECOMPUTE
        assert broken.hits() > before  # some came before it froze
    finally:
        broken.daemon.process.send_signal(signal.SIGCONT)


def test_a_daemon_that_is_killed_while_requests_run(broken: Broken) -> None:
    longest = broken.during(signal.SIGKILL)
    broken.daemon.process.wait(20)
    print(f"the longest took {longest:.1f} s")
    assert longest < DEADLINE + RECOMPUTE
    without = say_all(broken.engine, TURNS[:4])
    assert [said.cached for said in without] == [0] * 4
    assert compare(broken.alone[:4], without).same == 4


def test_a_daemon_that_comes_back_is_used_again(broken: Broken) -> None:
    if broken.daemon.process.poll() is None:
        broken.daemon.kill()
    broken.again()
    for _ in range(3):
        said = say_all(broken.engine, TURNS)
        assert compare(broken.alone, said).same == len(TURNS)
    assert said[-1].cached == said[-1].prompt - 1


@pytest.mark.parametrize("load", ["between", "layers"])
def test_blocks_that_are_damaged_on_disk(tmp_path: Path, llama: Path, load: str) -> None:
    prompts = [models.prompt(400 + number, 900 + number) for number in range(5)]
    config = transfer(dir=str(tmp_path / "cache"), host="64MiB", disk="1GiB", load=load)
    with running(llama, tmp_path / "first.log", config) as engine:
        alone = [engine.one(ids).tokens for ids in prompts]
    extents = sorted((tmp_path / "cache").rglob("extent-*.slab"))
    assert extents
    for path in extents:
        damaged = bytearray(path.read_bytes())
        for place in range(4096 + 2048, len(damaged), 4099):  # behind the extent's own head
            damaged[place] ^= 0x10
        path.write_bytes(damaged)
    with running(llama, tmp_path / "second.log", config) as engine:
        broken = [engine.one(ids, kvstore={}) for ids in prompts]
        print([(answer.cached, answer.told) for answer in broken])
        assert [answer.tokens for answer in broken] == alone
        assert [answer.told["tokens"] for answer in broken] == [0] * len(prompts)
        engine.forget()
        again = [engine.one(ids, kvstore={}) for ids in prompts]
        assert [answer.tokens for answer in again] == alone
        assert [answer.cached for answer in again] == [len(ids) - 1 for ids in prompts]  # and stored anew
