"""Requests of every kind through a real engine with a store behind it: what is said is what vLLM says alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from inside import Answer, Ask, Inside, running
from models import prompt
from serving import transfer

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(900)]
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
LONG, OTHER = prompt(1, 700), prompt(2, 333)
MANY = [prompt(10 + number, 150 + 97 * number) for number in range(6)]
TIGHT = [prompt(20 + number, 500) for number in range(4)]
SAID = 200  # tokens, of each of the tight ones


class Alone:
    """What vLLM says without a store; asked once for each prompt."""

    def __init__(self, engine: Inside) -> None:
        self._engine, self._said = engine, dict[tuple[int, ...], tuple[int, ...]]()

    def learn(self, ids: list[int], tokens: int = 16, lora: str | None = None) -> None:
        self._said[(*ids, -1 if lora else 0)] = self._engine.one(ids, tokens, lora=lora).tokens

    def says(self, answer: Answer, ids: list[int], lora: str | None = None) -> bool:
        return bool(answer.tokens) and answer.tokens == self._said[(*ids, -1 if lora else 0)][: len(answer.tokens)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.lora(tmp_path_factory.mktemp("adapter") / "polite"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path, adapter: str) -> Alone:
    with running(llama, tmp_path_factory.mktemp("alone") / "log", **LORA) as engine:
        found = Alone(engine)
        for ids in (LONG, OTHER, LONG + prompt(3, 60), *MANY):
            found.learn(ids)
        for ids in TIGHT:
            found.learn(ids, SAID)
        found.learn(LONG, lora=adapter)
    return found


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, llama: Path, alone: Alone) -> Iterator[Inside]:
    """With a store of its own in a directory."""
    folder = tmp_path_factory.mktemp("engine")
    config = transfer(dir=str(folder / "cache"), host="256MiB", disk="1GiB")
    with running(llama, folder / "log", config, **LORA) as found:
        yield found


def idle(engine: Inside) -> bool:
    """Whether all pages are the engine's again."""
    return engine.metrics()["vllm:kv_cache_usage_perc"] == 0


def test_a_partial_last_block_is_found_to_its_last_token(engine: Inside, alone: Alone) -> None:
    first = engine.one(LONG, salt="partial")
    assert alone.says(first, LONG) and first.cached == 0
    engine.forget()
    again = engine.one(LONG, salt="partial", kvstore={})
    assert alone.says(again, LONG) and again.cached == len(LONG) - 1
    assert again.told == {"tokens": 699, "by_tier": {"host": 699}, "mode": "exact"}
    engine.forget()
    more = engine.one(LONG + prompt(3, 60), salt="partial")
    assert alone.says(more, LONG + prompt(3, 60)) and more.cached == len(LONG)
    engine.forget()
    said = engine.one([*LONG, *first.tokens, 99], salt="partial")
    assert said.cached == len(LONG) + len(first.tokens) - 1  # the last token said was never read


def test_what_the_engine_has_is_not_loaded(engine: Inside, alone: Alone) -> None:
    engine.one(LONG, salt="resident")
    again = engine.one(LONG, salt="resident", kvstore={})
    assert alone.says(again, LONG) and again.cached == len(LONG) - 1
    assert again.told["tokens"] == len(LONG) - 1 - 640  # five full pages are there


def test_several_requests_in_a_step(engine: Inside, alone: Alone) -> None:
    for half in (MANY[::2], MANY):
        engine.forget()
        for answer, ids in zip(engine.ask(*(Ask(ids) for ids in half)), half, strict=True):
            assert alone.says(answer, ids)
    engine.forget()
    answers = engine.ask(*(Ask(ids) for ids in MANY))
    assert all(alone.says(answer, ids) for answer, ids in zip(answers, MANY, strict=True))
    assert [answer.cached for answer in answers] == [len(ids) - 1 for ids in MANY]
    assert idle(engine)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_request_that_is_aborted_leaves_nothing_behind(engine: Inside, alone: Alone, steps: int) -> None:
    salt = f"abort {steps}"
    engine.one(OTHER, salt=salt)
    engine.forget()
    stopped, kept, other = engine.ask(
        Ask(LONG, salt=salt, abort=steps), Ask(OTHER, salt=salt), Ask(OTHER, salt=salt, abort=steps)
    )
    assert alone.says(kept, OTHER) and kept.cached == len(OTHER) - 1
    assert len(stopped.tokens) <= steps and len(other.tokens) <= steps
    assert idle(engine)
    engine.forget()
    assert alone.says(engine.one(LONG, salt=salt), LONG)
    engine.forget()
    assert engine.one(LONG, salt=salt).cached == len(LONG) - 1


