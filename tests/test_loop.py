"""The request loop: every answer is what ``generate`` gives alone, whoever comes, goes or fails beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import PATIENCE, Task, fetches_are_over, only_on_disk
from hf_models import VOCABULARY, build, prompt
from hf_runs import attach, stored_prompt
from test_cli import saved_model
from transformers import AutoTokenizer, RepetitionPenaltyLogitsProcessor

import kvstore
from kvstore import BadInput
from kvstore.adapters.transformers import Loop, Request
from kvstore.adapters.transformers.tempo import Tempo
from kvstore.local import LocalStore

NEW = 12


def served(family: str, store: Any) -> tuple[Any, Any]:
    """A model joined to a store that loads whatever is there, so that counts are exact."""
    return attach(family, store, decide="always")


def alone(model: Any, ids: torch.Tensor, new: int = NEW, **options: Any) -> torch.Tensor:
    """What transformers gives for one prompt, without us."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    out: torch.Tensor = model.generate(ids, max_new_tokens=new, **options)
    return out


def behind(ids: torch.Tensor, token: int, more: int, seed: int) -> torch.Tensor:
    """``ids``, a token and so many others."""
    return torch.cat((ids, torch.tensor([[token]]), prompt(more, seed)), 1)


def prompts(model: Any, first: torch.Tensor, count: int, seed: int) -> list[torch.Tensor]:
    """Prompts of different lengths that part behind ``first``, one that goes on from another, one that is like none."""
    mine = [behind(first, 1 + number, 2 + 5 * number, seed + number) for number in range(count - 2)]
    said = int(alone(model, mine[0], 1)[0, -1])
    parts = behind(mine[0], said % (VOCABULARY - 1) + 1, 8, seed + count)
    return [*mine, parts, behind(first[:, :0], int(first[0, 0]) % (VOCABULARY - 1) + 1, 29, seed + count + 1)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "fusedkv"])
def test_answers_are_those_of_generate_alone(store: LocalStore, family: str, seed: int) -> None:
    """Requests of different lengths join as others leave."""
    model, reuse = served(family, store)
    asked = prompts(model, stored_prompt(model, reuse, 40, seed), 6, seed)
    news = [3, 1, 9, 12, 7, 5]
    expected = [alone(model, ids, new) for ids, new in zip(asked, news, strict=True)]
    with Loop(reuse, active=3) as loop:
        requests = [loop.submit(ids, max_new_tokens=new) for ids, new in zip(asked[:4], news, strict=False)]
        assert loop.step() and loop.step() and loop.step()
        assert [request.state for request in requests] == ["done", "done", "running", "waiting"]
        requests += [
            loop.submit(ids[0].tolist(), max_new_tokens=new) for ids, new in zip(asked[4:], news[4:], strict=True)
        ]
        loop.run()
        assert not loop.step() and loop.counters == {"requests_done": 6}
    for request, out in zip(requests, expected, strict=True):
        assert torch.equal(request.result(), out) and request.state == "done"
        assert request.ttft_seconds is not None and 0 < request.ttft_seconds <= request.waited
    figures = [request.hit for request in requests]
    assert [hit.cached_tokens for hit in figures if hit] == [40, 40, 40, 40, asked[0].shape[1], 0]
    assert all(hit is not None and hit.cached_by_tier.get("host", 0) == hit.cached_tokens for hit in figures)
    for out in expected:
        assert reuse.load(out).cached_tokens == out.shape[1] - 1


def test_what_waiting_requests_read_comes_from_disk_ahead(tmp_path: Path, seed: int) -> None:
    with kvstore.open(tmp_path / "cache", host="16MiB", disk="64MiB") as store:
        model, reuse = served("llama", store)
        asked = [torch.cat((stored_prompt(model, reuse, 48, seed + number), prompt(4, seed)), 1) for number in range(3)]
        expected = [alone(model, ids) for ids in asked]
        only_on_disk(store)
        with Loop(reuse, active=1) as loop:
            requests = [loop.submit(ids, max_new_tokens=NEW) for ids in asked]
            loop.step()
            assert list(store._prefetcher._queue) == requests[1:]
            fetches_are_over(store)
            loop.run()
        for request, out in zip(requests, expected, strict=True):
            assert torch.equal(request.result(), out)
            assert request.hit is not None and request.hit.cached_tokens == 48
        tiers = [request.hit.cached_by_tier for request in requests if request.hit]
        assert tiers[0]["host"] + tiers[0]["disk"] == 48
        assert [tier["host"] for tier in tiers[1:]] == [48, 48]


