"""Host memory and a disk on a simulator's clock: which blocks are where, and transfers that take their time.

A block that was on disk and comes to memory stays on disk too, so it is not written again when it leaves memory. One
read and one write run at a time, each at its bandwidth. Reads that a request waits for go before those in advance.
What leaves memory and has no copy on disk goes through a write buffer beside the memory; it is still in host memory as
long as it is there, and what finds the buffer full is lost. A buffer has room for one block at least.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import filterfalse, takewhile

from kvstore.policies.look_ahead import LookAhead
from kvstore.policy import Arrival, Clock, EvictionPolicy

CLEARED = 1 / 256  # of the disk, at a time, when it is full
After = Callable[[float, Callable[[], None]], None]  # so many seconds from now, call this


@dataclass(frozen=True)
class Machine:
    """What serves. Bandwidths in bytes a second; each worker has a link of its own, the disk is everybody's."""

    workers: int
    slots: int  # requests that a worker has at a time, the one that is prefilled among them
    gpus: int  # of one worker
    memory: int  # bytes of host memory for blocks
    disk: int  # bytes
    buffer: int  # bytes beside the memory, for what is written
    link: float  # host memory to device
    read: float  # disk to host memory
    write: float  # host memory to disk
    token_bytes: int
    linear: float  # seconds of prefill a token
    quadratic: float  # seconds of prefill for each two tokens of which one sees the other, times 2
    step: float  # seconds in which every request that is decoded gets one more token

    def prefill(self, prompt: int, hit: int) -> float:
        """Seconds for a prompt of which the first ``hit`` tokens are loaded, layer by layer under the computation."""
        computed = (prompt - hit) * self.linear + (prompt * prompt - hit * hit) * self.quadratic
        return max(computed, hit * self.token_bytes / self.link)


@dataclass(frozen=True)
class Strategy:
    """What a cache does."""

    policies: Callable[[Clock], tuple[EvictionPolicy, EvictionPolicy]]  # of memory and of disk
    look_ahead: bool = False  # what the queue needs is evicted last
    prefetch: bool = False  # what the queue needs is read to memory in advance

    def made(self, clock: Clock) -> tuple[EvictionPolicy, EvictionPolicy]:
        """Policies of a run, of memory and of disk."""
        memory, disk = self.policies(clock)
        return (LookAhead(memory), LookAhead(disk)) if self.look_ahead else (memory, disk)


