"""Requests against workers, memory and disk, event after event.

One queue, first come, first served. A worker either prefills one request, or decodes all that it has, a token each per
step; a prefill stops its decoding. It takes the request at the head of the queue when a slot is free and no other is
being loaded. What that request finds on disk it waits for, while the worker goes on decoding. Then its blocks are
loaded under the prefill, layer by layer, so that the longer of both counts. Its first token comes at the prefill's end.
What it leaves is stored when it has its last token; saving takes no time of the worker's.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count, islice

from kvstore.bench.simulate.requests import Trace
from kvstore.bench.simulate.timed_tiers import Machine, Strategy, Tiers
from kvstore.loader import LEASE_SHARE
from kvstore.policies.windows import Windows

FEW = 32  # a policy hears of the queue again when one in so many of the requests that it knows of has changed
FIRST = -1


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. ``blocks``: numbers from 0 on of the chain that it leaves, root first, with so many ``tokens``."""

    time: float  # when it comes; or the seconds from the end of the turn that it goes on from
    prompt: int
    output: int
    blocks: tuple[int, ...]
    tokens: tuple[int, ...]
    before: int = FIRST  # the number of the turn that it goes on from


@dataclass(frozen=True)
class Chats:
    """Sessions as ShareGPT's: geometric numbers of turns, lognormal lengths, exponential times to think."""

    sessions: int
    rate: float  # sessions that begin in a second, a Poisson process
    think: float  # seconds from a turn's last token to the next turn, on average
    turns: float = 5.75  # of a session, on average
    question: float = 160  # tokens, on average
    answer: float = 340
    spread: float = 1.0  # standard deviation of the lengths' logarithms
    window: int = 4096  # tokens; when a turn does not fit, its oldest turns are dropped until half of it is free


