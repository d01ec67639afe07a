"""The store against a dict once more, while parts of it are pinned, retained, demoted and forgotten: only the last
changes what is found."""

from __future__ import annotations

from array import array

import test_state_machine
from hypothesis import strategies as st
from hypothesis.stateful import rule
from kept import kept_faults
from queues import nobody_waits
from test_state_machine import SPACES, Block, run, tenants, tokens_of_a_chain

from kvstore.match import Match


class Machine(test_state_machine.Machine):
    """Pins of a moment and of a while, some of them released; everything may still be saved, loaded, evicted."""

    @rule(
        tenant=tenants,
        tokens=tokens_of_a_chain,
        tier=st.sampled_from(["host", "disk"]),
        seconds=st.sampled_from([1e-3, 1e3]),
    )
    def keep(self, tenant: str, tokens: list[int], tier: str, seconds: float) -> None:
        match = self.matched(tenant, tokens)
        pinned = self.live.pin(match, "host" if tier == "host" else "disk", seconds=seconds)
        assert pinned.tokens <= pinned.asked == match.tokens
        if self.exact and (self.disk or tier == "host"):
            assert (pinned.tokens, pinned.why) == (match.tokens, "")
        if len(tokens) % 2:
            pinned.release()
        match.release()

    @rule(tenant=tenants, tokens=tokens_of_a_chain)
    def retain(self, tenant: str, tokens: list[int]) -> None:
        match = self.matched(tenant, tokens)
        retained = self.live.retain(match, 0.01)
        assert retained.tokens == match.tokens if self.exact else retained.tokens <= match.tokens
        match.release()

    @rule(tenant=tenants, tokens=tokens_of_a_chain)
    def demote(self, tenant: str, tokens: list[int]) -> None:
        match = self.matched(tenant, tokens)
        if self.live.demote(match).asked and self.exact:
            assert self.live.match(SPACES[tenant], self.layout, tokens).tokens == match.tokens

    @rule(tenant=tenants, tokens=tokens_of_a_chain)
    def forget_match(self, tenant: str, tokens: list[int]) -> None:
        match = self.matched(tenant, tokens)
        blocks = self.blocks_found(match, tenant)
        receipt = self.live.forget(match=match)
        going = {block for block in self.model.owner if any(_behind(block, head) for head in blocks)}
        for block in going:
            del self.model.owner[block]
        self.model.gone = self.model.gone | going if receipt.deferred else set()
        assert receipt.blocks == len(going) if self.exact else receipt.blocks <= len(going)

    def matched(self, tenant: str, tokens: list[int]) -> Match:
        match = self.live.match(SPACES[tenant], self.layout, tokens)
        expected = self.model.match(tenant, tokens)
        assert match.tokens == expected if self.exact else match.tokens <= expected
        return match

    def blocks_found(self, match: Match, tenant: str) -> list[Block]:
        index, found, before = self.live._residency.index, list[Block](), tuple[int, ...]()
        for number, _ in match.blocks:
            own = tuple(array("I", index.tokens_of(number)).tolist())
            found.append((tenant, before, own))
            before += own
        return found

    def check_accounts(self) -> None:
        nobody_waits(self.live)
        super().check_accounts()
        assert kept_faults(self.live) == []


def _behind(block: Block, head: Block) -> bool:
    """Whether a block is ``head``, or stands behind it."""
    chain = head[1] + head[2]
    return block == head or (block[0] == head[0] and len(head[2]) == 4 and block[1][: len(chain)] == chain)


def test_the_store_is_a_dict_whatever_is_kept(seed: int) -> None:
    run(seed, examples=40, steps=30, machine=Machine)
