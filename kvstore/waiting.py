"""A waiting job as the store sees it: which blocks it will read, looked up anew in every call."""

from __future__ import annotations

from itertools import takewhile

from kvstore.errors import BadInput
from kvstore.families import NONE
from kvstore.index import Index
from kvstore.job import Job
from kvstore.keys import TOKEN_BYTES, block_key, token_bytes


class Waiting:
    """One job of a queue. Made without the store's lock, and used under it."""

    def __init__(self, job: Job, before: Waiting | None = None) -> None:
        """``before``: the same job in the last call, whose keys need not be made again. Raises ``BadInput``."""
        self.job = job
        self.counted: bool = before is not None and before.counted  # in the mean of what a job takes
        self.blocks: list[tuple[int, int]] = []  # what it reads: block, tokens of it
        self.chain: list[int] = []  # the same blocks, and those that stand before them, root first
        self._tokens, self._keys = b"", list[bytes]()
        if job.match is not None:
            if not job.match.lease.active:
                raise BadInput(f"the match of job {job.name!r} was released; match again, or give its token_ids")
            self.layout = job.match.layout
            return
        assert job.namespace is not None and job.layout is not None
        self.layout, self._root = job.layout, job.root or job.namespace.root
        self._tokens = before._tokens if before and before.job is job else token_bytes(job.token_ids)
        if before is not None and self._same(before):
            self._keys = before._keys
            return
        size, key = self.layout.block_tokens * TOKEN_BYTES, self._root
        for end in range(size, len(self._tokens) + 1, size):
            key = block_key(job.namespace, key, self._tokens[end - size : end])
            self._keys.append(key)

    def _same(self, other: Waiting) -> bool:
        """Whether both read the same, and so have the same keys."""
        mine, yours = self.job, other.job
        if yours.match is not None or self._tokens != other._tokens or self._root != other._root:
            return False
        return mine.namespace == yours.namespace and self.layout.block_tokens == other.layout.block_tokens

    def look(self, index: Index, now: float) -> None:
        """Finds what is stored now. Locked; about a microsecond for a block."""
        job = self.job
        if job.match is not None:
            # A load that has taken the lease over may have ended it: then others can have the numbers.
            blocks = job.match.blocks if job.match.lease.active else []
            self.blocks = list(takewhile(lambda block: index.present(block[0]), blocks))
            self.chain = [number for number, _ in self.blocks]
            if self.chain and index.parent[self.chain[0]] >= 0:
                self.chain = index.chain(self.chain[0])[:-1] + self.chain
            return
        assert job.namespace is not None
        limit = max(len(self._tokens) // TOKEN_BYTES - 1, 0)
        found = index.find(job.namespace, self._root, self.layout, self._tokens, limit, now, self._keys)
        self.chain = found.blocks
        self.blocks = [(number, self.layout.block_tokens) for number in found.blocks]
        if found.partial != NONE:
            self.chain.append(found.partial)
            self.blocks.append((found.partial, found.partial_tokens))
        del self.blocks[: job.first // self.layout.block_tokens]
