"""Documents in an order never seen, each read once before; and nobody else is served what is only nearly theirs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inside import Answer, Inside, running
from masked import log_probabilities
from models import prompt
from serving import transfer

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(900)]
LENGTHS = (512, 300, 256, 700, 411, 128, 640, 37, 555, 333)
DOCUMENTS = [prompt(100 + number, length) for number, length in enumerate(LENGTHS)]
QUESTION = prompt(200, 45)
ORDER = (7, 2, 9, 0, 5, 1, 8, 3, 6, 4)
TOP = 20  # log-probabilities that are compared
NEAR = 2e-3  # nats; keys were turned twice, in float32
FAR = 0.05  # what another context changes, at least


def joined(order: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int]]]:
    """The prompt of documents in this order with the question behind, and their segments."""
    ends = list(itertools.accumulate(LENGTHS[number] for number in order))
    ids = [token for number in order for token in DOCUMENTS[number]] + QUESTION
    return ids, list(zip([0, *ends], ends, strict=False))


def distance(answer: Answer, expected: torch.Tensor) -> float:
    """The largest difference of the first token's best log-probabilities."""
    return max(abs(value - float(expected[token])) for token, value in answer.logprobs[0].items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Answer:
    """What vLLM says alone."""
    with running(llama, tmp_path_factory.mktemp("alone") / "log") as engine:
        return engine.one(joined(ORDER)[0], logprobs=TOP)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, llama: Path, alone: Answer) -> Iterator[Inside]:
    """One that has read each document, alone; without a salt, and for one tenant."""
    folder = tmp_path_factory.mktemp("engine")
    with running(llama, folder / "log", transfer(dir=str(folder / "cache"), host="256MiB")) as found:
        for document in DOCUMENTS:
            found.one(document, 2)
            found.one(document, 2, salt="tenant")
        found.forget()
        yield found


def modular(engine: Inside, order: tuple[int, ...], salt: str | None) -> Answer:
    ids, segments = joined(order)
    return engine.one(ids, salt=salt, kvstore={"segments": segments, "mode": "modular"}, logprobs=TOP)


@pytest.mark.parametrize("salt", ["#1", "tenant#1"])
def test_ten_documents_in_a_new_order(engine: Inside, llama: Path, alone: Answer, salt: str) -> None:
    ids, segments = joined(ORDER)
    answer = modular(engine, ORDER, salt)
    assert answer.told["mode"] == "modular" and answer.told["tokens"] == answer.cached == sum(LENGTHS)
    expected = log_probabilities(llama, segments, ids)
    print(f"{answer.cached} of {len(ids)} tokens; log-probabilities within {distance(answer, expected):.1e}")
    assert distance(answer, expected) < NEAR
    exact = log_probabilities(llama, [], ids)
    assert distance(alone, exact) < NEAR and distance(answer, exact) > FAR


def test_the_same_prompt_exact_is_not_served_what_was_approximated(engine: Inside, alone: Answer) -> None:
    ids, _ = joined(ORDER)
    near = modular(engine, ORDER, "tenant#2")
    assert near.tokens != alone.tokens  # so that being served it would be seen
    shared = LENGTHS[ORDER[0]]  # the first document was read where it is
    for salt, cached in (("tenant#2", 0), ("tenant", shared), (None, shared), ("tenant#2", 0)):
        exact = engine.one(ids, salt=salt, logprobs=TOP)
        assert exact.tokens == alone.tokens and exact.cached == cached, salt
        assert distance(exact, torch.tensor([alone.logprobs[0].get(token, 9.0) for token in range(2048)])) < 1e-4
    engine.forget()
    again = engine.one(ids, salt="tenant")
    assert again.tokens == alone.tokens and again.cached == len(ids) - 1


def test_nothing_that_is_computed_behind_documents_is_stored(engine: Inside, alone: Answer) -> None:
    ids, _ = joined(ORDER[::-1])
    first = modular(engine, ORDER[::-1], "tenant#3")
    engine.forget()
    again = engine.one(ids, salt="tenant")
    assert again.cached == LENGTHS[ORDER[-1]] and again.tokens != first.tokens


@pytest.mark.parametrize("salt", [None, "tenant", "tenant#", "#"])
def test_without_a_salt_of_its_own_a_request_is_exact(engine: Inside, alone: Answer, salt: str | None) -> None:
    engine.forget()
    answer = modular(engine, ORDER, salt)
    assert answer.told["mode"] == "exact" and "cache_salt of its own" in answer.told["refused"]
    assert answer.tokens == alone.tokens


def test_a_document_that_is_not_stored_ends_what_is_loaded(engine: Inside, llama: Path) -> None:
    unread = prompt(300, 200)
    ids = [*DOCUMENTS[3], *DOCUMENTS[1], *unread, *DOCUMENTS[0], *QUESTION]
    ends = [0, 700, 1000, 1200, 1712]
    segments = list(itertools.pairwise(ends))
    answer = engine.one(ids, salt="tenant#4", kvstore={"segments": segments}, logprobs=TOP)
    assert answer.told["tokens"] == answer.cached == 1000
    assert distance(answer, log_probabilities(llama, segments[:2], ids)) < NEAR


def test_segments_that_are_none_are_refused_and_computed(engine: Inside, alone: Answer) -> None:
    ids, _ = joined(ORDER)
    answer = engine.one(ids, salt="tenant#5", kvstore={"segments": [[5, 10]]})
    assert answer.told["refused"].startswith("segment 0, 5 to 10, must begin at 0")
    assert answer.tokens == alone.tokens
