"""Real chats through a real server: replies are those of vLLM alone, also when the engine was killed and started anew.

In bfloat16 another batch of tokens rounds otherwise, in vLLM alone as well: where the two best tokens are as near to
each other as rounding, either may be said, and such replies are counted apart. From disk means by a process that has
nothing in memory; the system's cache of files cannot be dropped here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chats
import models
import psutil
import pytest
from asking import Compared, Said, compare, full_pages, say_all
from daemons import daemon
from processes import idle
from serving import TOGETHER, Engine, serving, start, transfer

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(1200)]
CONTEXT = ("--max-model-len", models.CONTEXT)


@dataclass(frozen=True)
class Case:
    """A model, the turns, and what vLLM alone says to them."""

    dtype: str
    model: Path
    turns: list[chats.Turn]
    alone: list[Said]

    @property
    def flags(self) -> tuple[object, ...]:
        return (*CONTEXT, "--dtype", self.dtype)

    def judge(self, said: list[Said], what: str) -> Compared:
        """Fails where a reply is another one; says how many tied."""
        found = compare(self.alone, said)
        print(f"{self.dtype}, {what}: {found.same} replies the same, {found.ties} with a tie")
        assert not found.others
        assert found.ties == 0 or self.dtype == "bfloat16"
        assert found.same >= len(said) // 2
        return found


@pytest.fixture(scope="module", params=models.DTYPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, spoken: list[str]) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    model = models.llama(folder / "model", spoken, models.DTYPES[request.param])
    turns = chats.turns(50, 10)
    with serving(model, folder / "alone.log", *CONTEXT, "--dtype", request.param) as engine:
        alone = say_all(engine, turns)
    assert len({said.tokens for said in alone}) > len(alone) // 2  # replies tell what was read
    yield Case(request.param, model, turns, alone)


def settled(engine: Engine) -> None:
    """Waits until its processes do nothing: what is to be written is written."""
    for process in psutil.Process(engine.process.pid).children(recursive=True):
        idle(process.pid)


def killed_and_restarted(case: Case, folder: Path, config: dict[str, Any], **environ: str) -> None:
    """All turns, SIGKILL, and all turns again by another engine."""
    engine = start(case.model, folder / "first.log", *case.flags, config=config, **environ)
    try:
        case.judge(say_all(engine, case.turns), "saved")
        settled(engine)
    finally:
        engine.kill()
    again = start(case.model, folder / "second.log", *case.flags, config=config, **environ)
    try:
        longest = max(range(len(case.turns)), key=lambda number: case.alone[number].prompt)
        (first,) = say_all(again, [case.turns[longest]])
        print(f"{first.cached} of {first.prompt} tokens cached, {full_pages(first.prompt)} in full pages")
        assert first.cached >= 0.99 * full_pages(first.prompt)
        assert first.tokens == case.alone[longest].tokens or case.dtype == "bfloat16"
        case.judge(say_all(again, case.turns), "after a kill")
        metrics = again.metrics()
        assert metrics["vllm:external_prefix_cache_hits_total"] >= first.cached
    finally:
        again.stop()


def test_replies_are_the_same_with_a_store_on_disk_and_after_a_kill(case: Case, tmp_path: Path) -> None:
    config = transfer(dir=str(tmp_path / "cache"), host="256MiB", disk="4GiB")
    killed_and_restarted(case, tmp_path, config, **TOGETHER)


def test_replies_are_the_same_with_a_daemon_and_after_a_kill(case: Case, tmp_path: Path) -> None:
    with daemon(tmp_path, "--host", "512MiB") as served:
        killed_and_restarted(case, tmp_path, transfer(socket=served.url))
