"""What can be done for a queue of waiting jobs now: one look at it, under the store's lock.

One account of host memory holds for leases, for what is on its way and for what is kept for jobs; so that a share of
the tier is left for what engines write.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from kvstore.fetch import Fetch
from kvstore.job import Answer, State
from kvstore.loader import LEASE_SHARE, Loader
from kvstore.mover import Priority
from kvstore.policies.cost import Line
from kvstore.policies.windows import Windows
from kvstore.residency import Residency, Resident
from kvstore.room import held_blocks, held_bytes, tier_of
from kvstore.waiting import Waiting

MICROSECONDS = 1_000_000


class Outlook:
    """The order in which jobs are given memory, and how far it reaches. Every call is locked.

    ``chains``: what jobs will read, in that order; of the first ``kept`` of them nothing is evicted, and all but what
    is in ``missing`` is in memory. ``jobs`` are those that these belong to.
    """

    def __init__(
        self,
        residency: Residency,
        loader: Loader,
        windows: Windows,
        speed: Line | None,
        left: Sequence[Waiting],
        queue: Sequence[Waiting],
    ) -> None:
        """``speed``: of the disk; None when it is not known. ``left``: jobs that are not in the queue any more, and
        whose loads may be about to begin."""
        self._speed = speed
        self._residency, self._loader, self._left, self._queue = residency, loader, left, queue
        now = residency.wall()
        for job in [*left, *queue]:
            job.look(residency.index, now)
        needed = {number for job in queue for number in job.chain}
        self._let_go(needed, needed.union(*(job.chain for job in left)))
        self._measure(windows)
        free, self._room = self._memory(needed)
        self._window = min(windows.prefetch(free), len(queue))
        near = sorted(queue[: self._window], key=lambda job: -job.job.priority)
        self.jobs, self.missing, self.kept = list[Waiting](), list[tuple[Waiting, int]](), 0
        self._too_late: set[Waiting] = set()
        self.chains = list(self._shared_out([*left, *near]))
        capacity = residency.host.capacity + (residency.disk.capacity if residency.disk is not None else 0)
        self.chains += [job.chain for job in queue[self._window : windows.eviction(capacity)]]
        residency.host_policy.schedule(self.chains)
        residency.disk_policy.schedule(self.chains)
        residency.host_policy.protect(self.kept)

    def _let_go(self, needed: set[int], seen: set[int]) -> None:
        """Ends prefetches that no job in the queue wants and no worker has begun. What came for jobs that have left,
        and that no load has taken by now, goes before anything else."""
        residency, ahead, fetches = self._residency, self._loader.ahead, self._loader.fetches
        for fetch in list(fetches.values()):
            if fetch.number not in needed:
                self._loader.take_back(fetch)
        arrived = [(number, resident) for number, resident in ahead.items() if number not in fetches]
        there = {number for number, resident in arrived if residency.residents.get(number) is resident}
        wasted = [number for number, _ in reversed(arrived) if number not in there or number not in seen]
        residency.host_policy.let_go(number for number in wasted if number in there)
        for number in wasted:
            del ahead[number]
        if wasted:
            residency.counters.add("prefetch_wasted_blocks", len(wasted))

    def _measure(self, windows: Windows) -> None:
        """What each job that is new takes, beside what is needed before it anyway."""
        seen: set[int] = set()
        for job in self._queue:
            before = len(seen)
            seen.update(job.chain)
            if job.blocks and not job.counted:
                job.counted = True
                windows.saw((len(seen) - before) * job.layout.full_slot_bytes)

    def _memory(self, needed: set[int]) -> tuple[int, int]:
        """Bytes for all that the queue needs, and for what of it is neither held nor on its way."""
        residency, fetches = self._residency, self._loader.fetches
        leases, residents = held_blocks(residency), residency.residents
        held = [fetch.resident for fetch in fetches.values()]
        room = int(residency.host.capacity * LEASE_SHARE) - held_bytes(residency) - _bytes(held)
        ours = [residents[number] for number in needed if number in leases and number in residents]
        ours += [fetch.resident for number, fetch in fetches.items() if number in needed]
        return room + _bytes(ours), room

    def _shared_out(self, jobs: Sequence[Waiting]) -> Iterator[Sequence[int]]:
        """Gives memory to jobs, one after the other, until there is none: the last may get some for its first blocks.
        The chains in that order; where memory ends, one is in two pieces."""
        residency, given = self._residency, set[int]()
        leases, residents, fetches = held_blocks(residency), residency.residents, self._loader.fetches
        ended, left = False, set(self._left)
        for job in jobs:
            size, comes = job.layout.full_slot_bytes, job not in left and not self._late(job)
            for at, number in enumerate(job.chain if not ended else ()):
                there = number in residents
                if number in given or number in fetches or (there and number in leases):
                    continue
                wanted = comes and at >= len(job.chain) - len(job.blocks) and not self._near(number)
                if not there and not wanted:
                    continue
                if size > self._room:
                    ended = True
                    if at:
                        yield job.chain[:at]
                        self.kept += 1
                    yield job.chain[at:]
                    break
                self._room -= size
                given.add(number)
                if wanted:
                    self.missing.append((job, number))
            else:
                yield job.chain
                self.kept += not ended
                if not ended:
                    self.jobs.append(job)

    def _late(self, job: Waiting) -> bool:
        """Whether what is on disk cannot be read before the job is given up."""
        deadline, speed, fetches = job.job.deadline, self._speed, self._loader.fetches
        if deadline is None:
            return False
        size = sum(not self._near(n) and n not in fetches for n, _ in job.blocks) * job.layout.full_slot_bytes
        size += sum(fetch.left for fetch in fetches.values())
        size += sum(other.layout.full_slot_bytes for other, _ in self.missing)
        if deadline > (0 if speed is None else speed.seconds(size)):
            return False
        self._too_late.add(job)
        return True

    def begin(self) -> list[Fetch]:
        """Starts reading what is missing; the caller submits it."""
        started: dict[Waiting, list[Fetch]] = {}
        turns = self._turns()
        for job, number in self.missing:
            at = len(started.setdefault(job, []))
            fetch = self._loader.start(number, Priority.PREFETCH, (turns[job], at))
            if fetch is None:  # what could go is not written yet
                break
            started[job].append(fetch)
        for job in started:
            self._residency.host_policy.arrange(job.chain)
        return [fetch for fetches in started.values() for fetch in fetches]

    def _turns(self) -> dict[Waiting, int]:
        """When each job's reads are to be done, in microseconds of the monotonic clock, no two at the same time."""
        now, wait, turns = time.monotonic(), 0.0, dict[Waiting, int]()
        for place, job in enumerate(self._queue):
            wait = wait if job.job.start is None else job.job.start
            turns[job] = int((now + wait) * MICROSECONDS) + place
        return turns

    def _near(self, number: int) -> bool:
        """Whether a block is in host memory or on the device."""
        return tier_of(self._residency, number) in ("device", "host")

    def answers(self) -> list[Answer]:
        """What ``Store.schedule`` returns."""
        return [Answer(job.job.name, self._state(at, job), *self._tokens(job)) for at, job in enumerate(self._queue)]

    def _state(self, place: int, job: Waiting) -> State:
        missing = [number for number, _ in job.blocks if not self._near(number)]
        if not missing:
            return "resident" if job.blocks else "unknown"
        if all(number in self._loader.fetches for number in missing):
            return "prefetching"
        return "over budget" if place < self._window and job not in self._too_late else "too far"

    def _tokens(self, job: Waiting) -> tuple[int, dict[str, int]]:
        """All tokens that are stored, and by tier."""
        tiers = {"device": 0, "host": 0, "disk": 0, "remote": 0}
        for number, tokens in job.blocks:
            tiers[tier_of(self._residency, number)] += tokens
        return sum(tiers.values()), tiers


def _bytes(residents: Iterable[Resident]) -> int:
    """Of their slots, at most."""
    return sum(resident.layout.full_slot_bytes for resident in residents)