def test_first_come_first_served(store: LocalStore, seed: int) -> None:
    """When a request has its first token, all that came before it have been begun; the store knows the rest."""
    _, reuse = served("llama", store)
    requests: list[Request] = []
    begun: list[tuple[int, int]] = []
    beside: list[int] = []

    def seen(number: int) -> Callable[[int], None]:
        def on_token(_: int) -> None:
            begun.append((number, sum(request.state != "waiting" for request in requests)))
            beside.append(sum(request.state == "running" for request in requests))

        return on_token

    with Loop(reuse, active=2) as loop:
        for number in range(6):
            more: dict[str, Any] = {"priority": number, "deadline": 1000.0, "on_token": seen(number)}
            requests.append(loop.submit(prompt(9 + number, seed + number), max_new_tokens=6 + number % 4, **more))
        while loop.step():
            waiting = [request for request in requests if request.state == "waiting"]
            told = store._prefetcher._queue
            assert list(told) == waiting
            jobs = [told[request].job for request in waiting]
            assert [job.priority for job in jobs] == list(range(6 - len(waiting), 6))
            starts = [job.start for job in jobs if job.start is not None]
            assert len(starts) == len(jobs) and starts == sorted(starts)
            assert all(job.deadline is not None and 900 < job.deadline < 1000 for job in jobs)
    firsts = [next(event for event in begun if event[0] == number) for number in range(6)]
    assert [count for _, count in firsts] == [1, 2, 3, 4, 5, 6]
    assert [begun.index(event) for event in firsts] == sorted(begun.index(event) for event in firsts)
    assert len(begun) == sum(6 + number % 4 for number in range(6)) and max(beside) == 2


def test_when_waiting_requests_will_start() -> None:
    tempo = Tempo()
    assert tempo.starts([5], [5, 5], 2) == [0.0, 0.0]  # nothing is known yet
    tempo.first(2.0)
    tempo.next(0.5)
    # A place is free now, and one when the running one has said 4 tokens, of a second each, as two take turns.
    assert tempo.starts([4], [10, 1, 1], 2) == [0.0, 4.0, 7.0]
    assert tempo.starts([], [3, 3], 1) == [0.0, 3.5]
    tempo.first(4.0)
    assert tempo.starts([], [3, 3], 1) == [0.0, 4.0]


