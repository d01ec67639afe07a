"""How requests of a loop end before their answer is whole: cancelled, failed, late or closed, and each one alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from gates import PATIENCE, Task
from hf_models import prompt
from hf_runs import leases_left, stored_prompt
from test_loop import NEW, alone, served

import kvstore
from kvstore import StoreClosed
from kvstore.adapters.transformers import Loop
from kvstore.adapters.transformers.request import Cancelled, DeadlinePassed, QueueFull
from kvstore.local import LocalStore


def test_a_cancelled_request_leaves_the_queue_or_stops_and_is_saved(store: LocalStore, seed: int) -> None:
    model, reuse = served("llama", store)
    ids, others = prompt(33, seed), prompt(20, seed + 1)
    with Loop(reuse, active=1, max_waiting=1) as loop:
        running = loop.submit(ids, max_new_tokens=NEW)
        loop.step()
        waiting = loop.submit(others, max_new_tokens=NEW)
        assert waiting.cancel() and waiting.state == "cancelled" and not waiting.cancel()
        last = loop.submit(others, max_new_tokens=NEW)  # there is room again
        loop.step()
        assert running.cancel() and running.state == "running"
        loop.run()
        assert loop.counters == {"requests_cancelled": 2, "requests_done": 1}
    for request, sentence in ((waiting, "cancelled while it waited"), (running, "before its answer was whole")):
        with pytest.raises(Cancelled, match=sentence):
            request.result()
    said = running.token_ids
    assert said == alone(model, ids)[0, : 33 + 3].tolist()  # two tokens in its first round, one in its second
    assert reuse.load([said]).cached_tokens == 33 + 2
    assert torch.equal(last.result(), alone(model, others)) and not last.cancel()


class Meanwhile:
    """A store during whose loads something else happens."""

    def __init__(self, store: LocalStore) -> None:
        self.store, self.then = store, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def load(self, match: Any, device: bool = False) -> Any:
        while self.then:
            self.then.pop()()
        return self.store.load(match, device)


def test_a_request_that_is_cancelled_while_it_is_loaded(store: LocalStore, seed: int) -> None:
    slow: Any = Meanwhile(store)
    model, reuse = served("llama", slow)
    ids = stored_prompt(model, reuse, 33, seed)
    with Loop(reuse, active=1) as loop:
        gone = loop.submit(ids, max_new_tokens=NEW)
        slow.then.append(gone.cancel)
        kept = loop.submit(ids, max_new_tokens=NEW)
        loop.step()
        assert gone.state == "cancelled" and gone.hit is None and leases_left(store) == 0
        loop.run()
        assert loop.counters == {"requests_cancelled": 1, "requests_done": 1}
    assert torch.equal(kept.result(), alone(model, ids))


class Planted(Exception):
    """What a caller's own function raises."""


def fails(*_: object) -> Any:
    raise Planted("theirs")


@pytest.mark.parametrize("which", ["on_token", "sampler"])
def test_what_a_callers_function_raises_ends_its_own_request(store: LocalStore, which: str, seed: int) -> None:
    model, reuse = served("llama", store)
    asked = [prompt(20, seed + number) for number in range(3)]
    with Loop(reuse) as loop:
        others: list[dict[str, Any]] = [{}, {which: fails}, {}]
        requests = [loop.submit(ids, max_new_tokens=NEW, **options) for ids, options in zip(asked, others, strict=True)]
        loop.run()
        assert loop.counters == {"requests_failed": 1, "requests_done": 2}
    with pytest.raises(Planted, match="theirs"):
        requests[1].result()
    assert requests[1].state == "failed"
    assert reuse.load(asked[1]).cached_tokens == 19  # what was computed is good
    for place in (0, 2):
        assert torch.equal(requests[place].result(), alone(model, asked[place]))