def drawn(chats: Chats, seed: int) -> list[Turn]:
    """Turns of these sessions, the same for the same seed. Each turn is one block: its question and its answer."""
    draw, numbers, now = random.Random(seed), count(), 0.0
    turns: list[Turn] = []

    def length(mean: float) -> int:
        tokens = round(draw.lognormvariate(math.log(mean) - chats.spread**2 / 2, chats.spread))
        return min(max(tokens, 1), chats.window // 4)

    for _ in range(chats.sessions):
        now += draw.expovariate(chats.rate)
        time, before, kept = now, FIRST, list[tuple[int, int]]()
        while before == FIRST or draw.random() < 1 - 1 / chats.turns:
            question, answer = length(chats.question), length(chats.answer)
            if sum(tokens for _, tokens in kept) + question + answer > chats.window:
                while sum(tokens for _, tokens in kept) > chats.window // 2:
                    del kept[0]
            history = sum(tokens for _, tokens in kept)
            kept.append((next(numbers), question + answer))
            blocks, tokens = zip(*kept, strict=True)
            turns.append(Turn(time, history + question, answer, blocks, tokens, before))
            time, before = draw.expovariate(1 / chats.think), len(turns) - 1
    return turns


def recorded(trace: Trace) -> list[Turn]:
    """The requests of a trace at its times, from the first one on; replies are not in its blocks."""
    numbers: dict[int, int] = {}
    began = trace.requests[0].time
    return [
        Turn(
            request.time - began,
            request.tokens,
            request.output,
            tuple(numbers.setdefault(block, len(numbers)) for block in request.blocks),
            tuple(request.sizes(trace.block_tokens)),
        )
        for request in trace.requests
    ]


@dataclass(slots=True)
class Served:
    """What came of one request, in seconds and tokens."""

    came: float
    started: float = 0.0  # a worker took it
    first: float = 0.0  # its first token came
    ended: float = 0.0
    prompt: int = 0
    hit: int = 0  # tokens that were not computed
    in_memory: int = 0  # of the tokens found, those that were there when it started
    found: int = 0


@dataclass
class _Worker:
    """``clock``: seconds that it has spent decoding, on which ``decoding`` has when each request ends."""

    turn: int = FIRST  # being loaded or prefilled
    found: list[int] = field(default_factory=list)
    missing: set[int] = field(default_factory=set)
    prefilling: bool = False
    decoding: list[tuple[float, int]] = field(default_factory=list)
    clock: float = 0.0
    since: float = 0.0
    busy: float = 0.0
    plan: int = 0  # goes up when what was planned holds no longer

    def advance(self, now: float) -> None:
        """Time has passed."""
        spent, self.since = now - self.since, now
        self.busy += spent if self.prefilling or self.decoding else 0.0
        self.clock += spent if self.decoding and not self.prefilling else 0.0


class Run:
    """One strategy on one machine. ``served`` is in the order of the turns. ``ended`` is called after each request."""

    def __init__(
        self, turns: Sequence[Turn], machine: Machine, strategy: Strategy, ended: Callable[[], object] = lambda: None
    ) -> None:
        self.served = [Served(0.0, prompt=turn.prompt) for turn in turns]
        self.now = 0.0
        self._turns, self._machine, self._strategy, self._ended = turns, machine, strategy, ended
        self.tiers = Tiers(machine, strategy.made(lambda: self.now), self._after, self._arrived)
        self._following = {turn.before: number for number, turn in enumerate(turns) if turn.before != FIRST}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tie = count()
        self._queue: deque[int] = deque()
        self._changes = 0  # of the queue
        self._told = [0, 0]  # how many of them the policies of memory and of the disk have heard of
        self._workers = [_Worker() for _ in range(machine.workers)]
        self._blocked = False  # no room for the next of them, until something is released
        self._windows, self._wanted = Windows(), Counter[int]()
        self._fetched: deque[list[int]] = deque()  # what is held for each of the first requests of the queue
        for number, turn in enumerate(turns):
            if turn.before == FIRST:
                self._after(turn.time, partial(self._come, number))

    @property
    def busy(self) -> float:
        """Seconds in which workers prefilled or decoded, together; one that only waits for the disk is idle."""
        return sum(worker.busy for worker in self._workers)

    def finish(self) -> None:
        """Serves all requests."""
        while self._events:
            self.now, _, event = heappop(self._events)
            event()
            self._start()
            self._prefetch()

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heappush(self._events, (self.now + seconds, next(self._tie), event))

    # -- the queue -------------------------------------------------------------------------------------------------

    def _come(self, number: int) -> None:
        self.served[number].came = self.now
        self._queue.append(number)
        self._changes += 1
        blocks = self._turns[number].blocks
        found = self.tiers.found(blocks)
        self._windows.saw(self.tiers.bytes_of(block for block in found if not self._wanted[block]))
        self._wanted.update(blocks)

    def _start(self) -> None:
        """Workers take what they can."""
        while self._queue:
            free = [one for one in self._workers if one.turn == FIRST and len(one.decoding) < self._machine.slots]
            if not free:
                break
            self._take(min(free, key=lambda one: len(one.decoding)), self._queue.popleft())

    def _take(self, worker: _Worker, number: int) -> None:
        turn, served, tiers = self._turns[number], self.served[number], self.tiers
        self._changes += 1
        self._wanted.subtract(turn.blocks)
        found = tiers.found(turn.blocks)
        tiers.touch(found)
        worker.turn, worker.found = number, found
        worker.missing = {block for block in found if not tiers.in_memory(block)}
        tiers.hold(found)
        if self._fetched:
            tiers.release(self._fetched.popleft())
        self._blocked = False
        sizes = dict(zip(turn.blocks, turn.tokens, strict=True))
        served.started, served.found = self.now, sum(sizes[block] for block in found)
        served.in_memory = served.found - sum(sizes[block] for block in worker.missing)
        served.hit = min(served.found, turn.prompt - 1)
        tiers.fetch(found, waited_for=True)
        if not worker.missing:
            self._prefill(worker)

    def _prefetch(self) -> None:
        """Reads for requests that wait, the nearest first, as far as the window reaches. What was read stays."""
        window = min(self._windows.prefetch(int(self._machine.memory * LEASE_SHARE)), len(self._queue))
        if self._strategy.look_ahead:
            self._tell(2 * window, on_disk=False)
            everything = self._windows.eviction(self._machine.memory + self._machine.disk)
            self._tell(min(everything, len(self._queue)), on_disk=True)
        if not self._strategy.prefetch or self._blocked:
            return
        self.tiers.protect(window)
        while len(self._fetched) < window:
            found = self.tiers.found(self._turns[self._queue[len(self._fetched)]].blocks)
            self.tiers.hold(found)
            if not self.tiers.has_room(found):
                self.tiers.release(found)
                self._blocked = True
                break
            self.tiers.fetch(found, waited_for=False)
            self._fetched.append(found)
        self.tiers.protect(0)

    def _tell(self, jobs: int, on_disk: bool) -> None:
        """A tier hears of so many waiting requests, when more than a few of them have changed."""
        if self._changes - self._told[on_disk] > jobs // FEW:
            self._told[on_disk] = self._changes
            queue = islice(self._queue, jobs)
            self.tiers.schedule([self.tiers.found(self._turns[number].blocks) for number in queue], on_disk)

    # -- workers ---------------------------------------------------------------------------------------------------

    def _arrived(self, block: int) -> None:
        """A block was read."""
        for worker in self._workers:
            if block in worker.missing:
                worker.missing.remove(block)
                if not worker.missing:
                    self._prefill(worker)

    def _prefill(self, worker: _Worker) -> None:
        worker.advance(self.now)
        worker.prefilling = True
        worker.plan += 1
        hit = self.served[worker.turn].hit
        self._after(self._machine.prefill(self._turns[worker.turn].prompt, hit), partial(self._prefilled, worker))

    def _prefilled(self, worker: _Worker) -> None:
        number, worker.turn = worker.turn, FIRST
        worker.advance(self.now)
        worker.prefilling = False
        self.served[number].first = self.now
        self.tiers.release(worker.found)
        self._blocked = False
        more = self._turns[number].output - 1
        if more > 0:
            heappush(worker.decoding, (worker.clock + more * self._machine.step, number))
        else:
            self._end(number)
        self._decode(worker)

    def _decode(self, worker: _Worker) -> None:
        """Plans when the next request has its last token, as long as nothing is prefilled."""
        worker.plan += 1
        if worker.decoding:
            left = worker.decoding[0][0] - worker.clock
            self._after(left, partial(self._decoded, worker, worker.plan))

    def _decoded(self, worker: _Worker, plan: int) -> None:
        if plan == worker.plan:
            worker.advance(self.now)
            worker.clock, number = heappop(worker.decoding)
            self._end(number)
            self._decode(worker)

    def _end(self, number: int) -> None:
        turn = self._turns[number]
        self.served[number].ended = self.now
        if turn.before != FIRST:
            self.tiers.forget(set(self._turns[turn.before].blocks).difference(turn.blocks))
        self.tiers.store(turn.blocks, turn.tokens)
        following = self._following.get(number)
        if following is not None:
            self._after(self._turns[following].time, partial(self._come, following))
        self._ended()