class Tiers:
    """Blocks in memory and on disk. ``arrived`` is called with each block that was read."""

    def __init__(
        self,
        machine: Machine,
        policies: tuple[EvictionPolicy, EvictionPolicy],
        after: After,
        arrived: Callable[[int], None],
    ) -> None:
        self.written = self.read = self.lost = 0  # bytes
        self._machine, self._after, self._arrived = machine, after, arrived
        self._memory_policy, self._disk_policy = policies
        self._known: dict[int, Arrival] = {}
        self._memory: set[int] = set()
        self._disk: set[int] = set()
        self._reading: set[int] = set()  # on their way to memory, where they have room already; queued ones too
        self._writing: set[int] = set()
        self._held: Counter[int] = Counter()
        self._memory_used = self._disk_used = self._held_bytes = self._buffered = 0
        self._reads: tuple[deque[int], deque[int]] = deque(), deque()  # waited for; in advance
        self._writes: deque[int] = deque()
        self._reader_busy = False

    # -- what requests see -----------------------------------------------------------------------------------------

    def found(self, blocks: Sequence[int]) -> list[int]:
        """The leading blocks that are anywhere."""
        return list(takewhile(self._is_anywhere, blocks))

    def in_memory(self, block: int) -> bool:
        """Whether it can be loaded to a device now."""
        return block in self._memory or block in self._writing

    def _is_anywhere(self, block: int) -> bool:
        return block in self._memory or block in self._disk or block in self._writing

    def bytes_of(self, blocks: Iterable[int]) -> int:
        """What these take, all of them seen before."""
        return sum(self._known[block].size for block in blocks)

    def touch(self, blocks: Sequence[int]) -> None:
        """A request uses these."""
        self._memory_policy.touch(blocks)
        self._disk_policy.touch(blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """These stay in memory, or stay there when they have come, until they are released as often."""
        for block in blocks:
            self._held[block] += 1
            if self._held[block] == 1:
                self._held_bytes += self._known[block].size
            if block in self._writing and block not in self._memory:
                self._enter_memory(block)

    def release(self, blocks: Iterable[int]) -> None:
        """See ``hold``."""
        for block in blocks:
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
                self._held_bytes -= self._known[block].size
        self._shrink()

    def fetch(self, blocks: Iterable[int], waited_for: bool) -> int:
        """Queues reads of those that are not in memory; they are held. How many bytes are newly on their way."""
        queued = 0
        for block in filterfalse(self.in_memory, blocks):
            if block not in self._reading:
                self._reading.add(block)
                queued += self._known[block].size
                self._reads[not waited_for].append(block)
            elif waited_for:
                self._reads[0].append(block)
        self._memory_used += queued
        self._read_next()
        return queued

    def has_room(self, blocks: Sequence[int]) -> bool:
        """Makes room in memory for those of these blocks, all held, that are not in it or on their way."""
        if self._held_bytes > self._machine.memory:
            return False
        return self._shrink(self.bytes_of(set(blocks).difference(self._memory, self._reading)))

    def store(self, blocks: Sequence[int], tokens: Sequence[int]) -> None:
        """A request leaves this chain: what is nowhere yet comes to memory, which then shrinks to its capacity."""
        for place, (block, count) in enumerate(zip(blocks, tokens, strict=True)):
            if not self._is_anywhere(block):
                parent = blocks[place - 1] if place else -1
                self._known[block] = Arrival(count * self._machine.token_bytes, count, block, parent)
                self._enter_memory(block)
        self._memory_policy.arrange(blocks, served=True)
        self._disk_policy.arrange(blocks)
        self._shrink()

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody will come for these."""
        for block in blocks:
            if block not in self._held and block in self._memory:
                self._leave_memory(block)
            if block not in self._reading and block in self._disk:
                self._leave_disk(block)

    # -- what the queue says ---------------------------------------------------------------------------------------

    def schedule(self, chains: Sequence[Sequence[int]], on_disk: bool) -> None:
        """Tells the policy of memory, or that of the disk, what waiting requests will find, the nearest first; one that
        does not look ahead does not hear it."""
        policy = self._disk_policy if on_disk else self._memory_policy
        if isinstance(policy, LookAhead):
            policy.schedule(chains)

    def protect(self, window: int) -> None:
        """What so many requests wait for stays in memory, if the policy looks ahead; 0: everything may go."""
        if isinstance(self._memory_policy, LookAhead):
            self._memory_policy.protect(window)

    # -- moves -----------------------------------------------------------------------------------------------------

    def _enter_memory(self, block: int) -> None:
        self._memory.add(block)
        self._memory_used += self._known[block].size
        self._memory_policy.insert(block, self._known[block])

    def _leave_memory(self, block: int) -> None:
        self._memory.remove(block)
        self._memory_used -= self._known[block].size
        self._memory_policy.remove(block)

    def _leave_disk(self, block: int) -> None:
        self._disk.remove(block)
        self._disk_used -= self._known[block].size
        self._disk_policy.remove(block)

    def _shrink(self, needed: int = 0) -> bool:
        """Memory lets go of blocks until so many bytes are free; False: the rest of it has to stay."""
        leaving, freed = list[int](), self._machine.memory - self._memory_used
        if freed < needed:
            for victim in filterfalse(self._held.__contains__, self._memory_policy.victims()):
                leaving.append(victim)
                freed += self._known[victim].size
                if freed >= needed:
                    break
        for victim in leaving:
            self._demote(victim)
        return freed >= needed

    def _demote(self, victim: int) -> None:
        """A block leaves memory for the disk, if it is not there and deserves it."""
        size, limit = self._known[victim].size, self._machine.disk
        wanted = size <= limit and victim not in self._disk and victim not in self._writing
        wanted = wanted and (self._disk_used + size <= limit or self._disk_policy.admits(victim))
        self._leave_memory(victim)
        if wanted:
            self._write(victim, size)

    def _write(self, block: int, size: int) -> None:
        if self._buffered and self._buffered + size > self._machine.buffer:
            self.lost += size
            return
        self._buffered += size
        self._writing.add(block)
        self._writes.append(block)
        if len(self._writes) == 1:
            self._after(size / self._machine.write, self._wrote)

    def _wrote(self) -> None:
        block = self._writes.popleft()
        size = self._known[block].size
        self._writing.remove(block)
        self._buffered -= size
        self.written += size
        if self._disk_used + size > self._machine.disk:
            self._clear_disk(max(size, int(CLEARED * self._machine.disk)))
        if self._disk_used + size <= self._machine.disk:
            self._disk.add(block)
            self._disk_used += size
            self._disk_policy.insert(block, self._known[block])
        if self._writes:
            self._after(self._known[self._writes[0]].size / self._machine.write, self._wrote)

    def _clear_disk(self, wanted: int) -> None:
        """Makes so much room there, as far as that can be."""
        leaving, freed = list[int](), self._machine.disk - self._disk_used
        for victim in filterfalse(self._reading.__contains__, self._disk_policy.victims()):
            if freed >= wanted:
                break
            leaving.append(victim)
            freed += self._known[victim].size
        for victim in leaving:
            self._leave_disk(victim)

    def _read_next(self) -> None:
        while not self._reader_busy and (queue := self._reads[0] or self._reads[1]):
            block = queue.popleft()
            if block in self._reading:  # or it was queued twice and is here
                self._reader_busy = True
                self._after(self._known[block].size / self._machine.read, partial(self._have_read, block))

    def _have_read(self, block: int) -> None:
        size = self._known[block].size
        self._reader_busy = False
        self._reading.remove(block)
        self.read += size
        self._memory_used -= size
        self._enter_memory(block)
        self._read_next()
        self._arrived(block)