@pytest.mark.parametrize("place", [0, 7], ids=["prefill", "decode"])
def test_a_model_that_fails_over_one_request(store: LocalStore, place: int, seed: int) -> None:
    """No memory for one: it alone gets the error, and nothing of it is held, however long the error is kept."""
    model, reuse = served("llama", store)
    asked = [stored_prompt(model, reuse, 20 + 20 * number, seed + number) for number in range(3)]
    expected = [alone(model, ids) for ids in asked]
    length = asked[1].shape[1] + place

    def out_of_memory(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["past_key_values"].get_seq_length() + kwargs["input_ids"].shape[1] == length:
            raise torch.OutOfMemoryError("planted")

    handle = model.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    with Loop(reuse) as loop:
        requests = [loop.submit(ids, max_new_tokens=NEW) for ids in asked]
        loop.run()
        assert loop.counters == {"requests_failed": 1, "requests_done": 2}
    handle.remove()
    with pytest.raises(torch.OutOfMemoryError, match="planted") as failed:
        requests[1].result()
    assert "in out_of_memory" in failed.value.__notes__[0]
    assert leases_left(store) == 0 and store.stats()["drafts"] == 0
    for number in (0, 2):
        assert torch.equal(requests[number].result(), expected[number])


def test_a_bug_ends_its_request_and_is_raised(store: LocalStore, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no model should raise: the one who steps gets it too; a serving thread ends, and leaves nobody waiting."""
    model, reuse = served("llama", store)
    asked = [prompt(20, seed), prompt(21, seed + 1)]

    def bug(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 20:
            raise ZeroDivisionError("planted")

    handle = model.register_forward_pre_hook(bug, with_kwargs=True)
    with Loop(reuse) as loop:
        first, second = (loop.submit(ids, max_new_tokens=NEW) for ids in asked)
        with pytest.raises(ZeroDivisionError, match="planted"):
            loop.run()
        loop.run()
        with pytest.raises(ZeroDivisionError, match="planted"):
            first.result()
    unhandled: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    with Loop(reuse, active=1) as loop:
        third, fourth = (loop.submit(ids, max_new_tokens=NEW) for ids in asked)
        loop.serve()
        with pytest.raises(ZeroDivisionError):
            third.result(PATIENCE)
        with pytest.raises(Cancelled, match="ended over another request: ZeroDivisionError: planted"):
            fourth.result(PATIENCE)
        with pytest.raises(StoreClosed, match="takes no more requests"):
            loop.submit(asked[0], max_new_tokens=1)
    assert [hooked.exc_type for hooked in unhandled] == [ZeroDivisionError]
    handle.remove()
    assert torch.equal(second.result(), alone(model, asked[1]))


def test_a_closed_loop_leaves_nobody_waiting(store: LocalStore, seed: int) -> None:
    model, reuse = served("llama", store)
    ids, said, go = prompt(20, seed), threading.Event(), threading.Event()

    def on_token(_: int) -> None:
        said.set()
        assert go.wait(PATIENCE)

    with Loop(reuse, active=1) as loop:
        loop.serve()
        running = loop.submit(ids, max_new_tokens=NEW, on_token=on_token)
        assert said.wait(PATIENCE)
        waiting = loop.submit(ids, max_new_tokens=NEW)
        with pytest.raises(TimeoutError, match=r"no answer within 0.0 seconds; the request is still waiting"):
            waiting.result(0.0)
        closing = Task(loop.close)
        with pytest.raises(Cancelled, match="closed while the request waited"):
            waiting.result(PATIENCE)
        go.set()
        closing.result()
        with pytest.raises(Cancelled, match="closed before the answer was whole"):
            running.result(PATIENCE)
        with pytest.raises(StoreClosed, match="takes no more requests; make a new one"):
            loop.submit(ids, max_new_tokens=NEW)
        with pytest.raises(StoreClosed, match="make a new one"):
            loop.serve()
        assert not loop.step() and loop.counters == {"requests_cancelled": 2}
    read = len(running.token_ids) - 1
    assert read >= 20 and reuse.load([running.token_ids]).cached_tokens == read
    assert running.token_ids == alone(model, ids)[0, : read + 1].tolist()
    assert store._prefetcher._queue == {}


def test_who_waits_too_long_is_refused(store: LocalStore, seed: int) -> None:
    model, reuse = served("llama", store)
    ids = prompt(20, seed)
    with Loop(reuse) as loop:
        late = loop.submit(ids, max_new_tokens=NEW, deadline=0.0)
        patient = loop.submit(ids, max_new_tokens=NEW, deadline=1000.0)
        loop.run()
        assert loop.counters == {"requests_late": 1, "requests_done": 1}
    with pytest.raises(DeadlinePassed, match="longer than its deadline of 0; nothing of it was computed"):
        late.result()
    assert late.state == "late" and late.hit is None and late.ttft_seconds is None
    assert torch.equal(patient.result(), alone(model, ids))


def test_a_full_queue_says_so(store: LocalStore, seed: int) -> None:
    _, reuse = served("llama", store)
    ids = prompt(20, seed)
    with Loop(reuse, active=1, max_waiting=2) as loop:
        for _ in range(2):
            loop.submit(ids, max_new_tokens=1)
        with pytest.raises(QueueFull, match="2 requests wait already; come back later, or give a larger max_waiting"):
            loop.submit(ids, max_new_tokens=1)
        assert loop.counters == {"requests_refused": 1}
        loop.step()
        loop.submit(ids, max_new_tokens=1)
        loop.run()


def test_a_store_that_is_closed_meanwhile(seed: int) -> None:
    """Who runs gets the answer, which is saved nowhere; who is begun later is told."""
    store = kvstore.open(host="16MiB")
    model, reuse = served("llama", store)
    ids = prompt(30, seed)
    with Loop(reuse, active=1) as loop:
        first = loop.submit(ids, max_new_tokens=NEW)
        second = loop.submit(ids, max_new_tokens=NEW)
        loop.step()
        store.close()
        loop.run()
        assert loop.counters == {"requests_done": 1, "requests_unsaved": 1, "requests_failed": 1}
    assert torch.equal(first.result(), alone(model, ids))
    with pytest.raises(StoreClosed):
        second.result()
