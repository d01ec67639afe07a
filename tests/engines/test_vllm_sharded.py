"""Two tensor-parallel workers read what one wrote; one, and Hugging Face, what they wrote; one daemon holds it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from daemons import daemon, start, until
from hugging_face import replies
from inside import begin, running
from models import prompt
from serving import transfer

from kvstore.layout import BLOCK_TOKENS

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(900)]
ONE, TWO = [prompt(500 + number, 700 + 111 * number) for number in range(3)], prompt(600, 900)
MORE = [*ONE[1], *prompt(601, 400)]


def test_what_workers_write_together_all_engines_read(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "cache"
    with daemon(tmp_path, "--dir", folder, "--host", "256MiB") as served:
        config = transfer(socket=served.url, deadline=20, timeout=10)
        with running(llama, tmp_path / "one.log", config) as engine:
            alone = [engine.one(ids).tokens for ids in ONE]
            also, more = (engine.one(ids, salt="apart").tokens for ids in (TWO, MORE))
        for turn in range(2):
            with running(llama, tmp_path / "two.log", config, tensor_parallel_size=2) as engine:
                answers = [engine.one(ids, kvstore={}) for ids in ONE]
                assert [answer.tokens for answer in answers] == alone
                assert [answer.cached for answer in answers] == [len(ids) - 1 for ids in ONE]
                assert [answer.told["by_tier"] for answer in answers] == [{"host": len(ids) - 1} for ids in ONE]
                own = engine.one(TWO)
                assert own.tokens == also and own.cached == (len(TWO) - 1 if turn else 0)
                further = engine.one(MORE)  # begins with what one worker wrote, and goes on with what two do
                assert further.tokens == more and further.cached == (len(MORE) - 1 if turn else len(ONE[1]))
        with running(llama, tmp_path / "again.log", config) as engine:
            answers = [engine.one(ids, kvstore={}) for ids in (TWO, MORE)]
            assert [answer.tokens for answer in answers] == [also, more]
            assert [answer.cached for answer in answers] == [len(TWO) - 1, len(MORE) - 1]
    alone_too, there = (replies(llama, place, [TWO, MORE], 16) for place in (None, folder))
    assert there.tokens == alone_too.tokens
    whole = [len(ids) // BLOCK_TOKENS * BLOCK_TOKENS for ids in (TWO, MORE)]
    assert all(have >= least for have, least in zip(there.cached, whole, strict=True))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_what_workers_do_not_get_they_compute(tmp_path: Path, llama: Path, number: int) -> None:
    folder = tmp_path / "cache"
    flags = ("--dir", folder, "--host", "256MiB")
    daemons = [start(tmp_path, *flags)]
    config = transfer(socket=daemons[0].url, deadline=3, timeout=1)
    try:
        with running(llama, tmp_path / "log", config, tensor_parallel_size=2) as engine:
            said = [engine.one(ids).tokens for ids in ONE]
            engine.forget()
            assert [engine.one(ids).cached for ids in ONE] == [len(ids) - 1 for ids in ONE]
            for end in (lambda: daemons[0].process.send_signal(number), daemons[0].kill):
                end()
                engine.forget()
                assert [engine.one(ids).tokens for ids in ONE] == said
            daemons.append(start(tmp_path, *flags))

            def stored() -> bool:
                engine.forget()
                answer = engine.one(TWO, 1)
                return answer.cached == len(TWO) - 1

            until(stored, "nothing is stored in the daemon that came back")
            engine.forget()
            assert [engine.one(ids).tokens for ids in ONE] == said
    finally:
        for each in daemons:
            if each.process.poll() is None:
                each.kill()


def test_workers_that_are_apart_need_the_daemon(tmp_path: Path, llama: Path) -> None:
    log = tmp_path / "log"
    engine = begin(llama, log, transfer(dir=str(tmp_path / "cache")), tensor_parallel_size=2)
    for pipe in (engine.process.stdin, engine.process.stdout):
        assert pipe is not None
        pipe.close()
    assert engine.process.wait(200) != 0
    assert "which cannot share a store of one process; start `kvstore serve" in log.read_text(errors="replace")
