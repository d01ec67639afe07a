"""What a match found: which leading tokens are cached and where, and why it ends where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.errors import BadInput
from kvstore.keys import TOKEN_BYTES
from kvstore.kinds import Origin
from kvstore.layout import Layout
from kvstore.lease import Lease


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a match ended where it ended. ``str`` gives the sentence."""

    kind: str  # "complete", "parts", "empty", "fingerprint", "refused"
    position: int  # the token where it ended
    text: str
    field: str | None = None  # component of the fingerprint that differs

    def __str__(self) -> str:
        return self.text


class Match:
    """Which leading tokens are cached, on which tier; holds a lease on their blocks.

    ``blocks`` are (number, tokens used), those of the first ``skipped`` tokens left out. ``miss`` says why it ends
    at ``tokens``.
    """

    def __init__(
        self,
        layout: Layout,
        blocks: list[tuple[int, int]],
        lease: Lease,
        tokens: int,
        tiers: list[str],
        miss: Miss,
        token_ids: bytes,
        skipped: int = 0,
        lacking: Sequence[int] = (),
        origins: Sequence[Origin] = (),
    ) -> None:
        self.layout = layout
        self.blocks = blocks
        self.lease = lease
        self.tokens = tokens
        self.tiers = tiers  # of the blocks: "device", "host", "disk" or "remote"
        self.miss = miss
        self.token_ids = token_ids  # of ``blocks``
        self.origins = list(origins)  # of the blocks: in which form their keys are, and who wrote them
        self.skipped = skipped  # leading tokens whose blocks are no part of it
        self.lacking = lacking  # of blocks asked for apart (``APART``), by number in what was asked: those not stored
        self.loaded = False  # a load has taken over the lease

    def held(self) -> list[tuple[int, int]]:
        """``blocks``, whose numbers stand for them while the lease lasts. Raises ``BadInput`` when it is over."""
        if not self.lease.active:
            raise BadInput("the match was released, or its load was; match again")
        return self.blocks

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """Where the tokens of its blocks were when it was made."""
        found = {"device": 0, "host": 0, "disk": 0, "remote": 0}
        for tier, (_, tokens) in zip(self.tiers, self.blocks, strict=True):
            found[tier] += tokens
        return found

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of keys that its blocks have, each once."""
        return tuple(dict.fromkeys(origin.form for origin in self.origins))

    @property
    def writers(self) -> tuple[str, ...]:
        """Who wrote its blocks, as far as is known, each once."""
        return tuple(filter(None, dict.fromkeys(origin.writer for origin in self.origins)))

    def cut(self, tokens: int) -> None:
        """Leaves only the first ``tokens``, whole blocks of them, for what loads it, and lets go of the others."""
        left, count = tokens - self.skipped, 0
        while count < len(self.blocks) and self.blocks[count][1] <= left:
            left -= self.blocks[count][1]
            count += 1
        if count == len(self.blocks):
            return
        del self.blocks[count:], self.tiers[count:], self.origins[count:]
        self.tokens = self.skipped + sum(used for _, used in self.blocks)
        self.token_ids = self.token_ids[: (self.tokens - self.skipped) * TOKEN_BYTES]
        self.lease.shorten(count)

    def release(self) -> None:
        """Ends the lease, unless a load has taken it over; also happens when the match is dropped."""
        if not self.loaded:
            self.lease.release()


def without(tokens: bytes, size: int, lacking: Sequence[int]) -> bytes:
    """Token bytes of a chain's blocks, ``size`` each, but for some of them (by number, ascending)."""
    if not lacking:
        return tokens
    ends = [0, *((number + 1) * size for number in lacking)]
    starts = [*(number * size for number in lacking), len(tokens)]
    return b"".join(tokens[end:start] for end, start in zip(ends, starts, strict=True))
