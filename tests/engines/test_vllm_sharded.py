"""Two tensor-parallel workers read what one wrote, and what they wrote; one daemon holds it for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemons import daemon
from inside import begin, running
from models import prompt
from serving import transfer

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(900)]
ONE, TWO = [prompt(500 + number, 700 + 111 * number) for number in range(3)], prompt(600, 900)


def test_two_workers_read_what_one_wrote(tmp_path: Path, llama: Path) -> None:
    with daemon(tmp_path, "--host", "256MiB") as served:
        config = transfer(socket=served.url, deadline=20, timeout=10)
        with running(llama, tmp_path / "one.log", config) as engine:
            alone = [engine.one(ids).tokens for ids in ONE]
            also = engine.one(TWO, salt="apart").tokens
        for turn in range(2):
            with running(llama, tmp_path / "two.log", config, tensor_parallel_size=2) as engine:
                answers = [engine.one(ids, kvstore={}) for ids in ONE]
                assert [answer.tokens for answer in answers] == alone
                assert [answer.cached for answer in answers] == [len(ids) - 1 for ids in ONE]
                assert [answer.told["by_tier"] for answer in answers] == [{"host": len(ids) - 1} for ids in ONE]
                own = engine.one(TWO)
                assert own.tokens == also and own.cached == (len(TWO) - 1 if turn else 0)
        with running(llama, tmp_path / "again.log", config) as engine:
            own = engine.one(TWO)  # of which there are halves only
            assert own.tokens == also and own.cached == 0


def test_workers_that_are_apart_need_the_daemon(tmp_path: Path, llama: Path) -> None:
    log = tmp_path / "log"
    engine = begin(llama, log, transfer(dir=str(tmp_path / "cache")), tensor_parallel_size=2)
    for pipe in (engine.process.stdin, engine.process.stdout):
        assert pipe is not None
        pipe.close()
    assert engine.process.wait(200) != 0
    assert "which cannot share a store of one process; start `kvstore serve" in log.read_text(errors="replace")