def test_requests_from_several_threads(store: LocalStore, seed: int) -> None:
    model, reuse = served("llama", store)
    asked = prompts(model, stored_prompt(model, reuse, 40, seed), 8, seed)
    heard: dict[int, list[int]] = {number: [] for number in range(8)}
    with Loop(reuse, active=3) as loop:

        def ask(number: int) -> torch.Tensor:
            request = loop.submit(asked[number], max_new_tokens=NEW, on_token=heard[number].append)
            return request.result(PATIENCE)

        loop.serve()
        with pytest.raises(BadInput, match="serves already"):
            loop.serve()
        assert [thread.name for thread in threading.enumerate()].count("kvstore-loop") == 1
        outs = [task.result() for task in [Task(lambda n=number: ask(n)) for number in range(8)]]  # type: ignore[misc]
        assert loop.counters == {"requests_done": 8}
    assert "kvstore-loop" not in [thread.name for thread in threading.enumerate()]
    for number, out in enumerate(outs):
        assert torch.equal(out, alone(model, asked[number]))
        assert heard[number] == out[0, asked[number].shape[1] :].tolist()


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two prompts": (prompt(5, 0, rows=2), {}, "one prompt, but 2 were given"),
    "no prompt": ([], {}, "input_ids must be whole numbers"),
    "a word that there is not": ([VOCABULARY], {}, f"the model's vocabulary has {VOCABULARY}"),
    "no token": ([1], {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
    "no number": ([1], {"deadline": float("nan")}, "deadline=nan of job"),
    "no deadline": ([1], {"deadline": "soon"}, "deadline='soon' of job"),
    "no priority": ([1], {"priority": "high"}, "priority='high' of job"),
    "no tenant": ([1], {"tenant": "\ud800"}, "tenant="),
    "no owner": ([1], {"owner": 7}, "owner=7"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_asked(store: LocalStore, case: str) -> None:
    _, reuse = served("llama", store)
    ids, options, sentence = BAD[case]
    with Loop(reuse) as loop:
        with pytest.raises(BadInput, match=sentence):
            loop.submit(ids, **{"max_new_tokens": 1, **options})
        assert not loop.step()
    with pytest.raises(BadInput, match="active=0 must be a whole number"):
        Loop(reuse, active=0)


@pytest.mark.parametrize("what", ["step", "close"])
def test_a_callback_cannot_step_or_close(store: LocalStore, what: str, seed: int) -> None:
    _, reuse = served("llama", store)
    with Loop(reuse) as loop:
        request = loop.submit(prompt(9, seed), max_new_tokens=2, on_token=lambda _: getattr(loop, what)())
        loop.run()
        with pytest.raises(BadInput, match="callback cannot step or close its loop"):
            request.result()
        again: list[Request] = []

        def more(_: int) -> None:
            again.append(loop.submit(prompt(9, seed), max_new_tokens=1))

        loop.submit(prompt(9, seed), max_new_tokens=2, on_token=more)
        loop.run()
        assert [one.state for one in again] == ["done", "done"]


def test_samplers_and_logits_processors(store: LocalStore, seed: int) -> None:
    model, reuse = served("llama", store)
    ids = prompt(30, seed)

    def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(scores.div(1.3).softmax(-1), 1)

    with Loop(reuse) as loop:
        penalised = loop.submit(ids, max_new_tokens=NEW, sampler=RepetitionPenaltyLogitsProcessor(1.3))
        outside = loop.submit(ids, max_new_tokens=NEW, sampler=lambda ids, scores: VOCABULARY)
        loop.run()
        torch.manual_seed(seed)
        drawn = loop.submit(ids, max_new_tokens=NEW, sampler=draw)
        loop.run()
    assert torch.equal(penalised.result(), alone(model, ids, repetition_penalty=1.3))
    torch.manual_seed(seed)
    assert torch.equal(drawn.result(), alone(model, ids, do_sample=True, temperature=1.3, top_k=0))
    with pytest.raises(BadInput, match=f"token {VOCABULARY} of a vocabulary of {VOCABULARY}"):
        outside.result()


@pytest.mark.parametrize("given", [True, False], ids=["given", "the model's own"])
def test_an_answer_ends_where_its_last_token_says(store: LocalStore, given: bool, seed: int) -> None:
    model, reuse = served("llama", store)
    ids = prompt(30, seed)
    whole = alone(model, ids)[0, 30:].tolist()
    end = whole[4]
    if not given:
        model.generation_config.eos_token_id = end
    with Loop(reuse) as loop:
        request = loop.submit(ids, max_new_tokens=NEW, eos_token_id=[end] if given else None)
        endless = loop.submit(ids, max_new_tokens=NEW, eos_token_id=[])
        loop.run()
    assert torch.equal(request.result(), alone(model, ids, eos_token_id=end))
    assert request.result().shape[1] == 30 + whole.index(end) + 1
    assert endless.result()[0, 30:].tolist() == whole


def test_tenants_share_nothing(store: LocalStore, seed: int) -> None:
    model, reuse = served("llama", store)
    ids = prompt(30, seed)
    with Loop(reuse) as loop:
        for tenant, cached in (("a", 0), ("b", 0), ("a", 29)):
            request = loop.submit(ids, max_new_tokens=3, tenant=tenant, owner="someone")
            loop.run()
            assert request.hit is not None and request.hit.cached_tokens == cached
            assert torch.equal(request.result(), alone(model, ids, 3))
    assert store.forget(owner="someone").blocks == 2 * 2


def test_what_was_decided_of_a_load_is_told(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = stored_prompt(model, reuse, 40, seed)
    with Loop(reuse) as loop:
        request = loop.submit(ids, max_new_tokens=1)
        loop.run()
    assert request.hit is not None and request.hit.decision is not None
    assert request.hit.decision.loaded == request.hit.cached_tokens and request.hit.decision.matched == 39


def test_a_chat(store: LocalStore, tmp_path: Path, seed: int) -> None:
    model = build("llama")
    tokenizer = AutoTokenizer.from_pretrained(saved_model(tmp_path, True, model))
    _, reuse = served("llama", store)
    said = [{"role": "user", "content": "hello"}]
    with Loop(reuse) as loop:
        request = loop.chat(said, tokenizer, max_new_tokens=NEW)
        loop.run()
    ids = torch.tensor([tokenizer("<user>hello;<assistant>", add_special_tokens=False)["input_ids"]])
    assert torch.equal(request.result(), alone(model, ids))
