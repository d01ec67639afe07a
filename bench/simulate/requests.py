"""Requests as a simulation sees them: when, how long, and which of their blocks equal those of other requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

RECORDED = "recorded"


@dataclass(frozen=True, slots=True)
class Request:
    """One request. ``blocks``: an id for every block of the prompt, root first; equal ids stand for equal tokens behind
    equal tokens. All blocks but the last are whole."""

    time: float  # seconds
    tokens: int  # of the prompt
    blocks: tuple[int, ...]
    output: int = 0  # tokens that were generated
    session: str = ""  # the conversation, where the trace names it

    def sizes(self, block_tokens: int) -> Iterator[int]:
        """Tokens of each block."""
        for number in range(len(self.blocks)):
            yield min(block_tokens, self.tokens - number * block_tokens)

    def hit_tokens(self, blocks: int, block_tokens: int) -> int:
        """Tokens that need not be computed when the first ``blocks`` are there: all of theirs, but never the last one
        of the prompt."""
        return min(blocks * block_tokens, self.tokens - 1)


@dataclass(frozen=True)
class Trace:
    """Requests in the order in which they came."""

    name: str
    format: str
    block_tokens: int
    requests: tuple[Request, ...]
    skipped: int = 0  # records that were left out because they could not be read
    arrivals: str = RECORDED  # or how they were made up

    @cached_property
    def tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(request.tokens for request in self.requests)

    @cached_property
    def unique_blocks(self) -> int:
        """How many different blocks there are: what a cache of capacity 1.0 holds."""
        return len({block for request in self.requests for block in request.blocks})

    @property
    def span(self) -> float:
        """Seconds from the first request to the last."""
        return self.requests[-1].time - self.requests[0].time
