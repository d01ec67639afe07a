"""What streams and events promise: one suite for threads and for CUDA, and what only threads can show."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from devices import CUDA, slow_kernel
from gates import PATIENCE, Task

from kvstore.errors import StoreClosed
from kvstore.tensors.streams import CudaStream, Stream, ThreadStream, current


@dataclass
class Kind:
    """A kind of stream: how to make one, where its memory is, and what holds it up."""

    make: Callable[[], Stream]
    device: str
    hold_up: Callable[[], None]  # work
    let_go: Callable[[], None]
    made: list[Stream] = field(default_factory=list)

    def stream(self) -> Stream:
        self.made.append(self.make())
        return self.made[-1]

    def numbers(self) -> torch.Tensor:
        return torch.zeros(1 << 10, dtype=torch.uint8, device=self.device)


@pytest.fixture(params=["thread", pytest.param("cuda", marks=CUDA)])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    gate = threading.Event()
    if request.param == "thread":
        kind = Kind(lambda: ThreadStream("kvstore-test"), "cpu", lambda: void(gate.wait(PATIENCE)), gate.set)
    else:
        kind = Kind(lambda: CudaStream("cuda"), "cuda", slow_kernel, lambda: None)
    yield kind
    gate.set()
    for stream in kind.made:
        stream.close()


def void(_: object) -> None:
    """What work gives back."""


def put(memory: torch.Tensor, value: int) -> Callable[[], None]:
    return lambda: void(memory.fill_(value))


def copy(source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    return lambda: void(target.copy_(source))


def test_work_is_done_in_order(kind: Kind) -> None:
    stream, memory, copies = kind.stream(), kind.numbers(), [kind.numbers() for _ in range(50)]
    for value, target in enumerate(copies):
        stream.run(put(memory, value))
        stream.run(copy(memory, target))
    event = stream.record()
    event.wait()
    assert event.done()
    assert [int(target.max()) for target in copies] == list(range(50))


def test_an_event_is_reached_when_the_work_before_it_is_over(kind: Kind) -> None:
    stream, memory = kind.stream(), kind.numbers()
    before = stream.record()
    before.wait()
    stream.run(kind.hold_up)
    stream.run(put(memory, 7))
    event = stream.record()
    assert before.done() and not event.done()
    kind.let_go()
    event.wait()
    assert event.done() and int(memory.min()) == 7


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "does not wait"])
def test_streams_run_beside_each_other_but_for_what_waits(kind: Kind, waits: bool) -> None:
    """The control shows that it is the wait that keeps the order."""
    one, other = kind.stream(), kind.stream()
    memory, target = kind.numbers(), kind.numbers()
    other.run(copy(memory, target))  # whatever starts with the first work is there
    other.record().wait()
    one.run(kind.hold_up)
    one.run(put(memory, 7))
    if waits:
        other.wait(one.record())
    other.run(copy(memory, target))
    event = other.record()
    if waits:
        assert not event.done()
        kind.let_go()
    event.wait()
    assert int(target.min()) == (7 if waits else 0)


def test_close_waits_for_all_work(kind: Kind) -> None:
    stream, memory = kind.stream(), kind.numbers()
    stream.run(kind.hold_up)
    stream.run(put(memory, 7))
    event = stream.record()
    kind.let_go()
    stream.close()
    assert event.done() and int(memory.min()) == 7
    stream.close()


def test_the_callers_stream_does_all_at_once() -> None:
    stream, memory = current("cpu"), torch.zeros(8)
    thread = ThreadStream("kvstore-test")
    thread.run(put(memory, 1))
    stream.wait(thread.record())
    stream.run(lambda: void(memory.add_(1)))
    event = stream.record()
    event.wait()
    assert event.done() and memory.tolist() == [2.0] * 8
    stream.close()
    thread.close()


def test_an_error_is_raised_once_and_what_comes_behind_is_done(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ValueError("broken work")

    stream, done = ThreadStream("kvstore-test"), list[int]()
    stream.run(broken)
    event = stream.record()
    event.wait()
    with pytest.raises(ValueError, match="broken work"):
        stream.run(lambda: done.append(1))
    stream.run(lambda: done.append(2))
    stream.run(broken)
    with pytest.raises(ValueError, match="broken work"):
        stream.close()
    stream.close()
    assert done == [2]
    assert [record.message for record in caplog.records] == ["work in the stream kvstore-test failed"] * 2


def test_nothing_is_taken_behind_the_end() -> None:
    stream = ThreadStream("kvstore-test")
    assert "kvstore-test" in {thread.name for thread in threading.enumerate()}
    stream.close()
    assert "kvstore-test" not in {thread.name for thread in threading.enumerate()}
    for call in (lambda: stream.run(lambda: None), stream.record):
        with pytest.raises(StoreClosed):
            call()


def test_who_brings_too_much_work_waits() -> None:
    stream, gate, begun, done = ThreadStream("kvstore-test", room=2), threading.Event(), threading.Event(), list[int]()
    stream.run(begun.set)
    stream.run(lambda: void(gate.wait(PATIENCE)))
    assert begun.wait(PATIENCE)

    def bring() -> None:
        for number in range(10):
            stream.run(lambda number=number: done.append(number))  # type: ignore[misc]

    task = Task(bring)
    task.join(0.05)
    assert task.is_alive() and done == []
    gate.set()
    task.result()
    stream.close()
    assert done == list(range(10))


def test_where_strangers_share_it_an_error_is_nobodys_but_the_logs(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ValueError("broken work")

    stream, done = ThreadStream("kvstore-test", tells=False), list[int]()
    stream.run(broken)
    stream.record().wait()
    stream.run(lambda: done.append(1))
    stream.close()
    assert done == [1]
    assert [record.message for record in caplog.records] == ["work in the stream kvstore-test failed"]


def test_its_own_work_may_close_it() -> None:
    stream = ThreadStream("kvstore-test")
    stream.run(stream.close)
    stream._thread.join(PATIENCE)
    assert not stream._thread.is_alive()
    stream.close()


def test_who_closes_a_full_one_does_not_stop_work_that_asks_for_more() -> None:
    stream, gate, begun = ThreadStream("kvstore-test", room=1), threading.Event(), threading.Event()
    refused: list[StoreClosed] = []

    def asks() -> None:
        begun.set()
        gate.wait(PATIENCE)
        try:
            stream.record()
        except StoreClosed as error:
            refused.append(error)

    stream.run(asks)
    assert begun.wait(PATIENCE)
    stream.run(lambda: None)
    closing = Task(stream.close)
    while not stream._closed:
        closing.join(0.01)
    gate.set()
    closing.result()
    assert len(refused) == 1


@pytest.mark.parametrize("what", ["a.copy_(a.clone())", "torch.mm(a, a)"])
def test_the_interpreter_ends_well_while_there_is_work(what: str) -> None:
    """A thread that comes out of torch when the interpreter is gone would abort the process."""
    code = f"""
import threading, torch
from kvstore.tensors.streams import ThreadStream
stream, begun, a = ThreadStream("kvstore-test"), threading.Event(), torch.rand(300, 300)
def work():
    begun.set()
    for _ in range(100): {what}
for _ in range(1000): stream.run(work)
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
