"""Layers brought ahead of the model: in order, by a window, and never from memory whose lease has ended."""

import queue
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import kvstore
from kvstore.adapters.transformers.ahead import FEW_TOKENS, Ahead, worker_for


class Steps:
    """A worker whose work is done when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def run(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def step(self) -> None:
        self.waiting.pop(0)()


class Thread:
    """A worker with a thread of its own."""

    def __init__(self) -> None:
        self.works: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, name="test-worker")
        self.thread.start()

    def run(self, work: Callable[[], None]) -> None:
        self.works.put(work)

    def _work(self) -> None:
        while (work := self.works.get()) is not None:
            work()

    def close(self) -> None:
        self.works.put(None)
        self.thread.join()


@pytest.fixture
def thread() -> Iterator[Thread]:
    worker = Thread()
    yield worker
    worker.close()


def test_a_window_of_layers_in_order() -> None:
    steps = Steps()
    brought: list[int] = []

    def bring(layer: int) -> str:
        brought.append(layer)
        return f"layer {layer}"

    ahead = Ahead(bring, layers=6, depth=2, worker=steps)
    ahead.start()
    while steps.waiting:
        steps.step()
    assert brought == [0, 1]
    assert ahead.take(0) == "layer 0"
    ahead.reached(0)
    while steps.waiting:
        steps.step()
    assert brought == [0, 1, 2]
    assert [ahead.take(layer) for layer in (1, 2)] == ["layer 1", "layer 2"]


def test_what_nobody_has_begun_is_left_to_whoever_asks() -> None:
    steps = Steps()
    brought: list[int] = []

    def bring(layer: int) -> int:
        brought.append(layer)
        return layer

    ahead = Ahead(bring, layers=2, depth=1, worker=steps)
    ahead.start()
    assert ahead.take(0) is None
    ahead.reached(0)
    while steps.waiting:
        steps.step()
    assert brought == [1]  # the layer that was taken is not brought a second time
    assert ahead.take(1) == 1


def test_whoever_asks_waits_for_what_is_under_way(thread: Thread) -> None:
    begun, gate = threading.Event(), threading.Event()

    def bring(layer: int) -> int:
        begun.set()
        assert gate.wait(20)
        return layer + 100

    ahead = Ahead(bring, layers=1, depth=1, worker=thread)
    ahead.start()
    assert begun.wait(20)
    threading.Timer(0.01, gate.set).start()
    assert ahead.take(0) == 100


def test_leases_end_after_the_layer_that_is_under_way(thread: Thread) -> None:
    begun, gate = threading.Event(), threading.Event()
    order: list[str] = []

    def bring(layer: int) -> int:
        begun.set()
        assert gate.wait(20)
        order.append("read")
        return layer

    ahead = Ahead(bring, layers=3, depth=3, worker=thread)
    ahead.start()
    assert begun.wait(20)
    over = threading.Event()

    def release() -> None:
        order.append("released")
        over.set()

    ahead.close(release)
    assert order == []
    ahead.close(lambda: order.append("released twice"))
    gate.set()
    assert over.wait(20)
    assert order == ["read", "released"]
    assert ahead.take(2) is None  # nothing more is brought


def test_leases_end_at_once_when_nothing_is_under_way() -> None:
    steps = Steps()
    order: list[str] = []
    ahead = Ahead(lambda layer: order.append("read"), layers=3, depth=3, worker=steps)
    ahead.start()
    ahead.close(lambda: order.append("released"))
    while steps.waiting:
        steps.step()
    assert order == ["released"]


def test_what_cannot_be_had_is_none() -> None:
    steps = Steps()
    ahead = Ahead(lambda layer: None, layers=1, depth=1, worker=steps)
    ahead.start()
    steps.step()
    assert ahead.take(0) is None


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_in_bringing_stops_nobody(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps()

    def bring(layer: int) -> int:
        raise error("no memory")

    ahead = Ahead(bring, layers=1, depth=1, worker=steps)
    ahead.start()
    steps.step()
    assert ahead.take(0) is None
    assert "could not be brought ahead" in caplog.text


def test_a_store_that_closes_stops_nobody() -> None:
    with kvstore.open(host="4MiB") as store:
        worker = store.worker()
    ahead = Ahead(lambda layer: layer, layers=2, depth=2, worker=worker)
    ahead.start()
    assert ahead.take(0) is None


def test_a_hit_takes_one_place_in_the_workers_queue() -> None:
    """However many layers a hit asks for while the worker is held up: whoever queues must never wait for room."""
    steps = Steps()
    ahead = Ahead(lambda layer: layer, layers=80, depth=4, worker=steps)
    ahead.start()
    for layer in range(70):
        assert ahead.take(layer) is None
        ahead.reached(layer)
    assert len(steps.waiting) == 1
    steps.step()
    ahead.reached(70)
    assert len(steps.waiting) == 1
    steps.step()
    assert [ahead.take(layer) for layer in range(70, 75)] == [*range(70, 75)]


def test_layers_come_ahead_where_there_is_a_core_for_it_or_enough_to_hide_it_under(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with kvstore.open(host="4MiB") as store:
        for threads, new, on_device, expected in (
            (2, 1, False, False),
            (2, FEW_TOKENS, False, True),
            (1, 1, False, True),
            (2, 1, True, True),
        ):
            monkeypatch.setattr("os.cpu_count", lambda: 2)
            monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
            assert (worker_for(store, new, on_device) is not None) is expected
    assert worker_for(store, 100, False) is None  # closed