def test_another_salt_never_sees_what_is_cached(engine: Inside, alone: Alone) -> None:
    answers = []
    for salt in ("ours", "theirs", "ours", None, "theirs", "ours#1"):
        engine.forget()
        answers.append(engine.one(OTHER, salt=salt))
    assert [answer.cached for answer in answers] == [0, 0, len(OTHER) - 1, 0, len(OTHER) - 1, 0]
    assert all(alone.says(answer, OTHER) for answer in answers)


def test_an_adapter_has_blocks_of_its_own(engine: Inside, alone: Alone, adapter: str) -> None:
    plain = engine.one(LONG, salt="adapted")
    engine.forget()
    adapted = engine.one(LONG, salt="adapted", lora=adapter)
    assert alone.says(adapted, LONG, adapter) and adapted.cached == 0 and adapted.tokens != plain.tokens
    engine.forget()
    again = engine.one(LONG, salt="adapted", lora=adapter)
    assert alone.says(again, LONG, adapter) and again.cached == len(LONG) - 1
    engine.forget()
    assert alone.says(engine.one(LONG, salt="adapted"), LONG)


def test_a_field_that_is_not_known_is_answered(engine: Inside, alone: Alone) -> None:
    unknown = engine.one(OTHER, salt="hints", kvstore={"segment": [[0, 5]]})
    assert unknown.told["refused"].startswith("kv_transfer_params[\"kvstore\"] has no 'segment'")
    assert alone.says(unknown, OTHER)


def test_preempted_and_chunked_requests(tmp_path: Path, llama: Path, alone: Alone) -> None:
    config = transfer(dir=str(tmp_path / "cache"), host="256MiB", disk="1GiB")
    room: dict[str, Any] = {
        "num_gpu_blocks_override": 15,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 4,
    }
    with running(llama, tmp_path / "log", config, **room) as engine:
        for turn in range(3):
            answers = engine.ask(*(Ask(ids, SAID) for ids in TIGHT))
            assert all(alone.says(answer, ids) for answer, ids in zip(answers, TIGHT, strict=True)), turn
            assert all(len(answer.tokens) == SAID for answer in answers)
            engine.forget()
            assert idle(engine)
        assert engine.metrics()["vllm:num_preemptions"] > 0
        assert engine.metrics()["vllm:external_prefix_cache_hits"] >= 2 * 4 * 499
        assert engine.one(TIGHT[0], SAID).cached == 499


def test_layers_in_their_own_step_and_tenants_only(tmp_path: Path, llama: Path, alone: Alone) -> None:
    config = transfer(dir=str(tmp_path / "cache"), host="256MiB", load="layers", require_tenant=True)
    with running(llama, tmp_path / "log", config) as engine:
        for salt, expected in ((None, 0), (None, 0), ("tenant", 0), ("tenant", len(LONG) - 1)):
            answer = engine.one(LONG, salt=salt)
            assert alone.says(answer, LONG) and answer.cached == expected
            engine.forget()
        answers = engine.ask(Ask(LONG, salt="tenant"), *(Ask(ids, salt="tenant") for ids in MANY))
        assert all(alone.says(answer, ids) for answer, ids in zip(answers, [LONG, *MANY], strict=True))
        engine.forget()
        answers = engine.ask(*(Ask(ids, salt="tenant") for ids in MANY))
        assert [answer.cached for answer in answers] == [len(ids) - 1 for ids in MANY]
        assert all(alone.says(answer, ids) for answer, ids in zip(answers, MANY, strict=True))
